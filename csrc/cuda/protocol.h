// The rules by which ranks share inboxes. tests/support/protocol_model.py has the same rules under the same names,
// tries every interleaving of them, and shows that each is needed.
//
//     round       one pass over the inboxes: one exchange for every leg.
//     exchange    Exchanges are numbered through all calls of a workspace: a call of k of them is exchanges epoch + 1 ...
//                 epoch + k, and its last block to end advances the epoch. The epoch lives in device memory, so a
//                 replayed CUDA graph counts on.
//     inbox       what other ranks write into: one flag for every (block, source), a ring of four regions for every
//                 source. Exchange n of any kind and leg uses region n % 4. Offsets follow from the size of the
//                 workspace alone, never from a message. The flags a block waits for are one line of 64 bytes: its
//                 warp polls all sources with one read, also where the inbox lies behind PCIe.
//     announce    after a block has pushed all it has, it stores the exchange in its flag at every rank, also at ranks
//                 it had nothing for.
//     await       until the flag of the same block of one rank has reached the exchange: >=, since a fast peer may have
//                 announced the next one already; by signed difference, which survives wrap-around. A block awaits each
//                 source just before it reads the first of its payloads, and has awaited all before it announces again.
//     ahead       the first leg of the next round is pushed before the last leg of this round is awaited.
//
// Why nothing unread is overwritten: exchange n + 1 goes into the region of n - 3. Who pushes it has awaited n - 1, so
// every rank had announced n - 1; before it did, it had read n - 3 (working ahead, it may have announced n - 1 before it
// read n - 2, no earlier). Of a call that ended, its last exchange m was awaited, so m - 2 has been read by all, which is
// what the first two pushes of the next call need. Three regions would not do. No barrier at the end is needed.
//
// Flags have 64 bits because a block may idle: one that sits out 2**31 exchanges of small messages, some hours, would
// find its 32-bit flag in the future.
#pragma once

#include "format/codec.h"

namespace flashcomm::FLASHCOMM_ISA {

using Exchange = uint64_t;

constexpr int kMaxWorld = 8;
constexpr int kMaxBlocks = 512;        // of one rank; GPUs have fewer than 256 multiprocessors
constexpr int kRegions = 4;            // of a source in an inbox
constexpr int64_t kSlotBytes = 12288;  // the largest payload of a tile: 8192 codes of 8 bits in blocks of 8

enum Leg : int { kReduceLeg = 0, kGatherLeg = 1, kLegs = 2 };

FC_INLINE int region_of(Exchange exchange) { return (int)(exchange & (kRegions - 1)); }
FC_INLINE bool reached(Exchange seen, Exchange wanted) { return (int64_t)(seen - wanted) >= 0; }

// Offsets into an inbox of `world` ranks with regions of `region` bytes.
struct Inbox {
    int world;
    int64_t region;

    static constexpr int64_t kFlagLine = (int64_t)sizeof(Exchange) * kMaxWorld;  // 64 bytes: all sources' flags
    static constexpr int64_t kFlagBytes = kFlagLine * kMaxBlocks;

    static FC_INLINE int64_t flag(int source, int block) {
        return kFlagLine * block + (int64_t)sizeof(Exchange) * source;
    }
    FC_INLINE int64_t slots(int at, int source) const { return kFlagBytes + (at * world + source) * region; }
    FC_INLINE int64_t bytes() const { return slots(kRegions, 0); }

    // What a rank sends itself stays in its own device memory, wherever inboxes are: the ring there, and its size.
    FC_INLINE int64_t own_slots(int at) const { return at * region; }
    FC_INLINE int64_t own_bytes() const { return own_slots(kRegions); }
};

// A rank's own words, in its device memory.
struct Control {
    Exchange epoch;        // the last exchange that every block of this rank has ended
    uint64_t error;        // 0, or what Overdue packs; set once, ends every later call at once
    uint64_t* host_error;  // the same word where the host can read it without waiting for the device
    uint32_t ended;        // blocks of the current call that have
};

// The flag that did not come: what a block writes when the deadline passes.
struct Overdue {
    Leg leg;
    int rank, block;
    Exchange exchange;

    FC_INLINE uint64_t packed() const {
        const uint64_t low = exchange & ((1ull << 48) - 1);
        return 1ull << 63 | (uint64_t)leg << 62 | (uint64_t)rank << 58 | (uint64_t)block << 48 | low;
    }
    static FC_INLINE Overdue of(uint64_t word) {
        return {(Leg)(word >> 62 & 1), (int)(word >> 58 & 15), (int)(word >> 48 & 1023), word & ((1ull << 48) - 1)};
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
