// Plain families of rotated blocks on the CPU: whole blocks of 32 or 64 values, none constant, strange or huge.
//
//     encode   load -> butterflies -> coefficients, largest; with the family's top known, round -> pairs -> planes
//     decode   planes -> pairs -> multiply by the step -> add, for every payload; butterflies -> store
//
// Nearly all families are plain, and everything but the planes happens in registers. What is not plain is noticed by
// its coefficients: every coefficient is a sum of all values, so NaN and Inf reach them all, and the largest is at
// least the largest value. rotated_cpu.cpp then does the family once more, block by block.
#pragma once

#include "butterflies.h"
#include "rotated_family.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// Butterflies wait for the ones before: so many values are worked on side by side, as registers allow.
constexpr int kSideBySide = kLanes == 16 ? 128 : 32;
template <int kBlock> constexpr int kBlocksAtOnce = kSideBySide > kBlock ? kSideBySide / kBlock : 1;
template <int kBlock> constexpr int kPairsAtOnce = (kLanes == 16 ? 256 : kBlock) / (2 * kLanes);  // an even number

template <int kBlocks> struct Some {
    static constexpr int kCount = kBlocks;
};

constexpr uint32_t kHugeMagnitude = (127 + 99) << 24;  // magnitude_key from which on a block is not plain

// Room for one family while it is coded.
template <int kBlock> struct Plain : Steps {
    Pairs numbers[kFamily * kBlock / 2 / kLanes];  // coefficients or their sums
    Words keys[kFamily];
    float steps[kFamily];
    uint16_t pairs[kFamily * kBlock / 2];
    uint8_t parts[kFamily * kBlock / 2];
};

// step(some, first) for all blocks, some side by side and then what is left alone; `some` has their number in its type.
template <int kSome, class Step> FC_INLINE void each_block(int blocks, Step step) {
    int b = 0;
    for (; kSome > 1 && b + kSome <= blocks; b += kSome) step(Some<kSome>(), b);
    for (; b < blocks; b++) step(Some<1>(), b);
}

// ---- encode ----------------------------------------------------------------------------------------------------

template <class T, bool kCarries>
FC_INLINE Pairs load_carried(const typename T::Word* x, const typename T::Word* lost) {
    const Pairs value = load_pairs<T>(x);
    if constexpr (!kCarries) return value;
    const Pairs carried = load_pairs<T>(lost);
    return {value.even + carried.even, value.odd + carried.odd};
}

// Coefficients and largest keys of whole blocks; false if one of them could be constant.
template <class T, int kBlock, bool kCarries>
bool rotate(const typename T::Word* x, const typename T::Word* lost, int blocks, Plain<kBlock>& f) {
    constexpr int kEach = kBlock / 2 / kLanes;
    bool vary = true;
    each_block<kBlocksAtOnce<kBlock>>(blocks, [&](auto some, int b) __attribute__((always_inline)) {
        constexpr int kCount = some.kCount * kEach;
        Pairs block[kCount];
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i++)
            block[i] = load_carried<T, kCarries>(x + b * kBlock + 2 * kLanes * i, lost + b * kBlock + 2 * kLanes * i);
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i += kEach) {
            bool varies = false;
#pragma GCC unroll 32
            for (int j = i; j < i + kEach; j++) varies = varies | any(block[j].even - block[j].odd);
            vary = vary & varies;
        }
        butterflies<kBlock>(block);
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i += kEach) {
            Words most = larger(magnitude_key(block[i].even), magnitude_key(block[i].odd));
#pragma GCC unroll 32
            for (int j = i + 1; j < i + kEach; j++)
                most = larger(most, larger(magnitude_key(block[j].even), magnitude_key(block[j].odd)));
            f.keys[b + i / kEach] = most;
#pragma GCC unroll 32
            for (int j = i; j < i + kEach; j++) f.numbers[b * kEach + j] = block[j];
        }
    });
    for (int b = blocks; b < kFamily; b++) f.keys[b] = Words{};
    return vary;
}

// The largest coefficients and the signs of their steps; false if one of them is huge, or no number.
template <int kBlock> bool measure(Plain<kBlock>& f) {
    Words most = {};
    for (int b = 0; b < kFamily; b += kLanes) {
        const Words key = largest_lanes<kLanes>(f.keys + b);
        most = larger(most, key);
        store(key >> 1, f.largest + b);
        store((~key & 1) << 7, f.scales + b);  // the step is negative where the largest coefficient is positive
        store(Vector{} + 1.0f, f.shrinks + b);
    }
    uint32_t highest = 0;
    for (int i = 0; i < kLanes; i++) highest = most[i] > highest ? most[i] : highest;
    return highest < kHugeMagnitude;
}

