// How a call is cut: slices to ranks, tiles to blocks, rounds. A pure function of what every rank knows, for if two
// ranks cut differently they wait for flags that never come.
//
//     slice       the values one rank owns, as the call says: two-step: whole rows, or of one row whole units, and the
//                 last ranks have fewer or none; one-step: everything; reduce-scatter, all-gather: what the caller owns.
//     tile        the values one thread block codes at a time, in one payload: 2048, 4096 or 8192, less what is needed
//                 to be a multiple of both legs' units. Small messages take small tiles, to occupy more blocks.
//     unit        the values whose coding depends on each other: a block, or several where metadata are shared
//     block       thread block b of every rank does tiles b, b + blocks, ... of every slice in every step, so blocks
//                 wait for blocks of their own number only.
//     round       `depth` tiles for each block and source: what fits into a region of the inboxes, and at most a fourth of
//                 the block's tiles, so that one round is on its way while another is decoded.
#pragma once

#include "cuda/protocol.h"
#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

enum Collective : int { kOneStep = 0, kTwoStep = 1, kReduceScatter = 2, kAllGather = 3, kCollectives = 4 };

FC_INLINE bool scatters(Collective kind) { return kind == kTwoStep || kind == kReduceScatter; }
FC_INLINE bool reduces(Collective kind) { return kind != kAllGather; }
FC_INLINE bool gathers(Collective kind) { return kind == kTwoStep || kind == kAllGather; }
FC_INLINE int legs(Collective kind) { return kind == kTwoStep ? 2 : 1; }

constexpr int kLeastRounds = 4;  // where there are so many tiles: the first is sent and the last decoded alone

struct Shape {
    int64_t numel, slice;  // values of the whole: what all_reduce sums, reduce_scatter takes, all_gather returns
    int64_t rounds;
    int tile, blocks, depth;
    int stride;  // bytes between the slots of an inbox region

    FC_INLINE int64_t start(int rank) const { return rank * slice; }
    FC_INLINE int64_t size(int rank) const {
        const int64_t left = numel - start(rank);
        return left < 0 ? 0 : left < slice ? left : slice;
    }
};

// What the group agreed on when it made its workspace.
struct Capacity {
    int world, blocks;  // ranks; thread blocks that one rank may launch
    int64_t region;     // bytes of one inbox region, at least blocks * kSlotBytes
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t common_multiple(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) {
        const int64_t rest = x % y;
        x = y;
        y = rest;
    }
    return a / x * b;
}

// `reduce`, `gather`: units of the legs; `most`: values of the largest tile; payload_bytes(values): the longer of both
// legs' payloads of one. Without a tile that is a multiple of both units, `tile` is 0 and the kernel cannot serve.
template <class PayloadBytes>
Shape shape_of(Collective kind, int64_t numel, int64_t slice, const Capacity& capacity, int64_t reduce, int64_t gather,
               int most, PayloadBytes payload_bytes) {
    const int64_t unit = kind == kTwoStep ? common_multiple(reduce, gather) : reduces(kind) ? reduce : gather;
    Shape shape{};
    shape.numel = numel, shape.slice = slice;
    int64_t tiles = 0;
    for (int values = kLeastTile; values <= most; values *= 2) {
        const int tile = (int)(values / unit * unit);
        if (tile == 0) continue;
        if (payload_bytes(tile) > kSlotBytes) break;
        shape.tile = tile;
        tiles = ceil_div(shape.slice, tile);
        if (tiles <= capacity.blocks) break;
    }
    if (shape.tile == 0) return shape;
    shape.blocks = (int)(tiles < 1 ? 1 : tiles < capacity.blocks ? tiles : capacity.blocks);
    shape.stride = payload_bytes(shape.tile);
    const int64_t fitting = capacity.region / shape.stride / shape.blocks;
    const int64_t wanted = ceil_div(tiles, (int64_t)shape.blocks * kLeastRounds);
    shape.depth = (int)(wanted < 1 ? 1 : wanted < fitting ? wanted : fitting);
    shape.rounds = tiles < 1 ? 1 : ceil_div(tiles, (int64_t)shape.blocks * shape.depth);
    return shape;
}

}  // namespace flashcomm::FLASHCOMM_ISA
