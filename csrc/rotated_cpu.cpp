// The rotated codec on the CPU: a family of 32 blocks at a time, through stages that are plain loops over vectors.
//
//     encode   load -> butterflies -> largest coefficient; then, with the family's top known, round -> pack
//     decode   unpack -> multiply by the step -> add, for every payload; butterflies -> write
//
// Butterflies within a vector are a shuffle, a change of signs and an addition; between vectors, plain additions. Both
// add the same two numbers in the same order as the definition, so the bits are the same on every instruction set.
#include "rotated.h"

#include <stdlib.h>

#include "api.h"
#include "planes.h"
#include "rotated_cpu.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kMostValues = kFamily * 1024;  // of a family of the largest blocks
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

// ---- butterflies -----------------------------------------------------------------------------------------------

// Every lane's partner, kStride away.
template <int kStride> inline Vector partners(Vector x) {
    Lanes lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i ^ kStride;
#if defined(__clang__)
    Vector y;
    for (int i = 0; i < kLanes; i++) y[i] = x[lane[i]];
    return y;
#else
    return __builtin_shuffle(x, lane);
#endif
}

// (a, b) -> (a + b, a - b) for lanes kStride apart: the partner, plus this lane with its sign changed where it is b.
template <int kStride> inline Vector across(Vector x) {
    Lanes sign;
    for (int i = 0; i < kLanes; i++) sign[i] = i & kStride ? INT32_MIN : 0;
    return partners<kStride>(x) + (Vector)((Lanes)x ^ sign);
}

inline Vector within(Vector x) {
    x = across<2>(across<1>(x));
    if constexpr (kLanes > 4) x = across<4>(x);
    if constexpr (kLanes > 8) x = across<8>(x);
    return x;
}

inline void pair(Vector& a, Vector& b) {
    const Vector sum = a + b;
    b = a - b;
    a = sum;
}

// Smallest and largest so far; no number is NaN.
struct Range {
    Vector low, high;
    void include(Vector x) {
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    template <int kStride> void meet() {
        const Vector other = partners<kStride>(high);
        include(partners<kStride>(low));
        high = other > high ? other : high;
    }
    void reduce() {
        if constexpr (kLanes > 8) meet<8>();
        if constexpr (kLanes > 4) meet<4>();
        meet<2>();
        meet<1>();
    }
};

// A block as vectors: in registers if its size is known, else where it lies.
template <int kBlock> struct Block {
    static constexpr int kCount = kBlock / kLanes;
    Vector v[kCount];
    Block(const float* x, int) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; i++) v[i] = ((const Vector*)x)[i];
    }
    void store(float* x) const {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; i++) ((Vector*)x)[i] = v[i];
    }
    void scale(float factor) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; i++) v[i] *= factor;
    }
    void butterflies() {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; i++) v[i] = within(v[i]);
#pragma GCC unroll 16
        for (int stride = 1; stride < kCount; stride *= 2)
#pragma GCC unroll 16
            for (int i = 0; i < kCount; i++)
                if (!(i & stride)) pair(v[i], v[i + stride]);
    }
    Range range() const {
        Range r = {v[0], v[0]};
#pragma GCC unroll 16
        for (int i = 1; i < kCount; i++) r.include(v[i]);
        r.reduce();
        return r;
    }
};

template <> struct Block<0> {
    Vector* v;
    int count;
    Block(float* x, int block) : v((Vector*)x), count(block / kLanes) {}
    void store(float*) const {}
    void scale(float factor) {
        for (int i = 0; i < count; i++) v[i] *= factor;
    }
    void butterflies() {
        for (int i = 0; i < count; i++) v[i] = within(v[i]);
        for (int stride = 1; stride < count; stride *= 2)
            for (int start = 0; start < count; start += 2 * stride)
                for (int i = start; i < start + stride; i++) pair(v[i], v[i + stride]);
    }
    Range range() const {
        Range r = {v[0], v[0]};
        for (int i = 1; i < count; i++) r.include(v[i]);
        r.reduce();
        return r;
    }
};

// What is known of one family while it is coded; the arrays hold its blocks one after the other.
struct alignas(64) Family {
    float coefficients[kMostValues], carried[kMostValues];
    uint8_t codes[kMostValues], parts[kMostValues / 2];
    uint16_t words[kMostValues / 2];
    uint32_t keys[kFamily], constants[kFamily], top;
    float shrinks[kFamily], sizes[kFamily];
    uint8_t scales[kFamily];
};

// ---- encode ----------------------------------------------------------------------------------------------------

