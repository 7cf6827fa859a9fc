// One super-block of rotated blocks on the CPU: its steps from its largest coefficients, and its codes as planes.
#pragma once

#include "api.h"
#include "cpu/planes.h"
#include "format/rotated_search.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// What is known of a super-block's blocks once their largest coefficients are.
struct alignas(64) Steps {
    float shrinks[kSuperBlock], inverses[kSuperBlock];
    uint32_t scales[kSuperBlock], keys[kSuperBlock], top;
};

inline bool is_escape(uint32_t scale) { return (scale & 0x7F) > kLast; }

// Where a super-block's codes start in the planes, in groups of 8 words; its number of words.
inline int64_t octet_of(const RotatedLayout& at, const Span& s) { return s.block * at.block / at.together / 8; }
inline int words_of(const RotatedLayout& at, const Span& s) { return (int)(s.blocks * at.block / at.together); }

inline uint32_t top_of(const uint8_t* payload, const RotatedLayout& at, int64_t super_block) {
    uint16_t top;
    __builtin_memcpy(&top, payload + at.tops + 2 * super_block, 2);
    return top;
}

// What is added to a step's bits before it is cut to a key: see kNearest.
inline uint32_t rounding_of(const RotatedLayout& at) {
    return at.levels <= kNearest ? 1u << (kKeyShift - 1) : (1u << kKeyShift) - 1;
}

// The super-block's top, and of every block its distance and the reciprocal of its step, from the blocks' keys.
inline void fit(Steps& f, const RotatedLayout& at, int blocks) {
    const float size = (float)at.block;
    for (int b = blocks; b < kSuperBlock; b++) f.keys[b] = kLeastKey, f.shrinks[b] = 1, f.scales[b] = kConstant;
    uint32_t top = kLeastKey;
    for (int b = 0; b < kSuperBlock; b++) {
        const uint32_t key = (f.scales[b] & 0x7F) ? kLeastKey : f.keys[b];
        top = key > top ? key : top;
    }
    f.top = top;
    for (int b = 0; b < kSuperBlock; b++) {
        const uint32_t scale = f.scales[b], distance = distance_of(top, f.keys[b]);
        f.inverses[b] = 1.0f / (step_of(top, distance | (scale & 0x80)) * f.shrinks[b] * size);
        f.scales[b] = (scale & 0x7F) ? scale : scale | distance;
    }
}

inline void store_steps(const Steps& f, const RotatedLayout& at, int64_t super_block, const Span& s, uint8_t* payload) {
    const uint16_t top = (uint16_t)f.top;
    uint8_t scales[kSuperBlock];
    for (int b = 0; b < kSuperBlock; b++) scales[b] = (uint8_t)f.scales[b];
    __builtin_memcpy(payload + at.scales + s.block, scales, s.blocks);
    __builtin_memcpy(payload + at.tops + 2 * super_block, &top, 2);
}

// Where everything lies, and how two codes, the digits of one number, are put into planes: known once for a tensor.
struct Coding : RotatedLayout {
    struct Plane {
        int width, shift;
        int64_t start;
    };
    int last, radix, planes = 0;
    uint16_t inverse, shift = 0;  // of all numbers there are, number * inverse >> 16 + shift is number / radix
    Plane plane[4];

    explicit Coding(const Spec& spec)
        : RotatedLayout(spec.numel, spec.bits, spec.block, spec.width), last(levels - 1), radix(levels) {
        while (radix > 2 << shift) shift++;
        inverse = (uint16_t)(((1u << (16 + shift)) + radix - 1) / radix);
        each_plane([&](int width, int first_bit, int64_t start) { plane[planes++] = {width, first_bit, start}; });
    }
};

// A super-block's words in two: their low bytes, and what is beyond a byte.
template <int kBlock> struct Bytes {
    alignas(64) uint8_t low[kSuperBlock * kBlock], high[kSuperBlock * kBlock / 2];
};

// Where a super-block's low bytes belong: a plane of 8 bits is those bytes.
inline uint8_t* low_bytes(const uint8_t* payload, const Coding& at, const Span& s, uint8_t* otherwise) {
    const auto& first = at.plane[0];
    return first.width == 8 ? const_cast<uint8_t*>(payload) + first.start + 8 * octet_of(at, s) : otherwise;
}

// Words to the planes, from `octet` on.
inline void pack(const uint8_t* low, const uint8_t* high, const Coding& at, int64_t octet, int words,
                 uint8_t* payload) {
    for (int i = 0; i < at.planes; i++) {
        const auto [width, shift, start] = at.plane[i];
        pack_plane(width, shift < 8 ? low : high, words, shift & 7, payload + start + octet * width);
    }
}

// The way back.
inline void unpack(const uint8_t* payload, const Coding& at, int64_t octet, int words, uint8_t* low, uint8_t* high) {
    for (int i = 0; i < at.planes; i++) {
        const auto [width, shift, start] = at.plane[i];
        unpack_plane(width, payload + start + octet * width, words, shift & 7, shift < 8 ? low : high);
    }
    if (at.together == 2 && at.word_bits <= 8) __builtin_memset(high, 0, words);
}

inline void zero_gaps(const RotatedLayout& at, uint8_t* payload) {
    at.each_plane([&](int width, int, int64_t start) { Layout::zero(payload + start, at.words / 8 * width); });
    Layout::zero(payload + at.scales, at.blocks);
    Layout::zero(payload + at.tops, 2 * at.super_blocks);
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
