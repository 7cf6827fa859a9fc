// How bytes reach one peer and come from it: what the messages of streams.cpp are moved over.
//
// A channel never waits: it moves what it can now. What is written arrives in order.
#pragma once

#include <cstdint>

namespace flashcomm {

enum class Failure { none, deadline, died, gave_up, mismatch, interrupted, closed };

class Channel {
   public:
    virtual ~Channel() = default;

    // Bytes that went, at most `bytes`; 0 if none can now. `more`: others follow at once, so that the peer need not
    // be told yet.
    virtual uint64_t write(const uint8_t* from, uint64_t bytes, bool more) = 0;

    // Bytes that came, at most `bytes`; 0 if there are none now.
    virtual uint64_t read(uint8_t* to, uint64_t bytes) = 0;

    // Why the peer will neither write nor read any more; asked when nothing moves. What it wrote before can be read.
    virtual Failure state() = 0;

    // Tell the peer that this rank will neither write nor read any more.
    virtual void give_up() = 0;

    // What poll() can wait for; -1: the peer rings this rank's doorbell.
    virtual int descriptor() const { return -1; }
};

}  // namespace flashcomm
