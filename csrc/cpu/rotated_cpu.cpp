// The rotated codec on the CPU: super-blocks of any block size and any numbers, a block at a time.
//
//     encode   load -> butterflies, + residual -> largest coefficient; then, by the super-block's top, round -> pack
//     decode   unpack -> multiply by the step -> add, for every payload; butterflies -> write
//
// There are faster paths for super-blocks of zeros (rotated_zeros.h), and for super-blocks of blocks of 32 or 64 values
// without constants, NaN, Inf and huge numbers (rotated_plain.h).
#include <stdlib.h>

#include "api.h"
#include "cpu/rotated_cpu.h"
#include "cpu/rotated_plain_decode.h"
#include "cpu/rotated_zeros.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// Room for one super-block of blocks up to kBlock values while it is coded; the arrays hold its blocks one after the
// other.
template <int kBlock> struct SuperBlock : Steps {
    alignas(64) float coefficients[kSuperBlock * kBlock];
    uint8_t codes[kSuperBlock * kBlock];
    Bytes<kBlock> bytes;
    float sizes[kSuperBlock], bounds[kSuperBlock];
    uint32_t constants[kSuperBlock];
};

// ---- encode ----------------------------------------------------------------------------------------------------

// Values [count] as float32; returns the largest magnitude's bits, those of Inf or more if a value is not finite.
template <class T>
uint32_t widen(const typename T::Word* __restrict x, int count, float* __restrict out) {
    using Word = typename T::Word;
    constexpr Word kMagnitude = (Word)((Word) ~(Word)0 >> 1);
    Word largest = 0;
    for (int i = 0; i < count; i++) {
        const Word magnitude = x[i] & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int i = 0; i < count; i++) out[i] = T::widen(x[i]);
    return largest >= T::kInfinity ? Float32::kInfinity : bits_of(T::widen(largest));
}

bool are_zeros(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (x[i] != 0) return false;
    return true;
}

// The key of a block's step, from its coefficients and the largest of them.
uint32_t key_of_block(const float* c, float largest, bool is_negative, float shrink, const Coding& at) {
    const uint32_t first = key_of(largest * (1.0f / (float)(at.block * at.zero)), rounding_of(at), shrink);
    if (at.levels > kSearched) return first;
    const float unit = (is_negative ? -shrink : shrink) * (float)at.block;
    return best_key(first, at.levels, [&](uint32_t key) {
        const float eighths = eighths_of(key, unit);
        uint32_t errors = 0;
        for (int i = 0; i < at.block; i++) errors += squared_error(c[i], eighths, at.zero, at.levels);
        return errors;
    });
}

// Adds what a super-block's residual, or null, holds of block b.
template <class T> void add_residual(const typename T::Word* residual, int b, int64_t block, float* x) {
    for (int64_t i = 0; residual && i < block; i++) {
        const auto word = residual[residual_index(b, i, block)];
        x[i] += (word & T::kInfinity) == T::kInfinity ? float_of(Float32::kNan) : T::widen(word);
    }
}

// Rotates block b of the super-block, whose largest value is known, and notes its step's key, or which escape it takes.
template <class T, class SuperBlock>
void measure(SuperBlock& f, int b, const Coding& at, uint32_t magnitude, const typename T::Word* residual) {
    float* x = f.coefficients + b * at.block;
    f.shrinks[b] = 1;
    f.keys[b] = kLeastKey;
    f.scales[b] = kNanBlock;
    if (magnitude >= Float32::kInfinity) return;
    if (float_of(magnitude) >= kHugeStep) f.shrinks[b] = kShrink;
    for (int64_t i = 0; f.shrinks[b] < 1 && i < at.block; i++) x[i] *= kShrink;
    butterflies(x, (int)at.block);
    if (f.shrinks[b] == 1) add_residual<T>(residual, b, at.block, x);
    const uint32_t largest = largest_key(x, (int)at.block);
    if (largest >> 1 >= Float32::kInfinity) return;
    if (are_zeros(x + 1, at.block - 1)) {
        f.scales[b] = kConstant;
        f.constants[b] = bits_of(x[0] / (f.shrinks[b] * (float)at.block));
        return;
    }
    const bool is_negative = !(largest & 1);  // the step is negative where the largest coefficient is positive
    f.scales[b] = is_negative ? 0x80 : 0;
    f.keys[b] = key_of_block(x, float_of(largest >> 1), is_negative, f.shrinks[b], at);
}

