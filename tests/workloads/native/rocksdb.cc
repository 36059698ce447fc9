// A key-value store whose tables are on the disk and whose values are all in
// the block cache.

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/sst_file_writer.h>
#include <rocksdb/table.h>
#include <rocksdb/version.h>

#include "server.h"

namespace {

constexpr char kDatabase[] = "/scratch/rocksdb";
constexpr char kTable[] = "/scratch/rocksdb.sst";
constexpr size_t kValue = 1000;

// What a key and its value take in the cache.
constexpr uint64_t kKeyBytes = 1040;

std::string key(uint64_t number)
{
	char text[24];

	std::snprintf(text, sizeof text, "key:%012llu", (unsigned long long)number);
	return text;
}

std::string value(uint64_t number)
{
	std::string text(kValue, 'x');

	for (unsigned byte = 0; byte < 8; byte++)
		text[byte] = static_cast<char>(number >> 8 * byte);
	return text;
}

void check(const rocksdb::Status &status)
{
	if (!status.ok())
		fail("rocksdb: " + status.ToString());
}

// One table of all keys in order, which the database then takes as its own.
void load(rocksdb::DB *database, const rocksdb::Options &options, uint64_t keys, uint64_t seed)
{
	rocksdb::SstFileWriter writer(rocksdb::EnvOptions(), options);

	check(writer.Open(kTable));
	for (uint64_t number = 0; number < keys; number++)
		check(writer.Put(key(number), value(mix(seed, number))));
	check(writer.Finish());
	rocksdb::IngestExternalFileOptions move;
	move.move_files = true;
	check(database->IngestExternalFile({kTable}, move));
}

// Reads everything once, so that it is in the cache.
void warm(rocksdb::DB *database, uint64_t keys)
{
	uint64_t found = 0;
	std::unique_ptr<rocksdb::Iterator> all(database->NewIterator(rocksdb::ReadOptions()));

	for (all->SeekToFirst(); all->Valid(); all->Next())
		found++;
	check(all->status());
	if (found != keys)
		fail("rocksdb: keys are missing");
}

} // namespace

int main(int argc, char **argv)
{
	const Options options = parse(argc, argv);
	const uint64_t keys = options.bytes / kKeyBytes;
	rocksdb::BlockBasedTableOptions table;
	rocksdb::Options settings;
	rocksdb::DB *opened;

	// A quarter more than the data: its parts do not fill evenly.
	table.block_cache = rocksdb::NewLRUCache(options.bytes + options.bytes / 4, 2);
	settings.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
	settings.compression = rocksdb::kNoCompression;
	settings.create_if_missing = true;
	// The page cache would have everything once more.
	settings.use_direct_reads = true;
	check(rocksdb::DestroyDB(kDatabase, settings));
	check(rocksdb::DB::Open(settings, kDatabase, &opened));
	const std::unique_ptr<rocksdb::DB> database(opened);
	load(database.get(), settings, keys, options.seed);
	warm(database.get(), keys);

	rocksdb::WriteOptions quick;
	quick.disableWAL = true;
	const std::string version = "rocksdb " + rocksdb::GetRocksVersionAsString();
	serve(keys, version, [&](const std::string &command, std::istringstream &words) -> uint64_t {
		if (command == "write") {
			uint64_t number, content;
			words >> number >> content;
			check(database->Put(quick, key(number), value(content)));
			return 0;
		}
		uint64_t digest = 0;
		for (uint64_t number; words >> number;) {
			rocksdb::PinnableSlice found;
			check(database->Get(rocksdb::ReadOptions(), database->DefaultColumnFamily(),
					    key(number), &found));
			if (found.size() != kValue)
				fail("rocksdb: a value has another size");
			for (unsigned byte = 0; byte < 8; byte++)
				digest = mix(digest, static_cast<unsigned char>(found[byte]));
		}
		return digest;
	});
	check(database->Close());
}
