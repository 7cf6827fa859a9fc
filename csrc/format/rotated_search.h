// Which step a rotated block of few levels takes: of kTried, from the one that reaches the largest coefficient down, the
// one whose codes are off least. Errors are integers, in eighths of a step, so they may be added in any order.
#pragma once

#include "format/rotated.h"

namespace flashcomm::FLASHCOMM_ISA {

constexpr int kTried = 3;  // blocks of more than kSearched levels take the first

FC_INLINE uint32_t key_stride(int levels) { return levels < 8 ? 2 : 1; }  // keys between the steps tried

FC_INLINE uint32_t tried_key(uint32_t largest, int levels, int number) {
    const uint32_t finer = key_stride(levels) * number;
    return largest < kLeastKey + finer ? kLeastKey : largest - finer;
}

// What makes eighths of a step of a coefficient. unit: what a step of one is among the coefficients, with its sign.
FC_INLINE float eighths_of(uint32_t key, float unit) { return 1.0f / (float_of(key << kKeyShift) * unit) * 8; }

FC_INLINE uint32_t squared_error(float coefficient, float eighths, int zero, int levels) {
    const int fine = (int)(rounded(coefficient * eighths) - 0x4B400000u), near = (fine + 4) >> 3;
    const int most = levels - 1 - zero, off = fine - 8 * (near < -zero ? -zero : near > most ? most : near);
    return (uint32_t)(off * off);
}

// A block's sum of errors in steps of `key`, to be compared with those in other steps.
FC_INLINE uint32_t weighed(uint32_t errors, uint32_t key, uint32_t finest) {
    const uint32_t eighths = (8 + (key & 7)) << ((key >> 3) - (finest >> 3));
    return errors * eighths * eighths;
}

// Calls errors(key), the sum over a block, for every key tried, and returns the one with the least error.
template <class Errors> FC_INLINE uint32_t best_key(uint32_t largest, int levels, Errors errors) {
    const uint32_t finest = tried_key(largest, levels, kTried - 1);
    uint32_t least = ~0u, best = largest;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // side by side the tries would take more registers than there are
#endif
    for (int i = 0; i < kTried; i++) {
        const uint32_t key = tried_key(largest, levels, i), error = weighed(errors(key), key, finest);
        if (error < least) least = error, best = key;
    }
    return best;
}

}  // namespace flashcomm::FLASHCOMM_ISA
