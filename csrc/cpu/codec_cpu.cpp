// The CPU codec: the same numbers as codec.h, many blocks at a time.
//
// Work goes in strips that fit the first-level cache, through stages that are plain loops over whole vectors:
//
//     encode   extremes -> fit -> quantize -> pack         (one pass over memory: a strip is read twice from L1)
//     decode   unpack -> load -> accumulate                (once for every payload; the last one writes the output)
//
// The loops are written for compilers to vectorise, and setup.py compiles this file once for every instruction set,
// each in its own namespace. Two 16-bit values share a 32-bit lane all the way, which spares every shuffle.
// Strange blocks (NaN, escaped, huge or tiny scales, saturating) run through the loops like all others and are then
// done again by codec.h, which also does blocks of other sizes than 32, 64 and 128 values.
#include "api.h"

#include "format/codec.h"
#include "cpu/planes.h"
#include "cpu/rotated_cpu.h"
#include "cpu/spike_cpu.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace flashcomm::FLASHCOMM_ISA {
namespace {

constexpr int kStrip = 2048;             // values
constexpr int kMaxBlocks = kStrip / 32;  // blocks of a strip

// A strip's intermediate results: one array for each quantity, so that stages are loops without strides. Stages take
// arrays, never the whole: what a loop reads and writes must be objects of their own to the compiler.
struct alignas(64) Strip {
    uint8_t codes[kStrip];
    float sums[kStrip];
    uint32_t low_keys[kMaxBlocks], high_keys[kMaxBlocks], metadata[kMaxBlocks], strange[kMaxBlocks];
    float minima[kMaxBlocks], inverses[kMaxBlocks], scales[kMaxBlocks], sizes[kMaxBlocks];
};

template <int kValue> struct Int {
    static constexpr int value = kValue;
};

// Where a strip begins.
struct Place {
    int64_t block, octet, value;
};

// ---- encode --------------------------------------------------------------------------------------------------

// Smallest and largest key of every block, in explicit vectors, since compilers differ most in reductions. The last
// eight lanes meet in an unsigned minimum, of complements for the largest key: one instruction on x86 and Arm.
template <class T, int kBlock>
void extremes(const typename T::Word* __restrict x, int blocks, uint32_t* __restrict low_keys,
              uint32_t* __restrict high_keys) {
    using Word = typename T::Word;
    constexpr int kBytes = 32, kLanes = kBytes / sizeof(Word), kTop = 8 * sizeof(Word) - 1;
    typedef Word Vector __attribute__((vector_size(kBytes)));
    typedef typename T::Signed Signed __attribute__((vector_size(kBytes)));
    for (int b = 0; b < blocks; b++) {
        Vector least = ~Vector{}, most = {};
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; i += kLanes, x += kLanes) {
            Vector key;
            __builtin_memcpy(&key, x, kBytes);
            key ^= (Vector)((Signed)key >> kTop) | (Word)((Word)1 << kTop);
            least = key < least ? key : least;
            most = key > most ? key : most;
        }
        Word low[kLanes], high[kLanes], low_key = (Word) ~(Word)0, high_key = low_key;
        most = ~most;
        __builtin_memcpy(low, &least, kBytes);
        __builtin_memcpy(high, &most, kBytes);
        for (int i = 0; i < kLanes / 2; i++) {
            const Word key = low[i] < low[i + kLanes / 2] ? low[i] : low[i + kLanes / 2];
            low_key = key < low_key ? key : low_key;
        }
        for (int i = 0; i < kLanes / 2; i++) {
            const Word key = high[i] < high[i + kLanes / 2] ? high[i] : high[i + kLanes / 2];
            high_key = key < high_key ? key : high_key;
        }
        low_keys[b] = low_key;
        high_keys[b] = (Word)~high_key;
    }
}

template <class T, class Metadata>
void fit(const uint32_t* __restrict low_keys, const uint32_t* __restrict high_keys, int blocks, float levels,
         float* __restrict minima, float* __restrict inverses, uint32_t* __restrict metadata,
         uint32_t* __restrict strange) {
    for (int b = 0; b < blocks; b++) {
        const Fit fit = Metadata::template fit<T>(low_keys[b], high_keys[b], levels);
        minima[b] = fit.minimum;
        inverses[b] = fit.inverse;
        metadata[b] = fit.scale_bits | fit.minimum_bits << 16;
        strange[b] = ~fit.plain;
    }
}

