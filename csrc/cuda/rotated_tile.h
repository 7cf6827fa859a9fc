// The tile of rotated blocks as collectives and codec kernels see it: RotatedBlocks (rotated_blocks.h) in three variants,
// by how many blocks a thread holds.
#pragma once

#include "cuda/rotated_blocks.h"

namespace flashcomm::FLASHCOMM_ISA {

template <class T, bool kResiduals = false> struct RotatedTile : RotatedCodes {
    using RotatedCodes::RotatedCodes;
    using Word = typename T::Word;
    using Values = float[kRows<T>][8];
    static constexpr bool kRotates = true, kKeepsResiduals = kResiduals;
    static constexpr int kMostAhead = 1;
    static constexpr int kMaxBytes = kTileValues<T> * (256 + 16 + 1) / 256;  // 8 bits, blocks of 16
    static constexpr int kLargestBlock = 8 * kWarp;

    FC_INLINE int scratch_bytes() const { return (kThreads / kWarp + 4) * (int)sizeof(uint32_t); }

    // `residual`, if kKeepsResiduals: added to the coefficients, then replaced by the rounding error.
    FC_DEVICE void encode(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                          Word* residual = nullptr) const {
        encode_to<true>(x, values, scratch, payload, own(values), residual);
    }
    template <bool kOwn, class Offset>
    FC_DEVICE void encode_to(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                             const Place<Offset>& place, Word* residual = nullptr) const {
        if (has_two()) two().template encode_to<kOwn>(x, values, scratch, payload, place, residual);
        else if (has_one()) one().template encode_to<kOwn>(x, values, scratch, payload, place, residual);
        else shared().template encode_to<kOwn>(x, values, scratch, payload, place, residual);
    }
    template <bool kAlone>
    FC_DEVICE uint32_t decode(const uint8_t* payload, int values, int octet, uint32_t shrunk, Values& x) const {
        return decode_from<kAlone>(payload, own(values), octet, shrunk, x);
    }
    template <bool kAlone, class Offset>
    FC_DEVICE uint32_t decode_from(const uint8_t* payload, const Place<Offset>& place, int octet, uint32_t shrunk,
                                   Values& x) const {
        if (has_two()) return two().template decode_from<kAlone>(payload, place, octet, shrunk, x);
        if (has_one()) return one().template decode_from<kAlone>(payload, place, octet, shrunk, x);
        return shared().template decode_from<kAlone>(payload, place, octet, shrunk, x);
    }
    // visit(what decodes these blocks), so that a sum of payloads asks once what they are.
    template <class Visit> FC_DEVICE void with_blocks(Visit visit) const {
        if (has_two()) visit(two());
        else if (has_one()) visit(one());
        else visit(shared());
    }
    template <bool kAlone> FC_DEVICE void finish(Values& x, uint32_t shrunk) const {
        if (has_two()) two().template finish<kAlone>(x, shrunk);
        else if (has_one()) one().template finish<kAlone>(x, shrunk);
        else shared().template finish<kAlone>(x, shrunk);
    }

private:
    // Blocks of a thread. Asked at run time: one kernel serves all; three texts of the work on them spare every value
    // some ten instructions that would ask or move.
    FC_DEVICE bool has_two() const { return kRows<T> == 4 && octet_shift == 1; }
    FC_DEVICE bool has_one() const { return 1 << octet_shift == kRows<T>; }
    FC_DEVICE auto two() const { return RotatedBlocks<T, kResiduals, kRows<T> / 2, false>(*this); }
    FC_DEVICE auto one() const { return RotatedBlocks<T, kResiduals, 1, false>(*this); }
    FC_DEVICE auto shared() const { return RotatedBlocks<T, kResiduals, 1, true>(*this); }
};

}  // namespace flashcomm::FLASHCOMM_ISA
