// Families of nothing but zeros: masked tokens, padding, unused experts. Constants all, so their codes are zero bytes.
#pragma once

#include "cpu/rotated_family.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// Whether all bits of `count` values are zero; the first few of others tell.
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

// The family's values and, where something is carried on, its memory are zero: its payload.
template <class Word>
bool encode_zeros(const Word* x, const Word* memory, const Coding& at, int64_t family, uint8_t* payload) {
    const int64_t begin = family * kFamily * at.block, left = at.numel - begin;
    const int64_t count = left < kFamily * at.block ? left : kFamily * at.block;
    const int blocks = blocks_of(at, family);
    if (!are_zero(x + begin, count)) return false;
    if (memory && !are_zero(memory + begin, memory_numel(blocks, at.block))) return false;
    const uint16_t top = kLeastKey;
    for (int i = 0; i < at.planes; i++) {
        const auto& plane = at.plane[i];
        uint8_t* codes = payload + plane.start + octet_of(at, family) * plane.width;
        __builtin_memset(codes, 0, words_of(at, blocks) / 8 * plane.width);
    }
    __builtin_memset(payload + at.scales + family * kFamily, kConstant, blocks);
    __builtin_memcpy(payload + at.tops + 2 * family, &top, 2);
    return true;
}

// All payloads hold the family as encode_zeros writes it: its values.
template <class Word>
bool decode_zeros(const uint8_t* const* payloads, int payload_count, const Coding& at, int64_t family, Word* out) {
    const int blocks = blocks_of(at, family);
    for (int p = 0; p < payload_count; p++) {
        const uint8_t* scales = payloads[p] + at.scales + family * kFamily;
        for (int b = 0; b < blocks; b++)
            if (scales[b] != kConstant) return false;
        for (int i = 0; i < at.planes; i++) {
            const auto& plane = at.plane[i];
            const uint8_t* codes = payloads[p] + plane.start + octet_of(at, family) * plane.width;
            if (!are_zero(codes, words_of(at, blocks) / 8 * plane.width)) return false;
        }
    }
    const int64_t begin = family * kFamily * at.block, left = at.numel - begin;
    __builtin_memset(out + begin, 0, (left < kFamily * at.block ? left : kFamily * at.block) * sizeof(Word));
    return true;
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
