// Fuzz target: one rank of the streams, whose peer's shared memory holds anything at all and keeps changing, or whose
// connection brings anything at all.
//
// The peer's segment, counters and rings alike, is the input; or what it sends is. Whatever it says, this rank touches its
// own messages and the rings only, and every wait ends. Messages are heap blocks of exactly their size.
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "cpu/streams.h"

using namespace flashcomm;

namespace {

constexpr uint64_t kCapacity = 256;

struct Segment {
    size_t bytes = segment_bytes(2, kCapacity);
    uint8_t* start = (uint8_t*)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    Segment() { std::memset(start, 0, bytes); }
    ~Segment() { std::free(start); }
    Segment(const Segment&) = delete;
};

struct Pair {
    int ends[2] = {-1, -1};
    Pair() {
        if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends)) std::abort();
    }
    ~Pair() { ::close(ends[0]), ::close(ends[1]); }
    Pair(const Pair&) = delete;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 4) return 0;
    Segment mine, theirs;
    Pair pair;
    const bool near = data[2] & 8;
    const End peer = near ? End{(std::uintptr_t)theirs.start} : End{0, -1, pair.ends[0]};
    Streams streams(0, {End{(std::uintptr_t)mine.start}, peer}, kCapacity);
    const size_t sent = data[0] * 3, awaited = data[1] * 3, scribbles = data[2] % 8;
    data += 3, size -= 3;
    for (size_t turn = 0; turn <= scribbles; turn++) {
        uint8_t *out = (uint8_t*)std::malloc(sent + 1) + 1, *in = (uint8_t*)std::malloc(awaited + 1) + 1;
        std::memset(out, 7, sent);
        const size_t part = size * turn / (scribbles + 1), bytes = std::min(size - part, theirs.bytes);
        std::memcpy(theirs.start, data + part, bytes);  // from the peer's header on: doorbell, counters, ring
        if (!near && ::send(pair.ends[1], data + part, bytes, MSG_DONTWAIT) < 0) break;
        const auto handle = streams.start({{0, 0}, {(std::uintptr_t)out, sent}}, {{0, 0}, {(std::uintptr_t)in, awaited}},
                                          turn % 2 ? "#2 all_reduce" : "#1 all_gather");
        const bool arrived = streams.wait(handle, 0).failure == Failure::none;
        if (!arrived && streams.wait(handle, 0).failure == Failure::none) std::abort();  // the first failure stays
        std::free(out - 1), std::free(in - 1);
    }
    return 0;
}
