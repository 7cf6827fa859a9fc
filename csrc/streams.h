// Byte streams between the processes of one machine: a ring in shared memory for every ordered pair of ranks.
//
// Rank s owns one segment: a header and, for every other rank d, a ring that s writes and d reads. `written` and
// `taken` count bytes since the beginning, so a ring is empty when they are equal and full when they differ by its
// capacity; only s stores the first, only d the second. A message is a frame (length and what it is) and its bytes.
//
// Messages to one peer queue up and move in order, whenever any rank's thread is inside start() or wait(). So any
// number may be under way, in any pattern, as long as both ends of a pair post theirs in the same order. A rank of
// several groups moves the messages of all while it waits in one, or ranks could wait for each other in a circle.
//
// A rank with nothing to do spins, then sleeps on its own doorbell. Sequentially consistent stores and loads make sure
// that either the sleeper sees the bytes or the writer sees the sleeper. Nobody waits for ever: a deadline passes, a
// peer says it gave up, or its lock on its segment is gone, which the kernel sees to however it died.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace flashcomm {

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

struct Frame {
    uint64_t bytes;
    char what[56];  // kind, call number, shape and dtype: the same on every rank, or something is wrong
};

struct Posting {  // of start(): one for every rank, empty where nothing is sent or awaited
    std::uintptr_t address;
    uint64_t bytes;
};

enum class Failure { none, deadline, died, gave_up, mismatch, interrupted };

struct Outcome {
    Failure failure = Failure::none;
    int peer = -1;
    std::string theirs;  // of a mismatch: the frame that came
};

class Streams {
   public:
    struct Exchange {  // what one start() posted
        int open = 0;  // messages not finished
    };
    using Handle = std::shared_ptr<Exchange>;

    // segments[r]: where rank r's segment lies here, zeroed by its owner; 0: r is not reached this way.
    // locks[r]: descriptor of r's segment, whose owner holds a lock on it; -1: unknown.
    Streams(int rank, std::vector<std::uintptr_t> segments, std::vector<int> locks, uint64_t capacity);

    ~Streams();

    static uint64_t segment_bytes(int world, uint64_t capacity);

    // Post messages and move what can be moved at once. The memory must stay untouched until wait() says so.
    Handle start(const std::vector<Posting>& sends, const std::vector<Posting>& receives, const std::string& what);

    // Move bytes until everything that `handle` posted has arrived and left, or `seconds` passed without any movement.
    // The first failure is kept: the streams are out of step from then on.
    // `interrupted` is asked now and then whether the user wants to stop; the streams stay usable if so.
    Outcome wait(const Handle& handle, double seconds, bool (*interrupted)() = nullptr);

   private:
    struct Message {
        Frame frame, arrived;
        uint8_t* data;
        uint64_t done;  // bytes of frame and data
        Handle owner;
    };
    struct Peer {
        SegmentHeader* header = nullptr;
        int lock = -1;
        Ring *out = nullptr, *in = nullptr;
        uint8_t *out_data = nullptr, *in_data = nullptr;
        std::deque<Message> sends, receives;
    };

    bool progress();
    bool progress_of_other_groups();
    bool push(Peer& peer);
    bool pull(Peer& peer, int rank);
    bool is_open(const Handle& handle) const { return handle->open && first_.failure == Failure::none; }
    void fail(Failure failure, int peer, std::string theirs = "");
    void ring(Peer& peer);
    void check_peers();
    void give_up();
    void sleep();

    const uint64_t capacity_;
    bool crowded_;  // more ranks than cores: spinning would keep the one waited for from running
    SegmentHeader* mine_;
    std::vector<Peer> peers_;
    std::mutex mutex_;
    std::chrono::steady_clock::time_point moved_;  // when bytes last did
    Outcome first_;
};

}  // namespace flashcomm