// Codes, even and odd ones in turn. Adding 1.5 * 2**23 leaves the rounded quotient in the lower half.
FC_INLINE Shorts quantized(Pairs c, float inverse, const Coding& at) {
    const Words even = (Words)(c.even * inverse + 0x1.8p23f), odd = (Words)(c.odd * inverse + 0x1.8p23f);
    const Shorts code = (Shorts)((even & 0xFFFF) | odd << 16) + (int16_t)at.zero;
    const Shorts above = code > 0 ? code : Shorts{};
    return above < (int16_t)at.last ? above : Shorts{} + (int16_t)at.last;
}

// Pairs of codes of the family's blocks; where something is carried on, also what they lose of it.
template <class T, int kBlock, bool kCarries>
void quantize(const typename T::Word* x, typename T::Word* lost, int blocks, const Coding& at, Plain<kBlock>& f) {
    constexpr int kEach = kBlock / 2 / kLanes;
    const Shorts radix = (Shorts)(Words{} + (1 | (uint32_t)at.radix << 16));
    each_block<kBlocksAtOnce<kBlock>>(blocks, [&](auto some, int b) __attribute__((always_inline)) {
        constexpr int kCount = some.kCount * kEach;
        Pairs block[kCount];
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i++) {
            const float inverse = f.inverses[b + i / kEach], step = f.steps[b + i / kEach];
            const Pairs c = f.numbers[b * kEach + i];
            const Shorts code = quantized(c, inverse, at);
            store(lower_halves((Words)sum_products(code, radix)), f.pairs + (b * kEach + i) * kLanes);
            const Lanes both = (Lanes)(code - (int16_t)at.zero);
            block[i] = {__builtin_convertvector(both << 16 >> 16, Vector) * step,
                        __builtin_convertvector(both >> 16, Vector) * step};
        }
        if constexpr (kCarries) {
            butterflies<kBlock>(block);
#pragma GCC unroll 32
            for (int i = 0; i < kCount; i++) {
                const int64_t place = b * kBlock + 2 * kLanes * i;
                const Pairs carried = load_carried<T, true>(x + place, lost + place);
                store_pairs<T>({carried.even - block[i].even, carried.odd - block[i].odd}, lost + place);
            }
        }
    });
}

// Encodes a family of whole blocks, and keeps what that loses; false, and nothing done, if it is not plain.
template <class T, int kBlock, bool kCarries>
bool encode_plain(const typename T::Word* x, typename T::Word* lost, const Coding& at,
                  int64_t family, uint8_t* payload, Plain<kBlock>& f) {
    const int blocks = blocks_of(at, family);
    const int64_t begin = family * kFamily * kBlock;
    if (begin + blocks * kBlock > at.numel) return false;
    x += begin, lost += kCarries ? begin : 0;
    if (!rotate<T, kBlock, kCarries>(x, lost, blocks, f) || !measure<kBlock>(f)) return false;
    fit(f, at, blocks);
    if (kCarries)
        for (int b = 0; b < kFamily; b++) f.steps[b] = step_of(f.top, f.scales[b]);
    quantize<T, kBlock, kCarries>(x, lost, blocks, at, f);
    pack(f.pairs, f.parts, at, octet_of(at, family), words_of(at, blocks), payload);
    store_steps(f, at, family, blocks, payload);
    return true;
}

// ---- decode ----------------------------------------------------------------------------------------------------

// Whether no block of the family is an escape or so large that its butterflies could overflow.
inline bool is_plain(const uint8_t* payload, const Coding& at, int64_t family, int blocks) {
    const uint8_t* scales = payload + at.scales + family * kFamily;
    uint8_t largest = 0;
    for (int b = 0; b < blocks; b++) {
        const uint8_t distance = scales[b] & 0x7F;
        largest = distance > largest ? distance : largest;
    }
    return largest <= kLast && top_of(payload, at, family) < kHugeKey;
}

// Finite numbers; float16 alone has a range that they may leave.
template <class T> inline Pairs limited(Pairs x, float limit) {
    if constexpr (T::kMax > 1e30f) return x;
    const auto limit_of = [limit](Vector v) {
        v = v < -limit ? Vector{} - limit : v;
        return v > limit ? Vector{} + limit : v;
    };
    return {limit_of(x.even), limit_of(x.odd)};
}

// One payload's codes of a family, and the steps of its blocks.
template <int kBlock> struct Part {
    float steps[kFamily];
    uint16_t pairs[kFamily * kBlock / 2];
};

