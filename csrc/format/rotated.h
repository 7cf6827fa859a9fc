// Rotated block integers of 2 to 8 bits in half-bit steps: sizes, steps and escapes, for host and device.
//
// flashcomm_megatron/codec/rotated.py is the definition and explains the idea; everything here equals it bit for bit.
// A payload of rows (rows.h), always whole blocks (a row's last one filled with its last value):
//
//     | planes of the codes              | scales      | tops                  |   sections start on 16 bytes,
//     | words * width / 8 bytes in all   | blocks x u8 | super-blocks x u16        |   gaps are zero, little endian
//
//     super-block   up to 32 blocks of one row that share a top
//
//     words    a code each at whole widths; at half widths two codes, q[2i] + q[2i + 1] * levels, in 2 * bits bits.
//              Wider than a byte, their low byte is a plane of 8 bits and the rest follows as planes of its own
//     scale    distance from the super-block's top in eighths of an octave, and the sign of the step in bit 7
//     step     the float32 whose bits are (top - distance) << 20
#pragma once

#include "format/codec.h"

namespace flashcomm::FLASHCOMM_ISA {

constexpr int kSuperBlock = 32;                               // blocks that share a top
constexpr int kNanBlock = 127, kConstant = 126, kLast = 125;  // of the scale byte without its sign
constexpr int kKeyShift = 20;                                 // a key counts float32 bit patterns in units of 2**20
constexpr int kSearched = 16;                     // up to so many levels the step is searched for (rotated_search.h)
constexpr int kNearest = 32;                      // steps of at most this many levels round to nearest, others up
constexpr uint32_t kLeastKey = (127 - 100) << 3;  // 2**-100
constexpr int kGroup = 4;                         // blocks whose numbers lie together in a residual
constexpr float kHugeStep = 0x1p100f;             // from here on butterflies could overflow: shrink first
constexpr uint32_t kHugeKey = (127 + 100) << 3;   // its key
constexpr float kShrink = 0x1p-16f, kGrow = 0x1p16f;

// A super-block: its first value, block and number of the residual, in the tensor; its blocks, and how many values they
// have.
struct Span {
    int64_t value, block, residual;
    int blocks, values;
};

// Blocks that a residual has of a row: whole groups.
FC_INLINE int64_t grouped(int64_t blocks) { return (blocks + kGroup - 1) / kGroup * kGroup; }

FC_INLINE int64_t residual_numel(int64_t numel, int64_t width, int64_t block) {
    const Rows rows(numel, width, block);
    return rows.count * grouped(rows.blocks) * block;
}

// Where everything lies. `half_bits` is twice the width of a code.
struct RotatedLayout {
    int half_bits, levels, zero, together, word_bits;
    Rows rows;
    int64_t numel, block, blocks, super_blocks_of_row, super_blocks, words;
    int64_t scales, tops, bytes;

    FC_INLINE RotatedLayout(int64_t numel, int half_bits, int64_t block, int64_t width = 0)
        : half_bits(half_bits), levels(levels_of(half_bits)), zero(levels / 2), together(half_bits & 1 ? 2 : 1),
          word_bits(half_bits * together / 2), rows(numel, width, block), numel(numel), block(block),
          blocks(rows.all_blocks()), super_blocks_of_row((rows.blocks + kSuperBlock - 1) / kSuperBlock),
          super_blocks(rows.count * super_blocks_of_row), words(blocks * block / together) {
        scales = 0;
        each_plane([&](int width, int, int64_t) { scales += Layout::padded(words / 8 * width); });
        tops = scales + Layout::padded(blocks);
        bytes = tops + Layout::padded(2 * super_blocks);
    }

    FC_INLINE Span span(int64_t super_block) const {
        const int64_t row = super_block / super_blocks_of_row, first = super_block % super_blocks_of_row * kSuperBlock;
        const int64_t left = rows.blocks - first, blocks = left < kSuperBlock ? left : kSuperBlock;
        const int64_t values = rows.width - first * block;
        return {row * rows.width + first * block, row * rows.blocks + first,
                (row * grouped(rows.blocks) + first) * block, (int)blocks,
                (int)(values < blocks * block ? values : blocks * block)};
    }

    // 2 ** (half_bits / 2), rounded down, so that two codes fit in half_bits bits.
    static FC_INLINE int levels_of(int half_bits) {
        return half_bits & 1 ? 181 >> (15 - half_bits) / 2 : 1 << half_bits / 2;
    }

    // visit(width, shift, start): a plane of `width` bits holds the words' bits from `shift` on, `start` bytes in.
    template <class Visit> FC_INLINE void each_plane(Visit visit) const {
        int64_t end = 0;
        const int low = word_bits < 8 ? word_bits : 8;
        for (int part = low, base = 0; part > 0; base += part, part = word_bits - base)
            end += Layout::each_plane(
                part, words / 8, [&](int width, int shift, int64_t start) { visit(width, base + shift, end + start); });
    }

    // Steps by which a block's coefficients are off in the mean, at most: codec/rotated_steps.py, in 64ths like there.
    static FC_INLINE float steps_off(int levels) {
        const int zero = levels / 2;
        float off = (float)zero * (levels <= kNearest ? 17.0f / 16 : 1.0f) - (float)(levels - 1 - zero);
        off = off < 0.5f ? 0.5f : off;
        if (levels <= kSearched) off = (off + 1.0f / 16) * (levels < 8 ? 1.5f : 1.25f) + 1.0f / 16;
        return (float)((int)(64 * off) + 2) / 64;
    }

    // Bits of a constant's float32 that one code carries.
    FC_INLINE int constant_bits() const { return block < 32 ? (int)(32 / block) : 1; }
};

// The key of a step, rounded to three mantissa bits; a shrunk block's is that of what it was.
FC_INLINE uint32_t key_of(float needed, uint32_t rounding, float shrink) {
    const uint32_t key = ((bits_of(needed) + rounding) >> kKeyShift) + (shrink < 1 ? 16 << 3 : 0);
    return key < kLeastKey ? kLeastKey : key;
}

FC_INLINE uint32_t distance_of(uint32_t top, uint32_t key) {
    return top < key ? 0 : top - key > kLast ? kLast : top - key;
}

FC_INLINE float step_of(uint32_t top, uint32_t scale) {
    const uint32_t distance = scale & 0x7F;
    return float_of(((top - (distance > kLast ? kLast : distance)) << kKeyShift) | (scale & 0x80) << 24);
}

// Where a residual has coefficient i of block `index` of a row: of every kGroup blocks the first four coefficients, then the next.
FC_INLINE int64_t residual_index(int64_t index, int64_t i, int64_t block) {
    return index / kGroup * kGroup * block + i / 4 * 4 * kGroup + index % kGroup * 4 + i % 4;
}
FC_INLINE int64_t residual_of_blocks(int64_t blocks, int64_t block) {
    return (blocks + kGroup - 1) / kGroup * kGroup * block;
}

// What a residual of this type keeps of a loss: its upper half, or the loss within range, still to be rounded.
template <class T> FC_INLINE float kept_number(float loss) {
    if (T::kInfinity == BFloat16::kInfinity) return high_half(loss);
    return loss < -T::kMax ? -T::kMax : loss > T::kMax ? T::kMax : loss;
}

}  // namespace flashcomm::FLASHCOMM_ISA
