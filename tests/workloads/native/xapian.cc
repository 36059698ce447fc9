// Full-text search in documents that are in memory.

#include <cmath>

#include <xapian.h>

#include "server.h"

namespace {

// As the load generator has it.
constexpr uint64_t kWords = 50000;

// Words of a document.
constexpr unsigned kLength = 100;

// What Xapian's in-memory database takes for a document.
constexpr uint64_t kDocumentBytes = 16000;

std::string term(uint64_t number)
{
	return "w" + std::to_string(number);
}

// Half of all are among the first eighth.
uint64_t skewed(uint64_t bits)
{
	const double unit = (bits >> 11) / 9007199254740992.0;

	return unit * unit * unit * kWords;
}

} // namespace

int main(int argc, char **argv)
{
	const Options options = parse(argc, argv);
	const uint64_t documents = options.bytes / kDocumentBytes;
	Xapian::WritableDatabase database(std::string(), Xapian::DB_BACKEND_INMEMORY);

	for (uint64_t number = 0; number < documents; number++) {
		Xapian::Document document;
		for (unsigned at = 0; at < kLength; at++)
			document.add_term(term(skewed(mix(options.seed, number * kLength + at))));
		document.set_data("document " + std::to_string(number));
		database.add_document(document);
	}
	const std::string version = std::string("xapian ") + Xapian::version_string();
	serve(documents, version, [&](const std::string &, std::istringstream &words) {
		Xapian::Query query;
		for (uint64_t number; words >> number;) {
			const Xapian::Query next(term(number));
			query = query.empty() ? next : Xapian::Query(Xapian::Query::OP_OR, query, next);
		}
		Xapian::Enquire enquire(database);
		enquire.set_query(query);
		uint64_t digest = 0;
		const Xapian::MSet found = enquire.get_mset(0, 10);
		for (auto match = found.begin(); match != found.end(); ++match)
			digest = mix(digest, *match);
		return digest;
	});
}
