// Runs the CUDA kernels of csrc/ without a GPU: one fiber for each thread, blocks of all ranks in random order.
//
// A block's fibers run one after the other from barrier to barrier, forward and backward in turn, so that what should
// have waited for a barrier goes wrong; lanes of a warp wait for each other where they exchange; a fiber that polls a
// flag gives way to other blocks. Which block goes on is drawn from a seed, so ranks overtake each other by whole rounds and calls. The memory
// is sequentially consistent: addressing, arithmetic, barriers, flags, rounds and errors are checked here, the memory
// model and PTX are not. tests/emulator.py builds this and calls the functions at the end.
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define FLASHCOMM_ISA emulated
#include "../csrc/codec_kernels.h"
#include "../csrc/collectives.h"
#include "../csrc/instances.h"

namespace {

using flashcomm::emulated::kWarp;

constexpr size_t kStack = 128 * 1024;
constexpr int kSharedBytes = 48 * 1024;  // what a block gets without asking: more is an error on the device as well
constexpr int kGuard = 64;

struct Block;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    Block* block;
    int thread;
    enum { kRunning, kBarrier, kWarp, kPolling, kEnded } state = kRunning;
    float shown[2][8];  // what other lanes may read, of this exchange and the last
    int turn = 0;
};

struct Block {
    std::function<void()> body;
    int64_t index, count;
    std::deque<Fiber> fibers;
    std::vector<uint8_t> shared = std::vector<uint8_t>(kSharedBytes + kGuard, 0xA5);
    bool all = true, result = true, backward = false;
    bool ended() const {
        for (const Fiber& fiber : fibers)
            if (fiber.state != Fiber::kEnded) return false;
        return true;
    }
};

Fiber* current;
ucontext_t scheduler;
uint64_t clock_now;

void pause(decltype(Fiber::state) state) {
    current->state = state;
    swapcontext(&current->context, &scheduler);
}

void enter() {
    current->block->body();
    pause(Fiber::kEnded);
}

void start(Block& block, int threads) {
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = block.fibers.emplace_back();
        fiber.block = &block;
        fiber.thread = i;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
}

// Lets warps go on whose lanes have all come to an exchange. A lane that is elsewhere would hang a GPU.
bool open_warps(Block& block) {
    bool opened = false;
    for (size_t first = 0; first < block.fibers.size(); first += kWarp) {
        int waiting = 0, stuck = 0;
        for (int lane = 0; lane < kWarp; lane++) {
            const auto state = block.fibers[first + lane].state;
            waiting += state == Fiber::kWarp, stuck += state == Fiber::kBarrier || state == Fiber::kEnded;
        }
        if (waiting && stuck) std::abort();
        if (waiting < kWarp) continue;
        for (int lane = 0; lane < kWarp; lane++) block.fibers[first + lane].state = Fiber::kRunning;
        opened = true;
    }
    return opened;
}

// Lets every thread of the block go on until it waits; opens the barrier when all are there.
void step(Block& block) {
    bool at_barrier = true;
    const size_t last = block.fibers.size() - 1;
    block.backward = !block.backward;
    for (size_t i = 0; i <= last; i++) {
        Fiber& fiber = block.fibers[block.backward ? last - i : i];
        if (fiber.state == Fiber::kBarrier || fiber.state == Fiber::kEnded || fiber.state == Fiber::kWarp) continue;
        current = &fiber;
        fiber.state = Fiber::kRunning;
        swapcontext(&scheduler, &fiber.context);
        at_barrier &= fiber.state != Fiber::kPolling;
    }
    clock_now += 100;
    if (open_warps(block) || !at_barrier) return;
    block.result = block.all;
    block.all = true;
    for (Fiber& fiber : block.fibers)
        if (fiber.state == Fiber::kBarrier) fiber.state = Fiber::kRunning;
}

void check_guard(const Block& block) {
    for (int i = 0; i < kGuard; i++)
        if (block.shared[kSharedBytes + i] != 0xA5) std::abort();
}

}  // namespace