// The tensor's words, with the residual added where there is one; false if a value is not finite.
template <class T, int kCount>
inline bool load(const typename T::Word* __restrict x, const typename T::Word* __restrict lost, int count,
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
    if (!lost) return largest < T::kInfinity;
    uint32_t sum = 0;
    for (int i = 0; i < count; i++) {
        out[i] = out[i] + T::widen(lost[i]);
        const uint32_t magnitude = bits_of(out[i]) & 0x7FFFFFFF;
        sum = magnitude > sum ? magnitude : sum;
    }
    return largest < T::kInfinity && sum < Float32::kInfinity;
}

// A constant's float32 bits: any value's, but -0 if there is one among zeros.
inline uint32_t bits_of_constant(const float* x, int block) {
    uint32_t bits = bits_of(x[0]);
    for (int i = 1; i < block && x[0] == 0; i++) bits |= bits_of(x[i]);
    return bits;
}

// Rotates block b in place and finds the key of its step; `scales` becomes the escape's code, or the sign of the step.
template <int kBlock> void rotate(Family& f, int b, const RotatedLayout& at, bool is_finite) {
    float* x = f.coefficients + b * at.block;
    f.keys[b] = kLeastKey;
    f.shrinks[b] = 1;
    f.scales[b] = kNanBlock;
    if (!is_finite) return;
    Block<kBlock> block(x, (int)at.block);
    const Range range = block.range();
    if (range.low[0] == range.high[0]) {
        f.scales[b] = kConstant;
        f.constants[b] = bits_of_constant(x, (int)at.block);
        return;
    }
    if (range.low[0] <= -kHugeStep || range.high[0] >= kHugeStep) {
        f.shrinks[b] = kShrink;
        block.scale(kShrink);
    }
    block.butterflies();
    block.store(x);
    const Range rotated = block.range();
    const float low = rotated.low[0], high = rotated.high[0];
    f.scales[b] = high > -low ? 0x80 : 0;
    f.keys[b] = key_of(high > -low ? high : -low, at, f.shrinks[b] < 1);
}

template <int kBlock>
void quantize(const float* __restrict x, const RotatedLayout& at, float inverse, uint8_t* __restrict codes) {
    const int block = kBlock ? kBlock : (int)at.block, zero = at.zero, last = at.levels - 1;
    for (int i = 0; i < block; i++) {
        const int code = (int)(rounded(x[i] * inverse) - 0x4B400000u) + zero;
        codes[i] = (uint8_t)(code < 0 ? 0 : code > last ? last : code);
    }
}

inline bool is_escape(uint32_t scale) { return (scale & 0x7F) > kLast; }

// Codes of a block without coefficients: the bits of its constant, or nothing.
void quantize_escape(uint32_t kind, uint32_t constant, const RotatedLayout& at, uint8_t* codes) {
    const int width = at.constant_bits();
    for (int i = 0; i < at.block; i++)
        codes[i] = kind == kConstant && i * width < 32 ? (uint8_t)(constant >> i * width & ((1 << width) - 1)) : 0;
}

void pack(Family& f, const RotatedLayout& at, int64_t first, int blocks, uint8_t* payload) {
    const int words = (int)(blocks * at.block / at.together);
    const int64_t octet = first * at.block / at.together / 8;
    const uint8_t* low = f.codes;
    if (at.together == 2) {
        const Word16* pairs = (const Word16*)f.codes;
        const uint16_t levels = (uint16_t)at.levels;
        for (int i = 0; i < words; i++) f.words[i] = (uint16_t)((pairs[i] & 0xFF) * levels + (pairs[i] >> 8));
        for (int i = 0; i < words; i++) f.parts[i] = (uint8_t)f.words[i];
        low = f.parts;
    }
    bool is_low = true;
    at.each_plane([&](int width, int shift, int64_t start) {
        uint8_t* plane = payload + start + octet * width;
        if (shift >= 8 && is_low) {
            for (int i = 0; i < words; i++) f.parts[i] = (uint8_t)(f.words[i] >> 8);
            is_low = false;
        }
        if (width == 8) __builtin_memcpy(plane, low, words);
        else pack_plane(width, low, words, shift & 7, plane);
    });
}

// Codes and metadata of the family's blocks, of which coefficients and keys are known.
template <int kBlock>
void finish(Family& f, const RotatedLayout& at, int64_t family, int blocks, uint8_t* payload) {
    f.top = kLeastKey;
    for (int b = 0; b < blocks; b++) f.top = f.keys[b] > f.top ? f.keys[b] : f.top;
    for (int b = 0; b < blocks; b++) {
        uint8_t* codes = f.codes + b * at.block;
        if (is_escape(f.scales[b])) {
            quantize_escape(f.scales[b], f.constants[b], at, codes);
        } else {
            f.scales[b] |= (uint8_t)distance_of(f.top, f.keys[b]);
            const float inverse = 1.0f / (step_of(f.top, f.scales[b]) * f.shrinks[b] * (float)at.block);
            quantize<kBlock>(f.coefficients + b * at.block, at, inverse, codes);
        }
    }
    const int64_t first = family * kFamily;
    const uint16_t top = (uint16_t)f.top;
    pack(f, at, first, blocks, payload);
    __builtin_memcpy(payload + at.scales + first, f.scales, blocks);
    __builtin_memcpy(payload + at.tops + 2 * family, &top, 2);
}

