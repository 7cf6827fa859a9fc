// The rules by which ranks share inboxes. tests/support/protocol_model.py has the same rules under the same names,
// tries every interleaving of them, and shows that each is needed.
//
//     round       one pass over the inboxes. Rounds are numbered through all calls of a workspace: a call of k rounds
//                 is rounds epoch + 1 ... epoch + k, and its last block to end advances the epoch. The epoch lives in
//                 device memory, so a replayed CUDA graph counts on.
//     inbox       what other ranks write into: one flag for every (leg, block, source), one region for every
//                 (parity of the round, leg, source). Offsets follow from the size of the workspace alone, never from
//                 a message. All kinds of collectives share the two parities. The flags a block waits for are one line
//                 of 64 bytes: its warp polls all sources with one read, also where the inbox lies behind PCIe.
//     announce    after a block has pushed all it has, it stores the round in its flag at every rank, also at ranks it
//                 had nothing for.
//     await       until the flags of the same block of all ranks have reached the round: >=, since a fast peer may
//                 have announced the next round already; by signed difference, which survives wrap-around.
//
// Why nothing unread is overwritten: a rank writes into a parity again two rounds later. It left the round between
// with a flag from every rank, so every rank had begun that round, hence had read all of the one before: blocks read
// before they announce again, and kernels of one stream do not overlap. No barrier at the end is needed.
//
// Flags have 64 bits because a block may idle: one that sits out 2**31 rounds of small messages, some hours, would
// find its 32-bit flag in the future.
#pragma once

#include "format/codec.h"

namespace flashcomm::FLASHCOMM_ISA {

using Round = uint64_t;

constexpr int kMaxWorld = 8;
constexpr int kMaxBlocks = 512;  // of one rank; GPUs have fewer than 256 multiprocessors
constexpr int kParities = 2;
constexpr int64_t kSlotBytes = 12288;  // the largest payload of a tile: 8192 codes of 8 bits in blocks of 8

enum Leg : int { kReduceLeg = 0, kGatherLeg = 1, kLegs = 2 };

FC_INLINE int parity(Round round) { return (int)(round & (kParities - 1)); }
FC_INLINE bool reached(Round seen, Round wanted) { return (int64_t)(seen - wanted) >= 0; }

// Offsets into an inbox of `world` ranks with regions of `region` bytes.
struct Inbox {
    int world;
    int64_t region;

    static constexpr int64_t kFlagLine = (int64_t)sizeof(Round) * kMaxWorld;  // 64 bytes: all sources' flags
    static constexpr int64_t kFlagBytes = kFlagLine * kLegs * kMaxBlocks;

    static FC_INLINE int64_t flag(Leg leg, int source, int block) {
        return kFlagLine * (leg * kMaxBlocks + block) + (int64_t)sizeof(Round) * source;
    }
    FC_INLINE int64_t slots(int parity, Leg leg, int source) const {
        return kFlagBytes + ((parity * kLegs + leg) * world + source) * region;
    }
    FC_INLINE int64_t bytes() const { return slots(kParities, kReduceLeg, 0); }

    // What a rank sends itself stays in its own device memory, wherever inboxes are: (parity, leg) there, and its size.
    FC_INLINE int64_t own_slots(int parity, Leg leg) const { return (parity * kLegs + leg) * region; }
    FC_INLINE int64_t own_bytes() const { return own_slots(kParities, kReduceLeg); }
};

// A rank's own words, in its device memory.
struct Control {
    Round epoch;           // the last round that every block of this rank has ended
    uint64_t error;        // 0, or what Overdue packs; set once, ends every later call at once
    uint64_t* host_error;  // the same word where the host can read it without waiting for the device
    uint32_t ended;        // blocks of the current call that have
};

// The flag that did not come: what a block writes when the deadline passes.
struct Overdue {
    Leg leg;
    int rank, block;
    Round round;

    FC_INLINE uint64_t packed() const {
        const uint64_t low = round & ((1ull << 48) - 1);
        return 1ull << 63 | (uint64_t)leg << 62 | (uint64_t)rank << 58 | (uint64_t)block << 48 | low;
    }
    static FC_INLINE Overdue of(uint64_t word) {
        return {(Leg)(word >> 62 & 1), (int)(word >> 58 & 15), (int)(word >> 48 & 1023), word & ((1ull << 48) - 1)};
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