namespace flashcomm::emulated {

int thread() { return current->thread; }
int64_t block_index() { return current->block->index; }
int64_t block_count() { return current->block->count; }
void sync() { pause(Fiber::kBarrier); }
bool sync_and(bool mine) {
    current->block->all &= mine;
    pause(Fiber::kBarrier);
    return current->block->result;
}
// Each lane shows its words and waits once: a lane is never more than one exchange ahead, so two places are enough.
const Fiber& other(int lane) {
    const Fiber& found = current->block->fibers[current->thread / kWarp * kWarp + lane];
    return found;
}
void exchange(const float (&mine)[8], int apart, float (&theirs)[8]) {
    const int turn = current->turn ^= 1;
    std::memcpy(current->shown[turn], mine, sizeof mine);
    pause(Fiber::kWarp);
    std::memcpy(theirs, other((current->thread ^ apart) % kWarp).shown[turn], sizeof mine);
}
uint32_t exchange(uint32_t mine, int apart) {
    float shown[8] = {float_of(mine)}, theirs[8];
    exchange(shown, apart, theirs);
    return bits_of(theirs[0]);
}
uint32_t votes(bool mine) {
    const int turn = current->turn ^= 1;
    current->shown[turn][0] = mine;
    pause(Fiber::kWarp);
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; lane++) votes |= (uint32_t)other(lane).shown[turn][0] << lane;
    return votes;
}
uint8_t* shared_memory() { return current->block->shared.data(); }
uint64_t load_acquire(const uint64_t* word) {
    pause(Fiber::kPolling);
    return *word;
}
void store_release(uint64_t* word, uint64_t value) { *word = value; }
uint64_t swap_if(uint64_t* word, uint64_t expected, uint64_t value) {
    const uint64_t found = *word;
    if (found == expected) *word = value;
    return found;
}
uint32_t count_up(uint32_t* word) { return (*word)++; }
uint64_t nanoseconds() {
    pause(Fiber::kPolling);
    return clock_now;
}
Vec16 load_fresh(const Vec16* at) { return *at; }

}  // namespace flashcomm::emulated

using namespace flashcomm;
using namespace flashcomm::emulated;

namespace {

struct World {
    Capacity capacity;
    std::vector<std::vector<uint8_t>> inboxes, own;
    std::vector<Control> controls;
    std::vector<uint64_t> host_errors;
};

}  // namespace