void quantize(const float* __restrict x, const Coding& at, float inverse, uint8_t* __restrict codes) {
    const int zero = at.zero, last = at.levels - 1;
    for (int i = 0; i < at.block; i++) {
        const int code = (int)(rounded(x[i] * inverse) - 0x4B400000u) + zero;
        codes[i] = (uint8_t)(code < 0 ? 0 : code > last ? last : code);
    }
}

// Codes of a block without coefficients: the bits of its constant, or nothing.
void quantize_escape(uint32_t kind, uint32_t constant, const Coding& at, uint8_t* codes) {
    const int width = at.constant_bits();
    for (int i = 0; i < at.block; i++)
        codes[i] = kind == kConstant && i * width < 32 ? (uint8_t)(constant >> i * width & ((1 << width) - 1)) : 0;
}

// Codes and metadata of the super-block's blocks, whose coefficients are known.
template <class SuperBlock>
void finish(SuperBlock& f, const Coding& at, int64_t super_block, const Span& s, uint8_t* payload) {
    fit(f, at, s.blocks);
    for (int b = 0; b < s.blocks; b++) {
        uint8_t* codes = f.codes + b * at.block;
        if (is_escape(f.scales[b])) quantize_escape(f.scales[b], f.constants[b], at, codes);
        else quantize(f.coefficients + b * at.block, at, f.inverses[b], codes);
    }
    const int words = words_of(at, s);
    uint8_t* __restrict low = low_bytes(payload, at, s, f.bytes.low);
    for (int i = 0; at.together == 1 && i < words; i++) low[i] = f.codes[i];
    for (int i = 0; at.together == 2 && i < words; i++) {
        const int number = f.codes[2 * i] + f.codes[2 * i + 1] * at.radix;
        low[i] = (uint8_t)number, f.bytes.high[i] = (uint8_t)(number >> 8);
    }
    pack(low, f.bytes.high, at, octet_of(at, s), words, payload);
    store_steps(f, at, super_block, s, payload);
}

// ---- decode ----------------------------------------------------------------------------------------------------

float constant_of(const uint8_t* codes, const Coding& at) {
    const int width = at.constant_bits();
    uint32_t bits = 0;
    for (int i = 0; i * width < 32; i++) bits |= (uint32_t)(codes[i] & ((1 << width) - 1)) << i * width;
    return float_of(bits);
}

// Adds one block's coefficients to the sums, which the first payload starts; returns the magnitude of its step or
// constant. A constant is a coefficient alone, a NaN block nothing but NaN.
template <bool kFirst>
float add(const uint8_t* __restrict codes, uint32_t scale, uint32_t top, const Coding& at, float shrink,
          float* __restrict sums) {
    const int block = (int)at.block, zero = at.zero, kind = scale & 0x7F;
    if (kind == kConstant) {
        const float value = constant_of(codes, at);
        for (int i = 1; i < block; i++) sums[i] = kFirst ? 0.0f : sums[i] + 0.0f;
        sums[0] = kFirst ? value * shrink : sums[0] + value * shrink;
        return value < 0 ? -value : value;
    }
    const float step = kind == kNanBlock ? float_of(Float32::kNan) : step_of(top, scale);
    const float shrunk = step * shrink;
    for (int i = 0; i < block; i++) {
        const float coefficient = (float)((int)codes[i] - zero) * shrunk + 0.0f;  // never -0
        sums[i] = kFirst ? coefficient : sums[i] + coefficient;
    }
    return step < 0 ? -step : step;
}

template <class SuperBlock>
void load_codes(const uint8_t* payload, const Coding& at, const Span& s, SuperBlock& f) {
    const int words = words_of(at, s);
    const uint8_t* low = low_bytes(payload, at, s, f.bytes.low);
    unpack(payload, at, octet_of(at, s), words, f.bytes.low, f.bytes.high);
    const uint32_t inverse = at.inverse, radix = (uint32_t)at.radix, shift = 16 + at.shift;
    Word16* both = (Word16*)f.codes;
    for (int i = 0; at.together == 1 && i < words; i++) f.codes[i] = low[i];
    for (int i = 0; at.together == 2 && i < words; i++) {
        const uint32_t number = low[i] | f.bytes.high[i] << 8, upper = number * inverse >> shift;
        both[i] = (uint16_t)((number - upper * radix) | upper << 8);
    }
}

