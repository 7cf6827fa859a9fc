// Bit splitting with spike reserving, 2 to 8 bits: sizes, spans and escapes of the format.
//
// flashcomm_megatron/codec/spike.py is the definition and explains the idea; everything here equals it bit for bit.
// A payload of rows in blocks (rows.h), sections starting on 16 bytes, gaps zero:
//
//     | planes of the codes | spike minima  | spike maxima  | spans       | lows        | planes of the positions |
//     | octets * bits bytes | blocks x bf16 | blocks x bf16 | blocks x u8 | blocks x i8 | 2 * blocks codes        |
#pragma once

#include "format/codec.h"

namespace flashcomm::FLASHCOMM_ISA {

constexpr uint32_t kConstantSpan = 255, kLargestSpan = 254;
constexpr int kSpanShift = 20;  // a span counts float32 bit patterns in units of 2**20
constexpr int kOctaves = 29;    // the smallest span lies this many octaves below the larger spike
constexpr float kUnits = 32;    // steps of `low` in a span
constexpr int kLargestBlock = 256;

// Where everything lies.
struct SpikeLayout {
    int bits, position_bits;
    Rows rows;
    int64_t numel, block, blocks, octets, pairs;  // pairs: octets of positions
    int64_t minima, maxima, spans, lows, positions, bytes;

    FC_INLINE SpikeLayout(int64_t numel, int bits, int64_t block, int64_t width = 0)
        : bits(bits), position_bits(0), rows(numel, width, block), numel(numel), block(block),
          blocks(rows.all_blocks()), octets(rows.all_octets()), pairs((2 * blocks + 7) / 8) {
        while (1 << position_bits < block) position_bits++;
        const auto nothing = [](int, int, int64_t) {};
        minima = Layout::each_plane(bits, octets, nothing);
        maxima = minima + Layout::padded(2 * blocks);
        spans = maxima + Layout::padded(2 * blocks);
        lows = spans + Layout::padded(blocks);
        positions = lows + Layout::padded(blocks);
        bytes = positions + Layout::each_plane(position_bits, pairs, nothing);
    }
};

// What the spikes say about a block: a power of two that keeps the rest clear of float32's limits, and after it the
// point between them that is nearest to zero and the larger one's biased exponent.
struct Frame {
    float prescale, anchor;
    int32_t exponent;

    static FC_INLINE Frame of(float minimum, float maximum) {
        const float low = float_of(bits_of(minimum) & 0x7FFFFFFF), high = float_of(bits_of(maximum) & 0x7FFFFFFF);
        const float largest = low > high ? low : high;
        const float prescale = largest >= 0x1p112f ? 0x1p-16f : largest < 0x1p-64f ? 0x1p64f : 1.0f;
        const float anchor = ((minimum > 0 ? minimum : 0.0f) + (maximum < 0 ? maximum : 0.0f)) * prescale;
        return {prescale, anchor, (int32_t)(bits_of(largest * prescale) >> 23)};
    }

    FC_INLINE float span(uint32_t code) const {
        return code ? float_of((uint32_t)(exponent - kOctaves) * (1u << 23) + (code << kSpanShift)) : 0.0f;
    }

    // By how much a value may be off: half a step, and what rounding a spike to bfloat16 may take.
    static FC_INLINE float bound(float minimum, float maximum, float step, float grow) {
        const float low = float_of(bits_of(minimum) & 0x7FFFFFFF), high = float_of(bits_of(maximum) & 0x7FFFFFFF);
        return step * kRounding * grow + (low > high ? low : high) * 0x1p-8f;
    }

    // The smallest span that lets `low` be reached from the anchor and `high` from `low`.
    FC_INLINE uint32_t code(float low, float high) const {
        float needed = (high - low) * (float)(32.0 / 31);
        const float above = (high - anchor) * (float)(32.0 / 159), below = (anchor - low) * 0.25f;
        needed = above > needed ? above : needed;
        needed = below > needed ? below : needed;
        if (!(needed > 0) || exponent == 0) return 0;
        const int32_t steps = (int32_t)(bits_of(needed) - (uint32_t)(exponent - kOctaves) * (1u << 23));
        const int32_t code = (steps + (1 << kSpanShift) - 1) >> kSpanShift;
        return code < 1 ? 1 : (uint32_t)code < kLargestSpan ? (uint32_t)code : kLargestSpan;
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
