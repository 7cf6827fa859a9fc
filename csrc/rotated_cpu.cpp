// The rotated codec on the CPU: a family of 32 blocks at a time, through stages that are plain loops over vectors.
//
//     encode   load -> butterflies -> largest coefficient; then, with the family's top known, round -> pack
//     decode   unpack -> multiply by the step -> add, for every payload; butterflies -> write
//
// Families without strange numbers (NaN, Inf, huge) take the short way, others are looked at block by block.
#include <stdlib.h>

#include "api.h"
#include "butterflies.h"
#include "rotated_cpu.h"
#include "rotated_family.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// ---- encode ----------------------------------------------------------------------------------------------------

// Values [count] as float32, with the residual added where there is one; returns the largest magnitude's bits, those of
// Inf or more if a value, or a sum, is not finite.
template <class T, int kCount>
inline uint32_t load(const typename T::Word* __restrict x, const typename T::Word* __restrict lost, int count,
                     float* __restrict out) {
    using Word = typename T::Word;
    constexpr Word kMagnitude = (Word)((Word)~(Word)0 >> 1);
    if (kCount) count = kCount;
    Word largest = 0;
    for (int i = 0; i < count; i++) {
        const Word magnitude = x[i] & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int i = 0; i < count; i++) out[i] = T::widen(x[i]);
    if (largest >= T::kInfinity) return Float32::kInfinity;
    if (!lost) return bits_of(T::widen(largest));
    uint32_t most = 0;
    for (int i = 0; i < count; i++) {
        out[i] = out[i] + T::widen(lost[i]);
        const uint32_t magnitude = bits_of(out[i]) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

// Whether all values of a block are equal; then `bits` is the value, -0 if there is one among zeros.
inline bool is_constant(const float* x, int block, uint32_t& bits) {
    bits = bits_of(x[0]);
    for (int i = 1; i < block; i++) {
        if (x[i] != x[0]) return false;
        bits |= bits_of(x[i]);
    }
    return true;
}

// Notes what block b needs beside its coefficients: an escape, or how it is shrunk.
inline void note(Family& f, int b, const RotatedLayout& at, uint32_t magnitude) {
    float* x = f.coefficients + b * at.block;
    const bool is_nan = magnitude >= Float32::kInfinity;
    f.shrinks[b] = 1;
    f.largest[b] = 0;
    f.scales[b] = is_nan ? kNanBlock : is_constant(x, (int)at.block, f.constants[b]) ? kConstant : 0;
    if (f.scales[b] || float_of(magnitude) < kHugeStep) return;
    f.shrinks[b] = kShrink;
    for (int i = 0; i < at.block; i++) x[i] *= kShrink;
}

// Rotates all blocks and notes their largest coefficients and the signs of their steps. One loop for each, so that
// nothing is read right after it was written.
template <int kBlock> void rotate(Family& f, const RotatedLayout& at, int blocks) {
    for (int b = 0; b < blocks; b++) butterflies<kBlock>(f.coefficients + b * at.block, (int)at.block);
    for (int b = 0; b < blocks; b++) {
        const uint32_t key = largest_key<kBlock>(f.coefficients + b * at.block, (int)at.block);
        if (is_escape(f.scales[b])) continue;
        f.largest[b] = float_of(key >> 1);
        f.scales[b] = key & 1 ? 0 : 0x80;  // the step is negative where the largest coefficient is positive
    }
}

// The family's top, and of every block its distance and the reciprocal of its step, from the largest coefficients.
inline void fit(Family& f, const RotatedLayout& at, int blocks) {
    const float unit = (float)(at.block * at.zero), size = (float)at.block;
    const uint32_t half = 1u << (kKeyShift - 1), rounding = at.levels <= kNearest ? half : 2 * half - 1;
    for (int b = blocks; b < kFamily; b++) f.largest[b] = 0, f.shrinks[b] = 1, f.scales[b] = kConstant;
    uint32_t top = kLeastKey;
    for (int b = 0; b < kFamily; b++) {
        f.keys[b] = key_of(f.largest[b] / unit, rounding, f.shrinks[b]);
        const uint32_t key = (f.scales[b] & 0x7F) ? kLeastKey : f.keys[b];
        top = key > top ? key : top;
    }
    f.top = top;
    for (int b = 0; b < kFamily; b++) {
        const uint32_t scale = f.scales[b], distance = distance_of(top, f.keys[b]);
        f.inverses[b] = 1.0f / (step_of(top, distance | (scale & 0x80)) * f.shrinks[b] * size);
        f.scales[b] = (scale & 0x7F) ? scale : scale | distance;
    }
}

template <int kBlock>
void quantize(const float* __restrict x, const RotatedLayout& at, float inverse, uint8_t* __restrict codes) {
    const int block = kBlock ? kBlock : (int)at.block, zero = at.zero, last = at.levels - 1;
    for (int i = 0; i < block; i++) {
        const int code = (int)(rounded(x[i] * inverse) - 0x4B400000u) + zero;
        codes[i] = (uint8_t)(code < 0 ? 0 : code > last ? last : code);
    }
}

// Codes of a block without coefficients: the bits of its constant, or nothing.
void quantize_escape(uint32_t kind, uint32_t constant, const RotatedLayout& at, uint8_t* codes) {
    const int width = at.constant_bits();
    for (int i = 0; i < at.block; i++)
        codes[i] = kind == kConstant && i * width < 32 ? (uint8_t)(constant >> i * width & ((1 << width) - 1)) : 0;
}

// Codes and metadata of the family's blocks, whose coefficients are known.
template <int kBlock>
void finish(Family& f, const RotatedLayout& at, int64_t family, int blocks, uint8_t* payload) {
    fit(f, at, blocks);
    for (int b = 0; b < blocks; b++) {
        uint8_t* codes = f.codes + b * at.block;
        if (is_escape(f.scales[b])) quantize_escape(f.scales[b], f.constants[b], at, codes);
        else quantize<kBlock>(f.coefficients + b * at.block, at, f.inverses[b], codes);
    }
    const int64_t first = family * kFamily;
    const uint16_t top = (uint16_t)f.top;
    pack(f, at, first, blocks, payload);
    for (int b = 0; b < blocks; b++) payload[at.scales + first + b] = (uint8_t)f.scales[b];
    __builtin_memcpy(payload + at.tops + 2 * family, &top, 2);
}

// ---- decode ----------------------------------------------------------------------------------------------------

float constant_of(const uint8_t* codes, const RotatedLayout& at) {
    const int width = at.constant_bits();
    uint32_t bits = 0;
    for (int i = 0; i * width < 32; i++) bits |= (uint32_t)(codes[i] & ((1 << width) - 1)) << i * width;
    return float_of(bits);
}

// Adds one block's coefficients to the sums, which the first payload starts; returns the magnitude of its step or
// constant. A constant is a coefficient alone, a NaN block nothing but NaN.
template <int kBlock, bool kFirst>
float add(const uint8_t* __restrict codes, uint32_t scale, uint32_t top, const RotatedLayout& at, float shrink,
          float* __restrict sums) {
    const int block = kBlock ? kBlock : (int)at.block, zero = at.zero, kind = scale & 0x7F;
    if (kind == kConstant) {
        const float value = constant_of(codes, at);
        for (int i = 1; i < block; i++) sums[i] = kFirst ? 0.0f : sums[i] + 0.0f;
        sums[0] = kFirst ? value * shrink : sums[0] + value * shrink;
        return value < 0 ? -value : value;
    }
    const float step = kind == kNanBlock ? float_of(Float32::kNan) : step_of(top, scale);
    const float shrunk = step * shrink;
    for (int i = 0; i < block; i++) {
        const float coefficient = (float)((int)codes[i] - zero) * shrunk;
        sums[i] = kFirst ? coefficient : sums[i] + coefficient;
    }
    return step < 0 ? -step : step;
}

template <int kBlock, bool kFirst>
void add_family(const uint8_t* payload, const RotatedLayout& at, int64_t family, int blocks, Family& f) {
    const uint8_t* scales = payload + at.scales + family * kFamily;
    const uint32_t top = top_of(payload, at, family);
    unpack(payload, at, family * kFamily, blocks, f);
    for (int b = 0; b < blocks; b++) {
        const int64_t start = b * at.block;
        const float size = add<kBlock, kFirst>(f.codes + start, scales[b], top, at, f.shrinks[b], f.coefficients + start);
        f.sizes[b] = size > f.sizes[b] ? size : f.sizes[b];
    }
}

// The sums of all payloads' values, float32, in f.coefficients, still to be multiplied by 1 / f.shrinks. Blocks whose
// butterflies could overflow are found while adding, and then everything is added once more, those shrunk.
template <int kBlock>
void sum_family(const uint8_t* const* payloads, int count, const RotatedLayout& at, int64_t family, int blocks,
                Family& f) {
    for (int b = 0; b < blocks; b++) f.shrinks[b] = 1, f.sizes[b] = 0;
    for (bool is_done = false; !is_done;) {
        add_family<kBlock, true>(payloads[0], at, family, blocks, f);
        for (int p = 1; p < count; p++) add_family<kBlock, false>(payloads[p], at, family, blocks, f);
        is_done = true;
        for (int b = 0; b < blocks; b++)
            if (f.sizes[b] >= kHugeStep && f.shrinks[b] == 1) f.shrinks[b] = kShrink, is_done = false;
    }
    for (int b = 0; b < blocks; b++) butterflies<kBlock>(f.coefficients + b * at.block, (int)at.block);
}

// Whether no block of the family is an escape or so large that its butterflies could overflow.
inline bool is_plain(const uint8_t* payload, const RotatedLayout& at, int64_t family, int blocks) {
    const uint8_t* scales = payload + at.scales + family * kFamily;
    uint8_t largest = 0;
    for (int b = 0; b < blocks; b++) {
        const uint8_t distance = scales[b] & 0x7F;
        largest = distance > largest ? distance : largest;
    }
    return largest <= kLast && top_of(payload, at, family) < kHugeKey;
}

template <int kBlock, bool kFirst>
inline void add_block(const uint8_t* __restrict codes, float step, int zero, int block, float* __restrict sums) {
    if (kBlock) block = kBlock;
    for (int i = 0; i < block; i++) {
        const float coefficient = (float)((int)codes[i] - zero) * step;
        sums[i] = kFirst ? coefficient : sums[i] + coefficient;
    }
}

// Numbers that are finite, and in the range of every dtype but float16.
template <class T, int kBlock>
inline void write_plain(const float* __restrict sums, int block, float limit, typename T::Word* __restrict out) {
    if (kBlock) block = kBlock;
    for (int i = 0; i < block; i++) {
        float x = sums[i];
        if (T::kMax < 1e30f) x = x < -limit ? -limit : x > limit ? limit : x;
        out[i] = (typename T::Word)T::narrow(x);
    }
}

// Adds one payload's part to the sums, which the first starts; the last rotates them and writes the tensor.
template <class T, int kBlock, bool kFirst, bool kLast>
void add_plain(const uint8_t* payload, const RotatedLayout& at, int64_t family, int blocks, float limit, Family& f,
               typename T::Word* out) {
    const int block = kBlock ? kBlock : (int)at.block, zero = at.zero;
    const uint8_t* scales = payload + at.scales + family * kFamily;
    const uint32_t top = top_of(payload, at, family);
    unpack(payload, at, family * kFamily, blocks, f);
    for (int b = 0; b < blocks; b++)
        add_block<kBlock, kFirst>(f.codes + b * block, step_of(top, scales[b]), zero, block, f.coefficients + b * block);
    for (int b = 0; kLast && b < blocks; b++) {  // a loop of its own: what was added last is not read at once
        butterflies<kBlock>(f.coefficients + b * block, block);
        write_plain<T, kBlock>(f.coefficients + b * block, block, limit, out + (family * kFamily + b) * block);
    }
}

template <class T, int kBlock>
void decode_plain(const uint8_t* const* payloads, int count, const RotatedLayout& at, int64_t family, int blocks,
                  float limit, Family& f, typename T::Word* out) {
    for (int p = 0; p < count; p++) {
        const bool is_last = p == count - 1;
        const auto add = p == 0 ? is_last ? add_plain<T, kBlock, true, true> : add_plain<T, kBlock, true, false>
                         : is_last ? add_plain<T, kBlock, false, true> : add_plain<T, kBlock, false, false>;
        add(payloads[p], at, family, blocks, limit, f, out);
    }
}

// One payload's values are limited to the finite range of the tensor's dtype.
template <class T>
void write(const float* __restrict sums, int count, float grow, float limit, typename T::Word* __restrict out) {
    for (int i = 0; i < count; i++) {
        float x = sums[i] * grow;
        x = x < -limit ? -limit : x > limit ? limit : x;
        out[i] = x == x ? (typename T::Word)T::narrow(x) : T::kNan;
    }
}

// ---- families of a tensor ----------------------------------------------------------------------------------------

template <class T, int kBlock>
void load_family(const typename T::Word* x, const typename T::Word* lost, const RotatedLayout& at, int64_t family,
                 Family& f) {
    for (int b = 0; b < blocks_of(at, family); b++) {
        const int64_t index = family * kFamily + b, begin = index * at.block;
        const int count = count_of(at, index);
        float* values = f.coefficients + b * at.block;
        const auto* before = lost ? lost + begin : nullptr;
        const uint32_t magnitude = count == kBlock ? load<T, kBlock>(x + begin, before, count, values)
                                                   : load<T, 0>(x + begin, before, count, values);
        for (int i = count; i < at.block; i++) values[i] = values[count - 1];
        if (lost) __builtin_memcpy(f.carried + b * at.block, values, at.block * sizeof(float));
        note(f, b, at, magnitude);
    }
    rotate<kBlock>(f, at, blocks_of(at, family));
}

// What the encoding in `payload` lost of f.carried.
template <class T, int kBlock>
void keep_loss(const uint8_t* payload, const RotatedLayout& at, int64_t family, typename T::Word* lost, Family& f) {
    const int blocks = blocks_of(at, family), size = (int)at.block;
    if (is_plain(payload, at, family, blocks)) {  // its codes are still at hand
        for (int b = 0; b < blocks; b++)
            add_block<kBlock, true>(f.codes + b * size, step_of(f.top, f.scales[b]), at.zero, size,
                                    f.coefficients + b * size);
        for (int b = 0; b < blocks; b++) butterflies<kBlock>(f.coefficients + b * size, size), f.shrinks[b] = 1;
    } else {
        sum_family<kBlock>(&payload, 1, at, family, blocks, f);
    }
    for (int b = 0; b < blocks; b++) {
        const int64_t index = family * kFamily + b, begin = index * at.block;
        const float *carried = f.carried + b * at.block, *sums = f.coefficients + b * at.block;
        const float grow = 1 / f.shrinks[b], limit = Float32::kMax;
        const int count = count_of(at, index);
        auto* __restrict kept = lost + begin;
        for (int i = 0; i < count; i++) {
            const float x = sums[i] * grow;
            const float loss = carried[i] - (x < -limit ? -limit : x > limit ? limit : x);
            kept[i] = (typename T::Word)choose(mask((bits_of(loss) & 0x7FFFFFFF) < Float32::kInfinity), T::narrow(loss), 0);
        }
    }
}

template <class T, int kBlock>
void encode_families(const void* x, void* residual, const RotatedLayout& at, uint8_t* payload, int64_t first,
                     int64_t last, Family& f) {
    auto* lost = (typename T::Word*)residual;
    for (int64_t family = first; family < last; family++) {
        load_family<T, kBlock>((const typename T::Word*)x, lost, at, family, f);
        finish<kBlock>(f, at, family, blocks_of(at, family), payload);
        if (lost) keep_loss<T, kBlock>(payload, at, family, lost, f);
    }
}

template <class T, int kBlock>
void decode_families(const uint8_t* const* payloads, int count, const RotatedLayout& at, void* out, int64_t first,
                     int64_t last, Family& f) {
    const float limit = count == 1 ? T::kMax : __builtin_inff();
    for (int64_t family = first; family < last; family++) {
        const int blocks = blocks_of(at, family);
        bool all_plain = (family * kFamily + blocks) * at.block <= at.numel;
        for (int p = 0; p < count; p++) all_plain = all_plain && is_plain(payloads[p], at, family, blocks);
        if (all_plain) {
            decode_plain<T, kBlock>(payloads, count, at, family, blocks, limit, f, (typename T::Word*)out);
            continue;
        }
        sum_family<kBlock>(payloads, count, at, family, blocks, f);
        for (int b = 0; b < blocks; b++) {
            const int64_t index = family * kFamily + b;
            write<T>(f.coefficients + b * at.block, count_of(at, index), 1 / f.shrinks[b], limit,
                     (typename T::Word*)out + index * at.block);
        }
    }
}

template <class T> constexpr auto encoder_of(int64_t block) {
    return block == 32 ? encode_families<T, 32> : block == 64 ? encode_families<T, 64> : encode_families<T, 0>;
}

template <class T> constexpr auto decoder_of(int64_t block) {
    return block == 32 ? decode_families<T, 32> : block == 64 ? decode_families<T, 64> : decode_families<T, 0>;
}

}  // namespace

void encode_rotated(const void* x, void* residual, int dtype, const Spec& spec, uint8_t* payload, int64_t first,
                    int64_t last) {
    const RotatedLayout at(spec.numel, spec.bits, spec.block);
    Family* f = (Family*)aligned_alloc(alignof(Family), sizeof(Family));
    const auto encode = dtype == kFloat32 ? encoder_of<Float32>(at.block)
                      : dtype == kFloat16 ? encoder_of<Float16>(at.block) : encoder_of<BFloat16>(at.block);
    encode(x, residual, at, payload, first / kFamily, (last + kFamily - 1) / kFamily, *f);
    if (last == at.blocks) zero_gaps(at, payload);
    free(f);
}

void decode_sum_rotated(const uint8_t* const* payloads, int count, const Spec& spec, void* out, int dtype,
                        int64_t first, int64_t last) {
    const RotatedLayout at(spec.numel, spec.bits, spec.block);
    Family* f = (Family*)aligned_alloc(alignof(Family), sizeof(Family));
    const auto decode = dtype == kFloat32 ? decoder_of<Float32>(at.block)
                      : dtype == kFloat16 ? decoder_of<Float16>(at.block) : decoder_of<BFloat16>(at.block);
    decode(payloads, count, at, out, first / kFamily, (last + kFamily - 1) / kFamily, *f);
    free(f);
}

}  // namespace flashcomm::FLASHCOMM_ISA