template <class T, int kBlock>
void quantize(const typename T::Word* __restrict x, const float* __restrict minima, const float* __restrict inverses,
              int blocks, uint8_t* __restrict codes) {
    for (int b = 0; b < blocks; b++, x += kBlock, codes += kBlock) {
        const float minimum = minima[b], inverse = inverses[b];
        if constexpr (sizeof(*x) == 2) {
            const Word32* pairs = (const Word32*)x;
            for (int i = 0; i < kBlock / 2; i++) {
                const uint32_t even = rounded((T::widen(pairs[i] & 0xFFFF) - minimum) * inverse);
                const uint32_t odd = rounded((T::widen(pairs[i] >> 16) - minimum) * inverse);
                ((Word16*)codes)[i] = (Word16)((even & 0xFF) | odd << 8);
            }
        } else {
            for (int i = 0; i < kBlock; i++) codes[i] = (uint8_t)rounded((T::widen(x[i]) - minimum) * inverse);
        }
    }
}

bool any(const uint32_t* marks, int blocks) {
    uint32_t all = 0;
    for (int b = 0; b < blocks; b++) all |= marks[b];
    return all;
}

template <class T, int kBlock>
void quantize_strange(const typename T::Word* x, int blocks, float levels, const Strip& s, uint8_t* codes) {
    for (int b = 0; b < blocks; b++) {
        if (!s.strange[b]) continue;
        const Fit fit = Bf16Pair::fit<T>(s.low_keys[b], s.high_keys[b], levels);
        for (int i = b * kBlock; i < (b + 1) * kBlock; i++) codes[i] = (uint8_t)code_of(T::widen(x[i]), fit);
    }
}

void pack(const Layout& at, int64_t octet, int values, const uint8_t* codes, uint8_t* payload) {
    at.each_plane([&](int width, int shift, int64_t start) {
        uint8_t* plane = payload + start + octet * width;
        pack_plane(width, codes, values, shift, plane);
    });
}

void store_metadata(const Layout& at, int64_t first, int blocks, const uint32_t* metadata, uint8_t* payload) {
    Word16* scales = (Word16*)(payload + at.scales) + first;
    Word16* minima = (Word16*)(payload + at.minima) + first;
    for (int b = 0; b < blocks; b++) scales[b] = (Word16)metadata[b];
    for (int b = 0; b < blocks; b++) minima[b] = (Word16)(metadata[b] >> 16);
}

template <class T, int kBlock>
void encode_strip(const typename T::Word* x, const Layout& at, Place from, int blocks, uint8_t* payload, Strip& s) {
    x += from.value;
    extremes<T, kBlock>(x, blocks, s.low_keys, s.high_keys);
    fit<T, Bf16Pair>(s.low_keys, s.high_keys, blocks, at.levels(), s.minima, s.inverses, s.metadata, s.strange);
    uint8_t* codes = at.bits == 8 ? payload + 8 * from.octet : s.codes;  // a plane of 8 bits is the codes themselves
    quantize<T, kBlock>(x, s.minima, s.inverses, blocks, codes);
    if (any(s.strange, blocks)) quantize_strange<T, kBlock>(x, blocks, at.levels(), s, codes);
    pack(at, from.octet, blocks * kBlock, codes, payload);
    store_metadata(at, from.block, blocks, s.metadata, payload);
}

// ---- decode --------------------------------------------------------------------------------------------------

void unpack(const uint8_t* payload, const Layout& at, int64_t octet, int values, uint8_t* codes) {
    at.each_plane([&](int width, int shift, int64_t start) {
        const uint8_t* plane = payload + start + octet * width;
        unpack_plane(width, plane, values, shift, codes);
    });
}

// Marks blocks that are strange in this payload, and keeps the marks of earlier ones. sizes: how large sums may be.
template <class T>
void load_metadata(const uint8_t* payload, const Layout& at, int64_t first, int blocks, float* __restrict minima,
                   float* __restrict scales, float* __restrict sizes, uint32_t* __restrict strange) {
    const Word16* scale_bits = (const Word16*)(payload + at.scales) + first;
    const Word16* minimum_bits = (const Word16*)(payload + at.minima) + first;
    const float levels = at.levels();
    for (int b = 0; b < blocks; b++) {
        const Bf16Pair pair{scale_bits[b], minimum_bits[b]};
        scales[b] = float_of(pair.scale << 16);
        minima[b] = float_of(pair.minimum << 16);
        strange[b] |= !pair.plain<T>(levels);
        if constexpr (kIsHalf<T>) {
            const float low = minima[b] < 0 ? -minima[b] : minima[b], span = scales[b] * (levels + 1);
            sizes[b] += low + span;
        }
    }
}

