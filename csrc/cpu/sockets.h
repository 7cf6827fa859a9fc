// A channel to a process of another machine: one TCP connection, which the caller has opened and closes again.
//
// The kernel sends and receives while a rank computes, as far as its buffers reach. A process that ends, and a rank that
// gives up, close their side; a cable that is cut shows as silence, which the deadline of streams.cpp ends.
#pragma once

#include <vector>

#include "cpu/channel.h"

namespace flashcomm {

class Socket final : public Channel {
   public:
    explicit Socket(int descriptor);

    uint64_t write(const uint8_t* from, uint64_t bytes, bool more) override;
    uint64_t read(uint8_t* to, uint64_t bytes) override;
    Failure state() override;
    void give_up() override;
    int descriptor() const override { return descriptor_; }

   private:
    const int descriptor_;
    bool broken_ = false;  // an error was returned, which no later call may repeat
};

struct Awaited {  // of a socket: bytes to come, room to write
    int descriptor;
    bool to_read, to_write;
};

// Sleep until one of them is there, at most `nanoseconds`.
void wait_for_sockets(const std::vector<Awaited>& sockets, long nanoseconds);

}  // namespace flashcomm