template <int kBlock>
void load_part(const uint8_t* payload, const Coding& at, int64_t family, int blocks,
               uint8_t* bytes, Part<kBlock>& part) {
    const uint8_t* scales = payload + at.scales + family * kFamily;
    const uint32_t top = top_of(payload, at, family);
    if (blocks == kFamily)
        for (int b = 0; b < kFamily; b++) part.steps[b] = step_of(top, scales[b]);
    else
        for (int b = 0; b < blocks; b++) part.steps[b] = step_of(top, scales[b]);
    unpack(payload, at, octet_of(at, family), words_of(at, blocks), bytes, part.pairs);
}

// 4 * kLanes codes less `zero`.
FC_INLINE Both<Shorts> digits(const uint16_t* pairs, const Coding& at) {
    const HalfWords number = load<HalfWords>(pairs);
    const HalfWords upper = upper_products(number, HalfWords{} + at.inverse) >> at.shift;
    const HalfWords lower = number - upper * (uint16_t)at.radix;
    return {(Shorts)(lower - (uint16_t)at.zero), (Shorts)(upper - (uint16_t)at.zero)};
}

// kCount pairs of vectors from pair `first` of a family on: the values of one payload, whose codes are rotated as
// integers, exactly.
template <int kBlock, int kCount>
FC_INLINE void decode_one(const Part<kBlock>& part, const Coding& at, int first, Pairs (&value)[kCount]) {
    constexpr int kEach = kBlock / 2 / kLanes;
    Both<Shorts> code[kCount / 2];
#pragma GCC unroll 32
    for (int j = 0; j < kCount; j += 2) code[j / 2] = digits(part.pairs + (first + j) * kLanes, at);
    butterflies<kBlock>(code);
#pragma GCC unroll 32
    for (int j = 0; j < kCount; j++) {
        const Vector step = part.steps[(first + j) / kEach] - Vector{};
        const Pairs number = j & 1 ? numbers<1>(code[j / 2]) : numbers<0>(code[j / 2]);
        value[j] = {scaled(number.even, step, Vector{}), scaled(number.odd, step, Vector{})};
    }
}

// The same, coefficients of one payload being added to the sums.
template <int kBlock, int kCount>
FC_INLINE void add_part(const Part<kBlock>& part, const Coding& at, int first, Pairs (&sum)[kCount]) {
    constexpr int kEach = kBlock / 2 / kLanes;
#pragma GCC unroll 32
    for (int j = 0; j < kCount; j++) {
        const Both<Shorts> code = digits(part.pairs + (first + (j & ~1)) * kLanes, at);
        const Vector step = part.steps[(first + j) / kEach] - Vector{};
        const Pairs number = j & 1 ? numbers<1>(code) : numbers<0>(code);
        sum[j] = {scaled(number.even, step, sum[j].even), scaled(number.odd, step, sum[j].odd)};
    }
}

template <class T, int kBlock, bool kOne>
void write_family(const Part<kBlock>* parts, int count, const Coding& at, int blocks, float limit,
                  typename T::Word* out) {
    constexpr int kCount = kPairsAtOnce<kBlock>;
    const int pairs = blocks * (kBlock / 2 / kLanes);
    for (int i = 0; i < pairs; i += kCount) {
        Pairs value[kCount] = {};
        if constexpr (kOne) {
            decode_one(parts[0], at, i, value);
        } else {
            for (int p = 0; p < count; p++) add_part(parts[p], at, i, value);
            butterflies<kBlock>(value);
        }
#pragma GCC unroll 32
        for (int j = 0; j < kCount; j++)
            if (i + j < pairs) store_pairs<T>(limited<T>(value[j], limit), out + (i + j) * 2 * kLanes);
    }
}

// Decodes a family of whole blocks and writes the sum of all payloads; false, and nothing done, if it is not plain.
template <class T, int kBlock>
bool decode_plain(const uint8_t* const* payloads, int count, const Coding& at, int64_t family,
                  float limit, typename T::Word* out, uint8_t* bytes, Part<kBlock>* parts) {
    const int blocks = blocks_of(at, family);
    if ((family * kFamily + blocks) * kBlock > at.numel) return false;
    for (int p = 0; p < count; p++)
        if (!is_plain(payloads[p], at, family, blocks)) return false;
    for (int p = 0; p < count; p++) load_part<kBlock>(payloads[p], at, family, blocks, bytes, parts[p]);
    if (count == 1) write_family<T, kBlock, true>(parts, count, at, blocks, limit, out + family * kFamily * kBlock);
    else write_family<T, kBlock, false>(parts, count, at, blocks, limit, out + family * kFamily * kBlock);
    return true;
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
