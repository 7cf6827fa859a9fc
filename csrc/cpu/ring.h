// Two rings in shared memory between two processes of one machine, and a doorbell for who sleeps. Nothing here waits: it
// moves what it can now.
//
// Rank s owns one segment: a header and, for every other rank d, a ring that s writes and d reads. `written` and
// `taken` count bytes since the beginning, so a ring is empty when they are equal and full when they differ by its
// capacity; only s stores the first, only d the second.
//
// A rank with nothing to do sleeps on its own doorbell. Sequentially consistent stores and loads make sure that either
// the sleeper sees the bytes or the writer sees the sleeper. The owner of a segment holds a lock on it for as long as
// its process lives, which the kernel sees to however it dies.
#pragma once

#include <atomic>
#include <cstdint>

namespace flashcomm {

enum class Failure { none, deadline, died, gave_up, mismatch, interrupted, impatient };

struct alignas(64) Line {  // one counter to a cache line: the two ends of a ring store to different ones
    std::atomic<uint64_t> value;
};

struct SegmentHeader {
    alignas(64) std::atomic<uint32_t> doorbell;
    std::atomic<uint32_t> asleep;
    std::atomic<uint32_t> failed;
};

struct Ring {
    Line written, taken;
};

uint64_t segment_bytes(int world, uint64_t capacity);

// Sleep until the doorbell differs from `seen`, or some milliseconds have passed.
void wait_for_change(std::atomic<uint32_t>& doorbell, uint32_t seen);

class Rings {
public:
    // The segments of this rank and of the peer, mapped here; `lock`: descriptor of the peer's, -1: unknown.
    Rings(int rank, int peer, int world, uint8_t* mine, uint8_t* theirs, int lock, uint64_t capacity);

    // Bytes that went, at most `bytes`; 0 if none can now. `more`: others follow at once, so that the peer need not
    // be told yet.
    uint64_t write(const uint8_t* from, uint64_t bytes, bool more);

    // Bytes that came, at most `bytes`; 0 if there are none now.
    uint64_t read(uint8_t* to, uint64_t bytes);

    // Why the peer will neither write nor read any more; asked when nothing moves. What it wrote before can be read.
    Failure state() const;

    // Tell the peer that this rank will neither write nor read any more.
    void give_up();

private:
    void ring();

    const uint64_t capacity_;
    const int lock_;
    SegmentHeader *mine_, *theirs_;
    Ring *out_, *in_;
    uint8_t *out_data_, *in_data_;
};

}  // namespace flashcomm