extern "C" {

// One collective as tests/emulator.py passes it.
struct Job {
    int kind;
    Setting reduce, gather;
    int dtype;
    int64_t numel;
    void* x[kMaxWorld];
    void* out[kMaxWorld];
    void* lost[kLegs][kMaxWorld];
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

// How a job is cut; false: no kernel for these legs, or too little shared memory for it.
bool shape(const World* world, const Job* job, Shape* shape) {
    bool fits = false;
    with_legs(job->reduce, job->gather, job->dtype, job->lost[0][0], [&](auto reduce, auto gather, auto type) {
        using T = typename decltype(type)::type;
        using W = Worker<typename decltype(reduce)::type, typename decltype(gather)::type, T>;
        *shape = W::shape((Collective)job->kind, job->numel, world->capacity, job->reduce, job->gather);
        fits = shape->tile && W::shared_bytes(*shape, job->reduce, job->gather) <= kSharedBytes;
    });
    return fits;
}

// Runs `count` jobs on every rank, each rank's in order, ranks and blocks in an order drawn from the seed. A rank in
// `absent` (a bit mask) never starts. 0, or -1 where a job has no kernel.
int run(World* world, const Job* jobs, int count, unsigned seed, unsigned absent) {
    struct Rank {
        int job = -1;
        std::deque<Block> blocks;
        Call call;
    };
    std::vector<Rank> ranks(world->capacity.world);
    std::mt19937 random(seed);

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
        for (int leg = 0; leg < kLegs; leg++) call.lost[leg][0] = job.lost[leg][r];
        for (int peer = 0; peer < call.world; peer++) call.inbox[peer] = world->inboxes[peer].data();
        call.stalled_rank = job.stalled_rank, call.stall = job.stall, call.single_buffer = job.single_buffer;
        rank.blocks.clear();
        for (int b = 0; b < call.shape.blocks; b++) {
            Block& block = rank.blocks.emplace_back();
            block.index = b, block.count = call.shape.blocks;
            with_legs(job.reduce, job.gather, job.dtype, job.lost[0][0], [&](auto reduce, auto gather, auto type) {
                using W = Worker<typename decltype(reduce)::type, typename decltype(gather)::type,
                                 typename decltype(type)::type>;
                block.body = [&call] { W::hire(call).run(); };
            });
            start(block, kThreads);
        }
        return true;
    };

    for (;;) {
        std::vector<std::pair<int, int>> ready;
        for (int r = 0; r < (int)ranks.size(); r++) {
            Rank& rank = ranks[r];
            if (absent >> r & 1) continue;
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
        if (ready.empty()) return 0;
        const auto [r, b] = ready[random() % ready.size()];
        Block& block = ranks[r].blocks[b];
        for (int steps = 1 + (int)(random() % 40); steps && !block.ended(); steps--) step(block);
        check_guard(block);
    }
}

static void run_blocks(int64_t count, const std::function<void()>& body) {
    for (int64_t index = 0; index < count; index++) {
        Block block;
        block.body = body, block.index = index, block.count = count;
        start(block, kThreads);
        while (!block.ended()) step(block);
        check_guard(block);
    }
}

// The codec kernels; `blocks` is the grid. False where the block has no whole tile.
bool encode(const void* x, int dtype, int64_t numel, const Setting* with, int64_t blocks, uint8_t* payload,
            void* memory) {
    bool found = false;
    if (with->format == kUniformFormat) with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const int tile = tensor_tile<T>(numel, with->block, blocks);
        found = tile != 0;
        if (found) with_bits(with->bits, [&](auto width) {
            const TensorCodec<width.value, T> codec(numel, with->block, tile);
            run_blocks(blocks, [&] { codec.encode((const typename T::Word*)x, payload); });
        });
    });
    with_direct(with->format, dtype, memory, [&](auto tile, auto type) {
        using T = typename decltype(type)::type;
        const DirectCodec<typename decltype(tile)::type, T> codec(*with, numel, blocks);
        found = codec.tile != 0;
        if (found) run_blocks(blocks, [&] {
            codec.encode((const typename T::Word*)x, payload, (typename T::Word*)memory);
        });
    });
    return found;
}

bool decode_sum(const uint8_t* const* payloads, int count, int dtype, int64_t numel, const Setting* with,
                int64_t blocks, void* out) {
    bool found = false;
    Payloads all{};
    for (int p = 0; p < count; p++) all.at[p] = payloads[p];
    if (with->format == kUniformFormat) with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const int tile = tensor_tile<T>(numel, with->block, blocks);
        found = tile != 0;
        if (found) with_bits(with->bits, [&](auto width) {
            const TensorCodec<width.value, T> codec(numel, with->block, tile);
            run_blocks(blocks, [&] { codec.decode_sum(all, count, (typename T::Word*)out); });
        });
    });
    with_direct(with->format, dtype, false, [&](auto tile, auto type) {
        using T = typename decltype(type)::type;
        const DirectCodec<typename decltype(tile)::type, T> codec(*with, numel, blocks);
        found = codec.tile != 0;
        if (found) run_blocks(ceil_div(numel, kLeastTile), [&] {
            codec.decode_sum(all, count, (typename T::Word*)out);
        });
    });
    return found;
}

// The rules by name, for the model to compare itself with.
int rule_parity(uint64_t round) { return parity(round); }
bool rule_reached(uint64_t seen, uint64_t wanted) { return reached(seen, wanted); }
}
