// Threads of a GPU as fibers of one CPU thread: what runs the kernels of csrc/ on the host.
//
// A block's fibers run one after the other from barrier to barrier, forward and backward in turn, so that what should
// have waited for a barrier goes wrong; lanes of a warp wait for each other where they exchange, and the program stops if
// they, or the threads of a block at a barrier, did not come there by the same calls: a GPU would exchange garbage. A
// fiber that polls a flag or the clock gives way to other blocks. Which block goes on is up to the caller. The memory is the host's:
// addressing, arithmetic, barriers, flags, rounds and errors are checked here, the memory model and PTX are not.
#pragma once

#include <setjmp.h>

#include <functional>
#include <memory>
#include <vector>

#define FLASHCOMM_ISA emulated
#include "cuda/device.h"

namespace fibers {

constexpr int kSharedBytes = 48 * 1024;  // what a block gets without asking: more is an error on the device as well

struct Block;

struct Fiber {
    jmp_buf place;  // where it goes on
    std::unique_ptr<char[]> stack;
    Block* block = nullptr;
    int thread = 0;
    enum { kRunning, kBarrier, kWarp, kPolling, kEnded } state = kEnded;
    float shown[2][8];  // what other lanes may read, of this exchange and the last
    int turn = 0;
    size_t site = 0;  // the calls that led to the exchange or barrier it waits in
};

struct Block {
    Block(std::function<void()> body, int64_t index, int64_t count, int threads);
    Block(const Block&) = delete;
    ~Block();

    // Lets every thread go on until it waits; opens the barrier when all are there. False: all that did not wait for
    // a barrier polled, and found nothing.
    bool step();
    bool ended() const;

    std::function<void()> body;
    int64_t index, count;  // of the grid
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<uint8_t> shared;
    bool all = true, result = true, backward = false;
};

extern uint64_t (*nanoseconds)();  // the clock that kernels read
// Who watches memory that others write: is told of every poll of a flag, with what it read, and of every other read.
extern void (*polled)(const uint64_t* word, uint64_t value);
extern void (*fetched)(const void* at);

}  // namespace fibers
