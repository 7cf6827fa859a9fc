// Fuzz target: one rank of the streams, whose peer's shared memory holds anything at all and keeps changing.
//
// The peer's segment, counters and rings alike, is the input. Whatever it says, this rank touches its own messages and the
// rings only, and every wait ends. Messages are heap blocks of exactly their size.
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

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 4) return 0;
    Segment mine, theirs;
    Streams streams(0, {End{(std::uintptr_t)mine.start}, End{(std::uintptr_t)theirs.start}}, kCapacity);
    const size_t sent = data[0] * 3, awaited = data[1] * 3, scribbles = data[2] % 8;
    data += 3, size -= 3;
    for (size_t turn = 0; turn <= scribbles; turn++) {
        uint8_t *out = (uint8_t*)std::malloc(sent + 1) + 1, *in = (uint8_t*)std::malloc(awaited + 1) + 1;
        std::memset(out, 7, sent);
        const size_t part = size * turn / (scribbles + 1), bytes = std::min(size - part, theirs.bytes);
        std::memcpy(theirs.start, data + part, bytes);  // from the peer's header on: doorbell, counters, ring
        const auto handle = streams.start({{0, 0}, {(std::uintptr_t)out, sent}}, {{0, 0}, {(std::uintptr_t)in, awaited}},
                                          1 + turn % 2, turn % 2 ? "all_reduce" : "all_gather");
        const bool arrived = streams.wait(handle, 0).failure == Failure::none;
        if (!arrived && streams.wait(handle, 0).failure == Failure::none) std::abort();  // the first failure stays
        std::free(out - 1), std::free(in - 1);
    }
    return 0;
}