template <bool kFirst, class SuperBlock>
void add_super_block(const uint8_t* payload, const Coding& at, int64_t super_block, const Span& s, SuperBlock& f) {
    const uint8_t* scales = payload + at.scales + s.block;
    const uint32_t top = top_of(payload, at, super_block);
    const float off = at.steps_off(at.levels) * (float)at.block;
    load_codes(payload, at, s, f);
    for (int b = 0; b < s.blocks; b++) {
        const int64_t start = b * at.block;
        const float size = add<kFirst>(f.codes + start, scales[b], top, at, f.shrinks[b], f.coefficients + start);
        f.sizes[b] = size > f.sizes[b] ? size : f.sizes[b];
        f.bounds[b] = (kFirst ? 0.0f : f.bounds[b]) + (is_escape(scales[b]) ? 0.0f : size * off);
    }
}

// The sums of all payloads' values, float32, in f.coefficients, still to be multiplied by 1 / f.shrinks. Blocks whose
// butterflies could overflow are found while adding, and then everything is added once more, those shrunk.
template <class SuperBlock>
void sum_super_block(const uint8_t* const* payloads, int count, const Coding& at, int64_t super_block, const Span& s,
                     SuperBlock& f) {
    for (int b = 0; b < s.blocks; b++) f.shrinks[b] = 1, f.sizes[b] = 0;
    for (bool is_done = false; !is_done;) {
        add_super_block<true>(payloads[0], at, super_block, s, f);
        for (int p = 1; p < count; p++) add_super_block<false>(payloads[p], at, super_block, s, f);
        is_done = true;
        for (int b = 0; b < s.blocks; b++)
            if (f.sizes[b] >= kHugeStep && f.shrinks[b] == 1) f.shrinks[b] = kShrink, is_done = false;
    }
    for (int b = 0; b < s.blocks; b++) butterflies(f.coefficients + b * at.block, (int)at.block);
}

// One payload's values are limited to the finite range of the tensor's dtype.
template <class T>
void write(const float* __restrict sums, int count, float grow, float limit, float bound,
           typename T::Word* __restrict out) {
    for (int i = 0; i < count; i++) {
        float x = sums[i] * grow;
        x = x < -limit ? -limit : x > limit ? limit : x;
        out[i] = rounded_sum<T>(x, bound);
    }
}

// ---- super-blocks of a tensor
// ----------------------------------------------------------------------------------------

// Values of block b that the tensor has.
int count_of(const Coding& at, const Span& s, int b) {
    const int64_t left = s.values - b * at.block;
    return (int)(left < at.block ? left : at.block);
}

// Replaces block b's part of the super-block's residual by what its codes lose.
template <class T, class SuperBlock>
void keep_loss(const SuperBlock& f, int b, const Coding& at, typename T::Word* residual) {
    const bool keeps = !is_escape(f.scales[b]) && f.shrinks[b] == 1;
    const float step = step_of(f.top, f.scales[b]) * (float)at.block;
    for (int64_t i = 0, at_block = b * at.block; i < at.block; i++) {
        const float number = (float)((int)f.codes[at_block + i] - at.zero);
        const float loss = keeps ? f.coefficients[at_block + i] - number * step : 0;
        residual[residual_index(b, i, at.block)] = (typename T::Word)T::narrow(kept_number<T>(loss));
    }
}

template <class T, class SuperBlock>
void encode_super_block(const typename T::Word* x, typename T::Word* residual, const Coding& at, int64_t super_block,
                        const Span& s, uint8_t* payload, SuperBlock& f) {
    if (residual) residual += s.residual;
    for (int b = 0; b < s.blocks; b++) {
        const int count = count_of(at, s, b);
        float* values = f.coefficients + b * at.block;
        const uint32_t magnitude = widen<T>(x + s.value + b * at.block, count, values);
        for (int i = count; i < at.block; i++) values[i] = values[count - 1];
        measure<T>(f, b, at, magnitude, residual);
    }
    finish(f, at, super_block, s, payload);
    for (int b = 0; residual && b < s.blocks; b++) keep_loss<T>(f, b, at, residual);
}

