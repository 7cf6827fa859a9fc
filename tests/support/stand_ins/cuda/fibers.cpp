#include "fibers.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

using flashcomm::emulated::kWarp;

namespace fibers {

uint64_t (*nanoseconds)();
void (*polled)(const uint64_t*, uint64_t) = [](const uint64_t*, uint64_t) {};
void (*fetched)(const void*) = [](const void*) {};

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kGuard = 64;
constexpr uint8_t kUnused = 0xA5;

Fiber* current;
jmp_buf scheduler;
auto& idle = *new std::vector<std::unique_ptr<Fiber>>;  // of blocks that ended, for those to come

[[noreturn]] void stop(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::abort();
}

// The return addresses of all calls that led here, folded into one number. Needs -fno-omit-frame-pointer, and
// -fno-thread-jumps: the compiler would make two copies of a barrier behind a condition it has seen before.
size_t site() {
    size_t found = 0;
    const char* stack = current->stack.get();
    for (void** frame = (void**)__builtin_frame_address(0);;) {
        found = found * 31 + (size_t)frame[1];
        void** outer = (void**)frame[0];
        if (outer <= frame || (char*)outer < stack || (char*)(outer + 2) > stack + kStack) return found;
        frame = outer;
    }
}

// Jumps, for they cost no system call: contexts only serve to get onto a stack.
void pause(decltype(Fiber::state) state) {
    current->state = state;
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}
void resume(Fiber& fiber) {
    current = &fiber;
    fiber.state = Fiber::kRunning;
    if (!_setjmp(scheduler)) _longjmp(fiber.place, 1);
}

void live() {
    for (;;) {
        pause(Fiber::kEnded);
        current->block->body();
    }
}

std::unique_ptr<Fiber> a_fiber() {
    if (!idle.empty()) {
        auto found = std::move(idle.back());
        idle.pop_back();
        return found;
    }
    auto made = std::make_unique<Fiber>();
    made->stack.reset(new char[kStack]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = made->stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, live, 0);
    current = made.get();
    if (!_setjmp(scheduler)) setcontext(&context);
    return made;
}

// Lets warps go on whose lanes have all come to an exchange. A lane that is elsewhere would hang a GPU.
bool open_warps(Block& block) {
    bool opened = false;
    for (size_t first = 0; first < block.fibers.size(); first += kWarp) {
        int waiting = 0, stuck = 0;
        for (int lane = 0; lane < kWarp; lane++) {
            const auto state = block.fibers[first + lane]->state;
            waiting += state == Fiber::kWarp, stuck += state == Fiber::kBarrier || state == Fiber::kEnded;
        }
        if (waiting && stuck) stop("some lanes of a warp exchange and others never will");
        if (waiting < kWarp) continue;
        for (int lane = 1; lane < kWarp; lane++)
            if (block.fibers[first + lane]->site != block.fibers[first]->site)
                stop("lanes of a warp exchange at different places of the program");
        for (int lane = 0; lane < kWarp; lane++) block.fibers[first + lane]->state = Fiber::kRunning;
        opened = true;
    }
    return opened;
}

}  // namespace

Block::Block(std::function<void()> body, int64_t index, int64_t count, int threads)
    : body(std::move(body)), index(index), count(count), shared(kSharedBytes + kGuard, kUnused) {
    for (int i = 0; i < threads; i++) {
        fibers.push_back(a_fiber());
        Fiber& fiber = *fibers.back();
        fiber.block = this, fiber.thread = i, fiber.state = Fiber::kRunning;
    }
}

Block::~Block() {
    for (auto& fiber : fibers)
        if (fiber->state == Fiber::kEnded) idle.push_back(std::move(fiber));
}

bool Block::ended() const {
    for (const auto& fiber : fibers)
        if (fiber->state != Fiber::kEnded) return false;
    return true;
}

bool Block::step() {
    bool at_barrier = true, found = false;
    const size_t last = fibers.size() - 1;
    backward = !backward;
    for (size_t i = 0; i <= last; i++) {
        Fiber& fiber = *fibers[backward ? last - i : i];
        if (fiber.state == Fiber::kBarrier || fiber.state == Fiber::kEnded || fiber.state == Fiber::kWarp) continue;
        const bool polled = fiber.state == Fiber::kPolling;
        resume(fiber);
        at_barrier &= fiber.state != Fiber::kPolling;
        found |= !polled || fiber.state != Fiber::kPolling;
    }
    for (int i = 0; i < kGuard; i++)
        if (shared[kSharedBytes + i] != kUnused) stop("a write behind the end of shared memory");
    if (open_warps(*this)) return true;
    if (!at_barrier) return found;
    const Fiber* one = nullptr;  // of those at the barrier
    for (auto& fiber : fibers) {
        if (fiber->state != Fiber::kBarrier) continue;
        if (one && one->site != fiber->site) stop("threads of a block wait at different barriers");
        one = fiber.get();
    }
    result = all;
    all = true;
    for (auto& fiber : fibers)
        if (fiber->state == Fiber::kBarrier) fiber->state = Fiber::kRunning;
    return true;
}

}  // namespace fibers

// ---- what device.h declares ------------------------------------------------------------------------------------

namespace flashcomm::emulated {

using namespace fibers;

int thread() { return current->thread; }
int64_t block_index() { return current->block->index; }
int64_t block_count() { return current->block->count; }
void sync() {
    current->site = site();
    pause(Fiber::kBarrier);
}
bool sync_and(bool mine) {
    current->site = site();
    current->block->all &= mine;
    pause(Fiber::kBarrier);
    return current->block->result;
}
// Each lane shows its words and waits once: a lane is never more than one exchange ahead, so two places are enough.
static const Fiber& other(int lane) { return *current->block->fibers[current->thread / kWarp * kWarp + lane]; }
void exchange(const float (&mine)[8], int stride, float (&theirs)[8]) {
    current->site = site();
    const int turn = current->turn ^= 1;
    std::memcpy(current->shown[turn], mine, sizeof mine);
    pause(Fiber::kWarp);
    std::memcpy(theirs, other((current->thread ^ stride) % kWarp).shown[turn], sizeof mine);
}
uint32_t exchange(uint32_t mine, int stride) {
    float shown[8] = {float_of(mine)}, theirs[8];
    exchange(shown, stride, theirs);
    return bits_of(theirs[0]);
}
uint32_t votes(bool mine) {
    current->site = site();
    const int turn = current->turn ^= 1;
    current->shown[turn][0] = mine;
    pause(Fiber::kWarp);
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; lane++) votes |= (uint32_t)other(lane).shown[turn][0] << lane;
    return votes;
}
uint8_t* shared_memory() { return current->block->shared.data(); }
// The other end may be another process.
uint64_t load_relaxed(const uint64_t* word) {
    pause(Fiber::kPolling);
    const uint64_t value = __atomic_load_n(word, __ATOMIC_RELAXED);
    polled(word, value);
    return value;
}
void fence_acquire() { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
void rest(uint32_t) {}
void store_release(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
uint64_t swap_if(uint64_t* word, uint64_t expected, uint64_t value) {
    __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return expected;
}
uint32_t count_up(uint32_t* word) { return __atomic_fetch_add(word, 1, __ATOMIC_ACQ_REL); }
uint64_t nanoseconds() {
    pause(Fiber::kPolling);
    return fibers::nanoseconds();
}
Vec16 load_fresh(const Vec16* at) {
    fetched(at);
    return *at;
}

}  // namespace flashcomm::emulated
