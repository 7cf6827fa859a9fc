// Super-blocks of nothing but zeros: masked tokens, padding, unused experts. Constants all, so their codes are zero
// bytes.
#pragma once

#include "cpu/super_block.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// Whether all bits of `count` values are zero. Returns early on the first non-zero chunk.
template <class Word> bool are_zero(const Word* values, int64_t count) {
    constexpr int kAtOnce = 64;
    int64_t i = 0;
    for (Word found = 0; i + kAtOnce <= count; i += kAtOnce) {
        for (int j = 0; j < kAtOnce; j++) found |= values[i + j];
        if (found) return false;
    }
    for (; i < count; i++)
        if (values[i]) return false;
    return true;
}

// Encodes a super-block whose values, and whose residual if there is one, are zero; false, and nothing done, if they
// are not.
template <class Word>
bool encode_zeros(const Word* x, const Word* residual, const Coding& at, int64_t super_block, const Span& s,
                  uint8_t* payload) {
    if (!are_zero(x + s.value, s.values)) return false;
    if (residual && !are_zero(residual + s.residual, grouped(s.blocks) * at.block)) return false;
    const uint16_t top = kLeastKey;
    for (int i = 0; i < at.planes; i++) {
        const auto& plane = at.plane[i];
        uint8_t* codes = payload + plane.start + octet_of(at, s) * plane.width;
        __builtin_memset(codes, 0, words_of(at, s) / 8 * plane.width);
    }
    __builtin_memset(payload + at.scales + s.block, kConstant, s.blocks);
    __builtin_memcpy(payload + at.tops + 2 * super_block, &top, 2);
    return true;
}

// All payloads hold the super-block as encode_zeros writes it: its values.
template <class Word>
bool decode_zeros(const uint8_t* const* payloads, int payload_count, const Coding& at, const Span& s, Word* out) {
    for (int p = 0; p < payload_count; p++) {
        const uint8_t* scales = payloads[p] + at.scales + s.block;
        for (int b = 0; b < s.blocks; b++)
            if (scales[b] != kConstant) return false;
        for (int i = 0; i < at.planes; i++) {
            const auto& plane = at.plane[i];
            const uint8_t* codes = payloads[p] + plane.start + octet_of(at, s) * plane.width;
            if (!are_zero(codes, words_of(at, s) / 8 * plane.width)) return false;
        }
    }
    __builtin_memset(out + s.value, 0, s.values * sizeof(Word));
    return true;
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
