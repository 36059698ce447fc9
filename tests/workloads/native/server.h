// What the servers have in common: a random sequence that the seed decides, and
// lines in and out.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>

// The finisher of splitmix64.
inline uint64_t mix(uint64_t seed, uint64_t index)
{
	uint64_t value = seed + index * 0x9e3779b97f4a7c15u;

	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

struct Options {
	uint64_t bytes;
	uint64_t seed;
};

inline Options parse(int argc, char **argv)
{
	if (argc != 3) {
		std::fprintf(stderr, "usage: %s MIB SEED\n", argv[0]);
		std::exit(2);
	}
	return {std::strtoull(argv[1], nullptr, 10) << 20, std::strtoull(argv[2], nullptr, 10)};
}

[[noreturn]] inline void fail(const std::string &what)
{
	std::cerr << what << std::endl;
	std::exit(1);
}

// Says that the data is there, then answers every line with what `handle`
// makes of its words, until there are no more.
template <typename Handle>
void serve(uint64_t size, const std::string &version, Handle handle)
{
	std::cout << "loaded " << size << ' ' << version << std::endl;
	for (std::string line; std::getline(std::cin, line);) {
		std::istringstream words(line);
		std::string command;
		words >> command;
		const uint64_t answer = handle(command, words);
		std::cout << answer << std::endl;
	}
}
