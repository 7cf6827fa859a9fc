// Ranks as threads over ordinary memory, for the sanitizers: csrc/cpu/streams.cpp as it is, with no process, no Python and
// no shared memory around it. Thread and address sanitizers see every access of every rank, which they cannot across
// processes.
//
//     streams_threads ROUNDS SEED
//
// Every round draws a world, a ring capacity, how many exchanges are under way at once and the size of every message; ranks wait in orders of their own and check every byte. Half the rounds put each rank into two groups
// at once.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "cpu/streams.h"

using namespace flashcomm;

namespace {

[[noreturn]] void stop(const char* what, int rank) {
    std::fprintf(stderr, "rank %d: %s\n", rank, what);
    std::exit(1);
}

uint8_t byte_of(int source, int to, int turn, size_t i) { return (uint8_t)(i * 7 + source * 31 + to * 17 + turn * 5); }

struct Group {
    int world;
    uint64_t capacity;
    std::vector<std::vector<uint64_t>> memory;  // as words, for the alignment of atomics
    std::vector<End> ends;                      // by rank

    Group(int world, uint64_t capacity) : world(world), capacity(capacity) {
        for (int r = 0; r < world; r++) {
            memory.emplace_back(segment_bytes(world, capacity) / 8 + 8);
            ends.push_back({((std::uintptr_t)memory.back().data() + 63) / 64 * 64});
        }
    }
    Group(const Group&) = delete;
};

struct Plan {  // the same for all ranks
    std::vector<Group*> groups;
    int turns;
    unsigned seed;
    uint64_t largest;

    size_t size(int group, int turn, int source, int to) const {
        std::mt19937 random(seed + 1000003u * group + 10007u * turn + 101u * source + to);
        return random() % 4 ? random() % largest : 0;
    }
};

struct Turn {
    int group;
    Streams::Handle handle;
    std::vector<std::vector<uint8_t>> sends, receives;
};

Turn start(Streams& streams, const Plan& plan, int group, int turn, int rank) {
    Turn now{group, {}, {}, {}};
    std::vector<Posting> out, in;
    for (int r = 0; r < plan.groups[group]->world; r++) {
        now.sends.emplace_back(plan.size(group, turn, rank, r));
        now.receives.emplace_back(plan.size(group, turn, r, rank));
        for (size_t i = 0; i < now.sends[r].size(); i++) now.sends[r][i] = byte_of(rank, r, turn, i);
        out.push_back({(std::uintptr_t)now.sends[r].data(), now.sends[r].size()});
        in.push_back({(std::uintptr_t)now.receives[r].data(), now.receives[r].size()});
    }
    now.handle = streams.start(out, in, turn, "turn");
    return now;
}

void run(const Plan& plan, int rank) {
    std::vector<std::unique_ptr<Streams>> streams;
    for (Group* group : plan.groups)
        streams.push_back(std::make_unique<Streams>(rank, group->ends, group->capacity));
    std::vector<std::pair<int, Turn>> under_way;
    for (int turn = 0; turn < plan.turns; turn++)
        for (size_t g = 0; g < plan.groups.size(); g++)
            under_way.emplace_back(turn, start(*streams[g], plan, (int)g, turn, rank));
    std::mt19937 random(plan.seed + rank);
    std::shuffle(under_way.begin(), under_way.end(), random);
    for (auto& [turn, now] : under_way) {
        if (streams[now.group]->wait(now.handle, 60).failure != Failure::none) stop("a wait failed", rank);
        for (int r = 0; r < plan.groups[now.group]->world; r++)
            for (size_t i = 0; r != rank && i < now.receives[r].size(); i++)
                if (now.receives[r][i] != byte_of(r, rank, turn, i)) stop("a byte arrived changed", rank);
    }
}

void round_of_messages(unsigned seed) {
    std::mt19937 random(seed);
    const int world = 2 + random() % 3;
    const uint64_t capacity = 64ull << random() % 8;
    std::vector<std::unique_ptr<Group>> groups;
    Plan plan{{}, 1 + (int)(random() % 4), seed, 1 + capacity * (1 + random() % 4)};
    for (unsigned g = 0; g < 1 + random() % 2; g++) {
        groups.push_back(std::make_unique<Group>(world, capacity));
        plan.groups.push_back(groups.back().get());
    }
    std::vector<std::thread> ranks;
    for (int r = 0; r < world; r++) ranks.emplace_back(run, std::cref(plan), r);
    for (std::thread& each : ranks) each.join();
}

}  // namespace

int main(int count, char** words) {
    const int rounds = count > 1 ? std::atoi(words[1]) : 20, seed = count > 2 ? std::atoi(words[2]) : 1;
    for (int i = 0; i < rounds; i++) round_of_messages(seed * 7919u + i);
    std::printf("%d rounds\n", rounds);
}
