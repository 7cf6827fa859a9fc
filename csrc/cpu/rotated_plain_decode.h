// Plain super-blocks of rotated blocks on the CPU, decoded (rotated_plain.h encodes them):
//
//     planes -> bytes -> codes, for every payload multiply by the step and add; butterflies -> store
#pragma once

#include "cpu/rotated_plain.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// One payload's words of a super-block, and the steps of its blocks.
template <int kBlock> struct Part {
    const uint8_t* low;
    float steps[kSuperBlock];
    Bytes<kBlock> bytes;
};

// False if a block of the super-block is an escape or so large that its butterflies could overflow.
template <int kBlock>
bool load_part(const uint8_t* payload, const Coding& at, int64_t super_block, const Span& s, Part<kBlock>& part) {
    uint8_t scales[kSuperBlock] = {}, largest = 0;
    __builtin_memcpy(scales, payload + at.scales + s.block, s.blocks);
    for (int b = 0; b < kSuperBlock; b++) {
        const uint8_t distance = scales[b] & 0x7F;
        largest = distance > largest ? distance : largest;
    }
    const uint32_t top = top_of(payload, at, super_block);
    if (largest > kLast || top >= kHugeKey) return false;
    for (int b = 0; b < kSuperBlock; b++) part.steps[b] = step_of(top, scales[b]);
    const int words = words_of(at, s);
    part.low = low_bytes(payload, at, s, part.bytes.low);
    if (s.blocks % kTracks && part.low != part.bytes.low) {  // the last unit reads beyond the super-block
        __builtin_memcpy(part.bytes.low, part.low, words);
        part.low = part.bytes.low;
    }
    unpack(payload, at, octet_of(at, s), words, part.bytes.low, part.bytes.high);
    return true;
}

// Codes of a unit's 32 values from `half` on, values 4i, 4i + 1, 4i + 2 and 4i + 3 each in a vector.
template <int kBlock>
FC_INLINE void load_codes(const Part<kBlock>& part, int unit, const Coding& at, Shorts (&codes)[kBlock / 8]) {
    if (at.together == 1) {
        Words bytes[kBlock / 16];
        load_pieces(part.low + unit * kTracks * kBlock, bytes);
#pragma GCC unroll 32
        for (int i = 0; i < kBlock / 16; i += 2) {
            const auto halves = unzipped(Both<HalfWords>{(HalfWords)bytes[i], (HalfWords)bytes[i + 1]});
            codes[2 * i] = (Shorts)(halves.first & 0xFF), codes[2 * i + 1] = (Shorts)(halves.first >> 8);
            codes[2 * i + 2] = (Shorts)(halves.second & 0xFF), codes[2 * i + 3] = (Shorts)(halves.second >> 8);
        }
        return;
    }
    Words lows[kBlock / 32], highs[kBlock / 32];
    load_pieces(part.low + unit * kTracks * kBlock / 2, lows);
    load_pieces(part.bytes.high + unit * kTracks * kBlock / 2, highs);
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 32; i++) {
        const auto low = (HalfWords)lows[i], high = (HalfWords)highs[i];
        const HalfWords numbers[] = {(low & 0xFF) | high << 8, low >> 8 | (high & 0xFF00)};
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const HalfWords upper = upper_products(numbers[j], HalfWords{} + at.inverse) >> at.shift;
            codes[4 * i + 2 * j] = (Shorts)(numbers[j] - upper * (uint16_t)at.radix);
            codes[4 * i + 2 * j + 1] = (Shorts)upper;
        }
    }
}

// kCount vectors of codes, the even and the odd lanes of each as numbers, at a stride of kCount.
template <int kCount> FC_INLINE void numbers(const Shorts* codes, Vector* v) {
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++) {
        v[i] = __builtin_convertvector((Lanes)codes[i] << 16 >> 16, Vector);
        v[i + kCount] = __builtin_convertvector((Lanes)codes[i] >> 16, Vector);
    }
}

