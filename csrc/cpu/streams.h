// Messages between the ranks of a group: in any pattern, any number under way, each wait bounded.
//
// A message is a frame (length, call number and what it is) and its bytes, moved through shared memory (ring.h).
// Messages to one peer queue up and move in order, whenever any rank's thread is inside start() or wait(); both ends of
// a pair post theirs in the same order. A rank of several groups moves the messages of all while it waits in one, or
// ranks could wait for each other in a circle.
//
// A rank with nothing to do spins, then sleeps. Nobody waits for ever: a deadline passes, a peer says it gave up, or is
// seen to be gone.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/ring.h"

namespace flashcomm {

struct Frame {
    uint64_t bytes, number;  // of the message; of the group's call
    char what[48];           // digest, kind, shape and dtype: the same on every rank, or something is wrong
};

struct Posting {  // of start(): one for every rank, empty where nothing is sent or awaited
    std::uintptr_t address;
    uint64_t bytes;
};

struct Outcome {
    Failure failure = Failure::none;
    int peer = -1;
    std::string theirs;  // of a mismatch: number and text of the frame that came
};

// Where one rank of the group is reached.
struct End {
    std::uintptr_t segment = 0;  // where its segment lies here, zeroed by its owner
    int lock = -1;               // descriptor of that segment, whose owner holds a lock on it; -1: unknown
};

class Streams {
public:
    struct Exchange {  // what one start() posted
        int open = 0;  // messages not finished
    };
    using Handle = std::shared_ptr<Exchange>;

    // ends[rank] is this rank's own.
    Streams(int rank, const std::vector<End>& ends, uint64_t capacity);

    ~Streams();

    // Post messages and move what can be moved at once. The memory must stay untouched until wait() says so.
    Handle start(const std::vector<Posting>& sends, const std::vector<Posting>& receives, uint64_t number,
                 const std::string& what);

    // Move bytes until everything that `handle` posted has arrived and left, or `seconds` passed without any movement.
    // The first failure is kept: the streams are out of step from then on.
    // `interrupted` is asked now and then whether the user wants to stop; the streams stay usable if so. They also do
    // when nothing moved for `patience` seconds: the outcome then is `impatient`, names a rank that is waited for, and
    // the caller may say so and wait again.
    Outcome wait(const Handle& handle, double seconds, bool (*interrupted)() = nullptr, double patience = 1e9);

private:
    struct Message {
        Frame frame, arrived;
        uint8_t* data;
        uint64_t done;  // bytes of frame and data
        Handle owner;
    };
    struct Peer {
        std::unique_ptr<Rings> rings;  // none to itself
        std::deque<Message> sends, receives;
        bool waits() const { return !sends.empty() || !receives.empty(); }
    };

    bool progress();
    bool progress_of_other_groups();
    bool push(Peer& peer);
    bool pull(Peer& peer, int rank);
    bool is_open(const Handle& handle) const { return handle->open && first_.failure == Failure::none; }
    void fail(Failure failure, int peer, std::string theirs = "");
    void check_peers();
    int slow() const;
    void sleep();

    SegmentHeader* mine_;
    bool spins_;  // a rank that waits may burn a core
    std::vector<Peer> peers_;
    std::mutex mutex_;
    std::chrono::steady_clock::time_point moved_;  // when bytes last did
    Outcome first_;
};

}  // namespace flashcomm