// minimum + code * scale. The product is exact in plain blocks, so that both ways round once.
FC_INLINE float affine(uint32_t code, float scale, float minimum) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf((float)(int)code, scale, minimum);
#else
    return (float)(int)code * scale + minimum;
#endif
}

// Whether rounding to T is a step of its own, `round_all`, rather than a part of the loop.
template <class T> constexpr bool kRoundsApart = false;

#if defined(__F16C__)
// To float16 there is one instruction, which compilers do not find, or a dozen.
template <> constexpr bool kRoundsApart<Float16> = true;

void round_all(const float* sums, int count, uint16_t* out) {
    for (int i = 0; i < count; i += 8)
        _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Adds a payload's part to the sums, which the first starts; the last writes them to the tensor instead.
template <class T, int kBlock, bool kFirst, bool kLast>
void accumulate(const uint8_t* __restrict codes, const float* __restrict minima, const float* __restrict scales,
                int blocks, float* __restrict sums, typename T::Word* __restrict out) {
    for (int b = 0; b < blocks; b++, codes += kBlock, sums += kBlock, out += kBlock) {
        const float minimum = minima[b], scale = scales[b];
        if constexpr (sizeof(*out) == 2 && !kRoundsApart<T>) {
            constexpr int kHalf = kBlock / 2;  // sums of even values lie before those of odd ones
            for (int i = 0; i < kHalf; i++) {
                const uint32_t pair = ((const Word16*)codes)[i];
                float even = affine(pair & 0xFF, scale, minimum), odd = affine(pair >> 8, scale, minimum);
                if (!kFirst) even = sums[i] + even, odd = sums[kHalf + i] + odd;
                if (kLast) ((Word32*)out)[i] = T::narrow(even) | T::narrow(odd) << 16;
                else sums[i] = even, sums[kHalf + i] = odd;
            }
        } else {
            for (int i = 0; i < kBlock; i++) {
                float part = affine(codes[i], scale, minimum);
                if (!kFirst) part = sums[i] + part;
                if (kLast && !kRoundsApart<T>) out[i] = (typename T::Word)T::narrow(part);
                else sums[i] = part;
            }
            if constexpr (kLast && kRoundsApart<T>) round_all(sums, kBlock, out);
        }
    }
}

template <class T, int kBlock>
void decode_strip(const uint8_t* const* payloads, int count, const Layout& at, Place from, int blocks,
                  typename T::Word* out, Strip& s) {
    for (int b = 0; b < blocks; b++) s.strange[b] = 0;
    for (int b = 0; kIsHalf<T> && b < blocks; b++) s.sizes[b] = 0;
    for (int p = 0; p < count; p++) {
        const bool is_last = p == count - 1;
        const auto add = p == 0    ? is_last ? accumulate<T, kBlock, true, true> : accumulate<T, kBlock, true, false>
                         : is_last ? accumulate<T, kBlock, false, true>
                                   : accumulate<T, kBlock, false, false>;
        const uint8_t* codes = at.bits == 8 ? payloads[p] + 8 * from.octet : s.codes;
        unpack(payloads[p], at, from.octet, blocks * kBlock, s.codes);
        load_metadata<T>(payloads[p], at, from.block, blocks, s.minima, s.scales, s.sizes, s.strange);
        add(codes, s.minima, s.scales, blocks, s.sums, out + from.value);
    }
    for (int b = 0; kIsHalf<T> && count > 1 && b < blocks; b++) s.strange[b] |= s.sizes[b] >= kLarge;
    if (!any(s.strange, blocks)) return;
    for (int b = 0; b < blocks; b++)
        for (int i = 0; s.strange[b] && i < kBlock / 8; i++)
            decode_octet<T>(payloads, count, at, from.octet + b * (kBlock / 8) + i, out);
}

// ---- ranges of blocks ----------------------------------------------------------------------------------------

// code(size, place, blocks) for all blocks first .. last - 1: runs of whole blocks, and blocks that end a row, alone.
template <class Code> void each_run(const Rows& rows, int64_t first, int64_t last, Code code) {
    const bool flat = rows.is_flat(), ends_short = rows.width % rows.block != 0;
    while (first < last) {
        const int64_t row_end = flat ? rows.all_blocks() : (first / rows.blocks + 1) * rows.blocks;
        const int64_t end = row_end < last ? row_end : last;
        const int64_t whole = end - (ends_short && end == row_end);
        const auto place = [&rows](int64_t b) { return Place{b, rows.first_octet(b), rows.first_value(b)}; };
        if (first < whole) code(rows.block, place(first), whole - first);
        if (whole < end) code(rows.values(whole), place(whole), 1);
        first = end;
    }
}

// strip(place, blocks) until `blocks` blocks are done.
template <int kBlock, class Each> void each_strip(Place from, int64_t blocks, Each strip) {
    constexpr int kStep = kStrip / kBlock;
    for (; blocks > 0; blocks -= kStep) {
        strip(from, (int)(blocks < kStep ? blocks : kStep));
        from = {from.block + kStep, from.octet + kStrip / 8, from.value + kStrip};
    }
}

template <class T> void encode_range(const void* x, const Layout& at, uint8_t* payload, int64_t first, int64_t last) {
    const auto* words = (const typename T::Word*)x;
    Strip strip = {};
    each_run(at.rows, first, last, [&](int64_t size, Place from, int64_t blocks) {
        const auto in_strips = [&](auto kBlock) {
            each_strip<kBlock.value>(from, blocks, [&](Place place, int count) {
                encode_strip<T, kBlock.value>(words, at, place, count, payload, strip);
            });
        };
        if (size == 32) in_strips(Int<32>{});
        else if (size == 64) in_strips(Int<64>{});
        else if (size == 128) in_strips(Int<128>{});
        else
            for (int64_t i = 0; i < blocks; i++) encode_block<T>(words, at, from.block + i, payload);
    });
    if (last == at.blocks) at.zero_gaps(payload);
}

template <class T>
void decode_range(const uint8_t* const* payloads, int count, const Layout& at, void* out, int64_t first, int64_t last) {
    auto* words = (typename T::Word*)out;
    Strip strip = {};
    each_run(at.rows, first, last, [&](int64_t size, Place from, int64_t blocks) {
        const auto in_strips = [&](auto kBlock) {
            each_strip<kBlock.value>(from, blocks, [&](Place place, int n) {
                decode_strip<T, kBlock.value>(payloads, count, at, place, n, words, strip);
            });
        };
        if (size == 32) in_strips(Int<32>{});
        else if (size == 64) in_strips(Int<64>{});
        else if (size == 128) in_strips(Int<128>{});
        else
            for (int64_t i = 0; i < (blocks * size + 7) / 8; i++)
                decode_octet<T>(payloads, count, at, from.octet + i, words);
    });
}

void encode(const void* x, void*, int dtype, const Spec& spec, uint8_t* payload, int64_t first, int64_t last) {
    const Layout at(spec.numel, spec.bits, spec.block, spec.width);
    if (dtype == kFloat32) encode_range<Float32>(x, at, payload, first, last);
    if (dtype == kFloat16) encode_range<Float16>(x, at, payload, first, last);
    if (dtype == kBFloat16) encode_range<BFloat16>(x, at, payload, first, last);
}

void decode_sum(const uint8_t* const* payloads, int count, const Spec& spec, void* out, int dtype, int64_t first,
                int64_t last) {
    const Layout at(spec.numel, spec.bits, spec.block, spec.width);
    if (dtype == kFloat32) decode_range<Float32>(payloads, count, at, out, first, last);
    if (dtype == kFloat16) decode_range<Float16>(payloads, count, at, out, first, last);
    if (dtype == kBFloat16) decode_range<BFloat16>(payloads, count, at, out, first, last);
}

}  // namespace

extern const Kernels kernels[kFormats];
const Kernels kernels[kFormats] = {
    {encode, decode_sum}, {encode_rotated, decode_sum_rotated}, {encode_spike, decode_sum_spike}};

}  // namespace flashcomm::FLASHCOMM_ISA
