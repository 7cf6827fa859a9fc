// Runs the fused collectives of csrc/ in an order drawn from a seed: fibers for threads, blocks of all ranks in turn.
//
// stand_ins/cuda runs the same kernels, and the codec's, below the host code as it is, each stream's blocks in turn. Only
// here do ranks overtake each other by whole rounds and calls, repeatably. fibers.h has the rest and what this cannot
// show. tests/support/emulator.py builds this and calls the functions at the end.
#include "stand_ins/cuda/fibers.h"

#include <algorithm>
#include <deque>
#include <map>
#include <random>

#include "cuda/collectives.h"
#include "cuda/instances.h"

using namespace flashcomm;
using namespace flashcomm::emulated;

namespace {

using fibers::Block, fibers::kSharedBytes;

uint64_t clock_now;  // passes with every step
const bool clock_set = (fibers::nanoseconds = [] { return clock_now; }, true);

struct World {
    Capacity capacity;
    std::vector<std::vector<uint8_t>> inboxes, own;
    std::vector<Control> controls;
    std::vector<uint64_t> host_errors;
    // What was seen of a rank: how often it polled a flag; how often one that it had seen to be there, in calls of one
    // exchange; sources whose payloads it read, a bit each; when the late ranks began, or at the end, those and what it had announced.
    std::vector<uint64_t> polls{}, again{}, read{}, read_early{}, announced_early{};
    std::map<const uint64_t*, uint64_t> flags{};  // that have been read: what was in them
};

World* watched;  // the world that runs

// The rank whose inbox `at` is in, and how far; or -1.
int inbox_of(const World& world, const void* at, int64_t* offset) {
    for (int rank = 0; rank < world.capacity.world; rank++) {
        *offset = (const uint8_t*)at - world.inboxes[rank].data();
        if (*offset >= 0 && *offset < (int64_t)world.inboxes[rank].size()) return rank;
    }
    return -1;
}

void watch_poll(const uint64_t* word, uint64_t value) {
    int64_t offset;
    const int rank = inbox_of(*watched, word, &offset);
    if (rank < 0) return;
    uint64_t& seen = watched->flags.try_emplace(word, watched->controls[rank].epoch).first->second;
    watched->polls[rank]++;
    watched->again[rank] += seen > watched->controls[rank].epoch;
    seen = value;
}

void watch_fetch(const void* at) {
    int64_t offset;
    const int rank = inbox_of(*watched, at, &offset);
    if (rank < 0) return;
    const Capacity& capacity = watched->capacity;
    watched->read[rank] |= 1ull << (offset - Inbox::kFlagBytes) / capacity.region % capacity.world;
}

void note_early(World& world) {
    world.read_early = world.read;
    for (int source = 0; source < world.capacity.world; source++)
        for (const auto& inbox : world.inboxes) {
            const uint64_t flag = *(const uint64_t*)(inbox.data() + Inbox::flag(source, 0));
            world.announced_early[source] = std::max(world.announced_early[source], flag);
        }
}

const bool watch_set = (fibers::polled = watch_poll, fibers::fetched = watch_fetch, true);

bool step(Block& block) {
    clock_now += 100;
    return block.step();
}

}  // namespace

