// The tile of rotated blocks as collectives and codec kernels see it: RotatedBlocks (rotated_blocks.h) in three variants,
// by how many blocks a thread holds.
#pragma once

#include "cuda/rotated_blocks.h"

namespace flashcomm::FLASHCOMM_ISA {

template <class T, bool kResiduals = false> struct RotatedTile : RotatedCodes {
    using RotatedCodes::RotatedCodes;
    static constexpr bool kKeepsResiduals = kResiduals;
    static constexpr int kLargestBlock = 8 * kWarp;

    FC_INLINE int scratch_bytes() const { return (kThreads / kWarp + 4) * (int)sizeof(uint32_t); }

    // Asked at run time: one kernel serves all; three texts of the work on blocks spare every value some ten
    // instructions that would ask or move.
    template <class Visit> FC_DEVICE void with_blocks(Visit visit) const {
        if (has_two()) visit(RotatedBlocks<T, kResiduals, kRows<T> / 2, false>(*this));
        else if (has_one()) visit(RotatedBlocks<T, kResiduals, 1, false>(*this));
        else visit(RotatedBlocks<T, kResiduals, 1, true>(*this));
    }

private:
    // Blocks of a thread.
    FC_DEVICE bool has_two() const { return kRows<T> == 4 && octet_shift == 1; }
    FC_DEVICE bool has_one() const { return 1 << octet_shift == kRows<T>; }
};

}  // namespace flashcomm::FLASHCOMM_ISA
