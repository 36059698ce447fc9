// Trains a linear classifier, each time with another part of the examples.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include <linear.h>

#include "server.h"

namespace {

// Features of an example that are not 0.
constexpr unsigned kFeatures = 60;

// Different features: their weights, too, are spread over some MiB.
constexpr uint64_t kDimensions = 1 << 20;

// One in how many examples a training takes.
constexpr uint64_t kPart = 16;

} // namespace

int main(int argc, char **argv)
{
	const Options options = parse(argc, argv);
	// The last of an example's features has the number -1.
	const uint64_t examples = options.bytes / ((kFeatures + 1) * sizeof(feature_node));
	std::vector<feature_node> nodes(examples * (kFeatures + 1));
	std::vector<double> labels(examples);

	for (uint64_t example = 0; example < examples; example++) {
		feature_node *row = &nodes[example * (kFeatures + 1)];
		double sum = 0;
		int index = 0;
		for (unsigned at = 0; at < kFeatures; at++) {
			const uint64_t bits = mix(options.seed, example * kFeatures + at);
			// Ascending, as the library wants them, and spread evenly.
			index += 1 + bits % (2 * kDimensions / kFeatures - 2);
			row[at].index = std::min<int>(index, kDimensions - kFeatures + at);
			row[at].value = (bits >> 32) / 4294967296.0;
			// What there is to learn: every second feature speaks for a yes.
			sum += row[at].index % 2 ? row[at].value : -row[at].value;
		}
		row[kFeatures].index = -1;
		labels[example] = sum > 0 ? 1 : -1;
	}

	set_print_string_function([](const char *) {});
	char version[32];
	std::snprintf(version, sizeof version, "liblinear %d.%02d", liblinear_version / 100,
		      liblinear_version % 100);
	serve(examples, version, [&](const std::string &, std::istringstream &words) {
		uint64_t seed = 0;
		words >> seed;
		std::vector<feature_node *> rows;
		std::vector<double> chosen;
		for (uint64_t example = 0; example < examples; example++) {
			if (mix(seed, example) % kPart)
				continue;
			rows.push_back(&nodes[example * (kFeatures + 1)]);
			chosen.push_back(labels[example]);
		}
		problem part = {};
		part.l = static_cast<int>(rows.size());
		part.n = kDimensions;
		part.y = chosen.data();
		part.x = rows.data();
		part.bias = -1;
		parameter how = {};
		how.solver_type = L2R_L2LOSS_SVC_DUAL;
		how.eps = 0.5;
		how.C = 0.1;
		// The library shuffles with rand().
		std::srand(static_cast<unsigned>(seed));
		model *trained = train(&part, &how);
		uint64_t digest = 0;
		for (uint64_t at = 0; at < kDimensions; at++) {
			uint64_t bits;
			std::memcpy(&bits, &trained->w[at], sizeof bits);
			digest = mix(digest, bits);
		}
		free_and_destroy_model(&trained);
		return digest;
	});
}