// ---- decode ----------------------------------------------------------------------------------------------------

void unpack(const uint8_t* payload, const RotatedLayout& at, int64_t first, int blocks, Family& f) {
    const int words = (int)(blocks * at.block / at.together);
    const int64_t octet = first * at.block / at.together / 8;
    uint8_t* low = at.together == 2 ? f.parts : f.codes;
    for (int i = 0; at.together == 2 && i < words; i++) f.words[i] = 0;
    bool is_low = true;
    at.each_plane([&](int width, int shift, int64_t start) {
        const uint8_t* plane = payload + start + octet * width;
        if (shift == 8 && is_low) {
            for (int i = 0; i < words; i++) f.words[i] = f.parts[i];
            is_low = false;
        }
        if (width == 8) __builtin_memcpy(low, plane, words);
        else unpack_plane(width, plane, words, shift & 7, low);
    });
    if (at.together == 1) return;
    const uint32_t levels = (uint32_t)at.levels, inverse = (1u << 24) / levels + 1;  // exact below 181 * 181
    const int shift = is_low ? 0 : 8;
    Word16* pairs = (Word16*)f.codes;
    for (int i = 0; i < words; i++) {
        const uint32_t word = f.words[i] | (uint32_t)f.parts[i] << shift, upper = word * inverse >> 24;
        pairs[i] = (Word16)(upper | (word - upper * levels) << 8);
    }
}

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
    uint16_t top;
    __builtin_memcpy(&top, payload + at.tops + 2 * family, 2);
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
    for (int b = 0; b < blocks; b++) {
        Block<kBlock> block(f.coefficients + b * at.block, (int)at.block);
        block.butterflies();
        block.store(f.coefficients + b * at.block);
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

inline int count_of(const RotatedLayout& at, int64_t block) {
    const int64_t left = at.numel - block * at.block;
    return (int)(left < at.block ? left : at.block);
}

inline int blocks_of(const RotatedLayout& at, int64_t family) {
    const int64_t left = at.blocks - family * kFamily;
    return (int)(left < kFamily ? left : kFamily);
}

template <class T, int kBlock>
void load_family(const typename T::Word* x, const typename T::Word* lost, const RotatedLayout& at, int64_t family,
                 Family& f) {
    for (int b = 0; b < blocks_of(at, family); b++) {
        const int64_t index = family * kFamily + b, begin = index * at.block;
        const int count = count_of(at, index);
        float* values = f.coefficients + b * at.block;
        const auto* before = lost ? lost + begin : nullptr;
        const bool is_finite = count == kBlock ? load<T, kBlock>(x + begin, before, count, values)
                                               : load<T, 0>(x + begin, before, count, values);
        for (int i = count; i < at.block; i++) values[i] = values[count - 1];
        if (lost) __builtin_memcpy(f.carried + b * at.block, values, at.block * sizeof(float));
        rotate<kBlock>(f, b, at, is_finite);
    }
}

// What the encoding in `payload` lost of f.carried.
template <class T, int kBlock>
void keep_loss(const uint8_t* payload, const RotatedLayout& at, int64_t family, typename T::Word* lost, Family& f) {
    const int blocks = blocks_of(at, family);
    sum_family<kBlock>(&payload, 1, at, family, blocks, f);
    for (int b = 0; b < blocks; b++) {
        const int64_t index = family * kFamily + b, begin = index * at.block;
        const float *carried = f.carried + b * at.block, *sums = f.coefficients + b * at.block;
        const float grow = 1 / f.shrinks[b], limit = Float32::kMax;
        for (int i = 0; i < count_of(at, index); i++) {
            const float x = sums[i] * grow;
            const float loss = carried[i] - (x < -limit ? -limit : x > limit ? limit : x);
            lost[begin + i] = (bits_of(loss) & 0x7FFFFFFF) < Float32::kInfinity ? (typename T::Word)T::narrow(loss) : 0;
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

void zero_gaps(const RotatedLayout& at, uint8_t* payload) {
    const auto zero = [payload](int64_t start, int64_t size) {
        for (int64_t i = size; i < Layout::padded(size); i++) payload[start + i] = 0;
    };
    at.each_plane([&](int width, int, int64_t start) { zero(start, at.words / 8 * width); });
    zero(at.scales, at.blocks);
    zero(at.tops, 2 * at.families);
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