template <class T, class SuperBlock>
void decode_super_block(const uint8_t* const* payloads, int count, const Coding& at, int64_t super_block, const Span& s,
                        float limit, typename T::Word* out, SuperBlock& f) {
    sum_super_block(payloads, count, at, super_block, s, f);
    for (int b = 0; b < s.blocks; b++) {
        const int64_t start = b * at.block;
        const float bound = count == 1 ? 0 : f.bounds[b];
        write<T>(f.coefficients + start, count_of(at, s, b), 1 / f.shrinks[b], limit, bound, out + s.value + start);
    }
}

// kBlock: 32 or 64, whose plain super-blocks have a short way; 0: any other. The parts of all payloads follow.
template <int kBlock> struct Room {
    static constexpr int kPlain = kBlock ? kBlock : 32;
    SuperBlock<kBlock ? kBlock : 1024> any;
    Plain<kPlain> plain;

    Part<kPlain>* parts() { return (Part<kPlain>*)(this + 1); }
    static void* make(int payloads) {
        return aligned_alloc(64, (sizeof(Room) + payloads * sizeof(Part<kPlain>) + 63) / 64 * 64);
    }
};

template <class T, int kBlock>
void encode_super_blocks(const void* x, void* lost, const Coding& at, uint8_t* payload, int64_t first, int64_t last,
                         void* room) {
    auto* residual = (typename T::Word*)lost;
    auto* values = (const typename T::Word*)x;
    auto& f = *(Room<kBlock>*)room;
    for (int64_t super_block = first; super_block < last; super_block++) {
        const Span s = at.span(super_block);
        if constexpr (kBlock != 0)
            if (residual ? encode_plain<T, kBlock, true>(values, residual, at, super_block, s, payload, f.plain)
                         : encode_plain<T, kBlock, false>(values, residual, at, super_block, s, payload, f.plain))
                continue;
        if (encode_zeros(values, residual, at, super_block, s, payload)) continue;
        encode_super_block<T>(values, residual, at, super_block, s, payload, f.any);
    }
}

template <class T, int kBlock>
void decode_super_blocks(const uint8_t* const* payloads, int count, const Coding& at, void* out, int64_t first,
                         int64_t last, void* room) {
    const float limit = count == 1 ? T::kMax : __builtin_inff();
    auto* values = (typename T::Word*)out;
    auto& f = *(Room<kBlock>*)room;
    for (int64_t super_block = first; super_block < last; super_block++) {
        const Span s = at.span(super_block);
        if constexpr (kBlock != 0)
            if (decode_plain<T, kBlock>(payloads, count, at, super_block, s, limit, values, f.parts())) continue;
        if (decode_zeros(payloads, count, at, s, values)) continue;
        decode_super_block<T>(payloads, count, at, super_block, s, limit, values, f.any);
    }
}

template <class T> constexpr auto encoder_of(int64_t block) {
    return block == 32   ? encode_super_blocks<T, 32>
           : block == 64 ? encode_super_blocks<T, 64>
                         : encode_super_blocks<T, 0>;
}

template <class T> constexpr auto decoder_of(int64_t block) {
    return block == 32   ? decode_super_blocks<T, 32>
           : block == 64 ? decode_super_blocks<T, 64>
                         : decode_super_blocks<T, 0>;
}

void* room_for(int64_t block, int payloads) {
    return block == 32 ? Room<32>::make(payloads) : block == 64 ? Room<64>::make(payloads) : Room<0>::make(0);
}

}  // namespace

void encode_rotated(const void* x, void* residual, int dtype, const Spec& spec, uint8_t* payload, int64_t first,
                    int64_t last) {
    const Coding at(spec);
    void* room = room_for(at.block, 0);
    const auto encode = dtype == kFloat32   ? encoder_of<Float32>(at.block)
                        : dtype == kFloat16 ? encoder_of<Float16>(at.block)
                                            : encoder_of<BFloat16>(at.block);
    encode(x, residual, at, payload, first, last, room);
    if (last == at.super_blocks) zero_gaps(at, payload);
    free(room);
}

void decode_sum_rotated(const uint8_t* const* payloads, int count, const Spec& spec, void* out, int dtype,
                        int64_t first, int64_t last) {
    const Coding at(spec);
    void* room = room_for(at.block, count);
    const auto decode = dtype == kFloat32   ? decoder_of<Float32>(at.block)
                        : dtype == kFloat16 ? decoder_of<Float16>(at.block)
                                            : decoder_of<BFloat16>(at.block);
    decode(payloads, count, at, out, first, last, room);
    free(room);
}

}  // namespace flashcomm::FLASHCOMM_ISA