extern "C" {

// One collective as tests/support/emulator.py passes it.
struct Job {
    int kind;
    Setting reduce, gather;
    int dtype;
    int64_t numel, slice;
    void* x[kMaxWorld];
    void* out[kMaxWorld];
    void* residuals[kLegs][kMaxWorld];
    int stalled_rank, single_buffer;
    uint64_t stall, deadline;
};

World* world_new(int world, int blocks, int64_t region, uint64_t epoch) {
    World* made = new World{{world, blocks, region}, {}, {}, {}, std::vector<uint64_t>(world)};
    const Inbox inbox{world, region};
    for (int rank = 0; rank < world; rank++) {
        made->inboxes.emplace_back(inbox.bytes(), 0);
        made->own.emplace_back(inbox.own_bytes(), 0);
        uint64_t* flags = (uint64_t*)made->inboxes.back().data();
        for (int64_t i = 0; i < Inbox::kFlagBytes / 8; i++) flags[i] = epoch;
        made->controls.push_back({epoch, 0, &made->host_errors[rank], 0});
    }
    return made;
}
void world_free(World* world) { delete world; }
uint64_t world_error(const World* world, int rank) { return world->host_errors[rank]; }
uint64_t world_epoch(const World* world, int rank) { return world->controls[rank].epoch; }
uint64_t world_polls(const World* world, int rank) { return world->polls[rank]; }
uint64_t world_polls_again(const World* world, int rank) { return world->again[rank]; }
uint64_t world_read_early(const World* world, int rank) { return world->read_early[rank]; }
uint64_t world_announced_early(const World* world, int rank) { return world->announced_early[rank]; }

// How a job is cut; false: no kernel for these legs, or too little shared memory for it.
bool shape(const World* world, const Job* job, Shape* shape) {
    bool fits = false;
    with_legs(job->reduce, job->gather, job->dtype, job->residuals[0][0], [&](auto reduce, auto gather, auto type) {
        using T = typename decltype(type)::type;
        using W = Worker<typename decltype(reduce)::type, typename decltype(gather)::type, T>;
        *shape = W::shape((Collective)job->kind, job->numel, job->slice, world->capacity, job->reduce, job->gather);
        fits = shape->tile && W::shared_bytes(*shape, job->reduce, job->gather) <= kSharedBytes;
    });
    return fits;
}

// Runs `count` jobs on every rank, each rank's in order, ranks and blocks in an order drawn from the seed. A rank in
// `absent` (a bit mask) never starts; one in `late` when all others do nothing but wait for it. 0, or -1 where a job has
// no kernel.
int run(World* world, const Job* jobs, int count, unsigned seed, unsigned absent, unsigned late) {
    struct Rank {
        int job = -1;
        std::deque<Block> blocks;
        Call call;
    };
    std::vector<Rank> ranks(world->capacity.world);
    std::mt19937 random(seed);
    watched = world;
    world->flags.clear();
    for (auto* each : {&world->polls, &world->again, &world->read, &world->read_early, &world->announced_early})
        each->assign(world->capacity.world, 0);
    int waits = 0;  // steps in a row that found nothing to do

    auto begin = [&](int r) {
        Rank& rank = ranks[r];
        const Job& job = jobs[rank.job];
        Call& call = rank.call;
        call = {};
        if (!shape(world, &job, &call.shape)) return false;
        call.kind = (Collective)job.kind;
        call.world = world->capacity.world, call.first = r, call.ranks = 1;
        call.reduce = job.reduce, call.gather = job.gather;
        call.region = world->capacity.region, call.deadline = job.deadline;
        call.x[0] = job.x[r], call.out[0] = job.out[r], call.control[0] = &world->controls[r];
        call.own[0] = world->own[r].data();
        for (int leg = 0; leg < kLegs; leg++) call.residuals[leg][0] = job.residuals[leg][r];
        for (int peer = 0; peer < call.world; peer++) call.inbox[peer] = world->inboxes[peer].data();
        call.stalled_rank = job.stalled_rank, call.stall = job.stall, call.single_buffer = job.single_buffer;
        rank.blocks.clear();
        for (int b = 0; b < call.shape.blocks; b++) {
            with_legs(job.reduce, job.gather, job.dtype, job.residuals[0][0], [&](auto reduce, auto gather, auto type) {
                using W = Worker<typename decltype(reduce)::type, typename decltype(gather)::type,
                                 typename decltype(type)::type>;
                rank.blocks.emplace_back([&call] { W::hire(call).run(); }, b, call.shape.blocks, kThreads);
            });
        }
        return true;
    };

    for (;;) {
        std::vector<std::pair<int, int>> ready;
        for (int r = 0; r < (int)ranks.size(); r++) {
            Rank& rank = ranks[r];
            if ((absent | late) >> r & 1) continue;
            bool ended = true;
            for (Block& block : rank.blocks) ended &= block.ended();
            if (ended && rank.job + 1 < count) {
                rank.job++;
                if (!begin(r)) return -1;
                ended = false;
            }
            for (int b = 0; b < (int)rank.blocks.size() && !ended; b++)
                if (!rank.blocks[b].ended()) ready.push_back({r, b});
        }
        if (late && (ready.empty() || waits > 1000)) {
            note_early(*world);
            late = 0;
            continue;
        }
        if (ready.empty()) {
            if (world->announced_early == std::vector<uint64_t>(world->capacity.world)) note_early(*world);
            return 0;
        }
        const auto [r, b] = ready[random() % ready.size()];
        Block& block = ranks[r].blocks[b];
        for (int steps = 1 + (int)(random() % 40); steps && !block.ended(); steps--) waits = step(block) ? 0 : waits + 1;
    }
}

// The rules by name, for the model to compare itself with.
int rule_region(uint64_t exchange) { return region_of(exchange); }
bool rule_reached(uint64_t seen, uint64_t wanted) { return reached(seen, wanted); }
}