// Values of one payload as quads: its codes are rotated as integers, exactly, `zero` being left to the first value.
template <int kBlock>
FC_INLINE void decode_one(const Part<kBlock>& part, int unit, const Coding& at, Vector (&v)[kBlock / 4]) {
    const Shorts zero = (Shorts)(first_words() & (uint32_t)(16 * at.zero) * 0x10001);
    Shorts codes[kBlock / 8];
    load_codes(part, unit, at, codes);
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 8; i += 4) {
        Shorts c[] = {codes[i], codes[i + 1], codes[i + 2], codes[i + 3]};
        between<1>(c);
        transpose<2, Zip>(c);
        transpose_and_pair<1, Zip>(c);
        transpose_and_pair<2, Zip>(c);
        codes[i] = c[0] - zero, codes[i + 1] = c[2], codes[i + 2] = c[1], codes[i + 3] = c[3];
    }
    between<4>(codes);
    const Shorts sum = Shorts{} + 1, difference = (Shorts)(Words{} + 0xFFFF0001);
    const Vector step = spread(part.steps + unit * kTracks);
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 4; i++) {
        const Shorts code = codes[i / 8 * 4 + i % 4];
        const Lanes number = sum_products(code, i & 4 ? difference : sum);  // the last butterfly
        v[i] = scaled(__builtin_convertvector(number, Vector), step, Vector{});
    }
}

// Adds one payload's coefficients to the sums, arranged as sum_quads wants them.
template <int kBlock>
FC_INLINE void add_part(const Part<kBlock>& part, int unit, const Coding& at, Vector (&sums)[kBlock / 4]) {
    const Vector step = spread(part.steps + unit * kTracks);
    Shorts codes[kBlock / 8];
    load_codes(part, unit, at, codes);
#pragma GCC unroll 32
    for (Shorts& each : codes) each = each - (int16_t)at.zero;
    Vector v[kBlock / 4];
#pragma GCC unroll 2
    for (int i = 0; i < kBlock / 4; i += 8) numbers<4>(codes + i / 2, v + i);
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 4; i++) sums[i] = scaled(v[i], step, sums[i]);
}

// Sums of coefficients -> values, as quads.
template <int kBlock> FC_INLINE void rotate_sums(Vector (&sums)[kBlock / 4]) {
#pragma GCC unroll 2
    for (int i = 0; i < kBlock / 4; i += 8) {
        Vector s[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) s[j] = sums[i + j];
        between<1>(s);
        transpose_and_pair<1, Unzip>(s);
        transpose_and_pair<2, Unzip>(s);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) sums[i + j] = s[(j & 1) << 2 | j >> 1];
    }
    between<8>(sums);
}

// Finite numbers; float16 alone has a range that they may leave.
template <class T> FC_INLINE Vector limited(Vector x, float limit) {
    if constexpr (T::kMax > 1e30f) return x;
    x = x < -limit ? Vector{} - limit : x;
    return x > limit ? Vector{} + limit : x;
}

template <class T, int kBlock, bool kOne>
void write_super_block(const Part<kBlock>* parts, int count, Coding at, Units units, float limit,
                       typename T::Word* out) {
    typename T::Word edge[kTracks * kBlock];
    for (int u = 0; u < units.count; u++) {
        Vector v[kBlock / 4] = {};
        if constexpr (kOne) {
            decode_one(parts[0], u, at, v);
        } else {
            for (int p = 0; p < count; p++) add_part(parts[p], u, at, v);
            rotate_sums<kBlock>(v);
        }
#pragma GCC unroll 32
        for (Vector& each : v) each = limited<T>(each, limit);
        store_quads<T>(v, u < units.whole ? out + u * kTracks * kBlock : edge);
    }
    if (units.rest) __builtin_memcpy(out + units.whole * kTracks * kBlock, edge, units.rest * kBlock * sizeof(*out));
}

// Whether a sum of float16 may be so large that its error decides whether it overflows.
template <int kBlock> bool may_overflow(const Part<kBlock>* parts, int count, const Coding& at) {
    const float steps =
        (float)(kBlock * (at.zero + 1)) + at.steps_off(at.levels) * kBlock;  // of a value, and by which it is off
    for (int b = 0; b < kSuperBlock; b++) {
        float size = 0;
        for (int p = 0; p < count; p++) size += __builtin_fabsf(parts[p].steps[b]) * steps;
        if (size >= kLarge) return true;
    }
    return false;
}

// Decodes a super-block and writes the sum of all payloads; false, and nothing done, if it is not plain.
template <class T, int kBlock>
bool decode_plain(const uint8_t* const* payloads, int count, const Coding& at, int64_t super_block, const Span& s,
                  float limit, typename T::Word* out, Part<kBlock>* parts) {
    if (s.values < s.blocks * kBlock) return false;
    for (int p = 0; p < count; p++)
        if (!load_part<kBlock>(payloads[p], at, super_block, s, parts[p])) return false;
    if (kIsHalf<T> && count > 1 && may_overflow(parts, count, at)) return false;
    if (count == 1) write_super_block<T, kBlock, true>(parts, count, at, Units(s.blocks), limit, out + s.value);
    else write_super_block<T, kBlock, false>(parts, count, at, Units(s.blocks), limit, out + s.value);
    return true;
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
