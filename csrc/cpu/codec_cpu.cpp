// The CPU codec: the same numbers as codec.h, many blocks at a time.
//
// Work goes in strips that fit the first-level cache, through stages that are plain loops over whole vectors:
//
//     encode   extremes -> fit -> quantize -> pack         (one pass over memory: a strip is read twice from L1,
//                                                           and the strip after next is fetched meanwhile)
//     decode   unpack -> load -> accumulate                (once for every payload; the last one writes the output)
//
// The loops are written for compilers to vectorise, and setup.py compiles this file once for every instruction set,
// each in its own namespace. Two 16-bit values share a 32-bit lane all the way, which spares every shuffle.
// Strange blocks (NaN, escaped, huge or tiny scales, saturating) run through the loops like all others and are then
// done again by codec.h, which also does blocks of other sizes than 32, 64 and 128 values.
#include <type_traits>

#include "api.h"

#include "format/codec.h"
#include "cpu/planes.h"
#include "cpu/rotated_cpu.h"
#include "cpu/spike_cpu.h"
#include "cpu/vectors.h"

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

// Smallest and largest key of every block. As many blocks as a track has lanes become a vector each. Then vectors meet in
// pairs, lanes of both in turn, until each lane of a track holds the key of another block, and tracks meet.
template <class T, int kBlock>
void extremes(const typename T::Word* __restrict x, int blocks, uint32_t* __restrict low_keys,
              uint32_t* __restrict high_keys) {
    using Word = typename T::Word;
    using Keys = std::conditional_t<sizeof(Word) == 2, HalfWords, Words>;
    using Signed = std::conditional_t<sizeof(Word) == 2, Shorts, Lanes>;
    constexpr int kGroup = kPerTrack<Keys>, kTop = 8 * sizeof(Word) - 1;
    for (int b = 0; b < blocks; b += kGroup) {
        Keys least[kGroup], most[kGroup];
#pragma GCC unroll 8
        for (int i = 0; i < kGroup; i++) {
            const Word* from = x + (b + i < blocks ? b + i : blocks - 1) * kBlock;
            Keys low = ~Keys{}, high = {};
#pragma GCC unroll 16
            for (int j = 0; j < kBlock; j += kLanesOf<Keys>) {
                if (j * sizeof(Word) % 64 == 0) __builtin_prefetch(from + 2 * kStrip + j);
                Keys key = load<Keys>(from + j);
                key ^= (Keys)((Signed)key >> kTop) | (Word)((Word)1 << kTop);
                low = j ? smaller(key, low) : key, high = j ? larger(key, high) : key;
            }
            least[i] = low, most[i] = high;
        }
#pragma GCC unroll 4
        for (int n = kGroup / 2; n > 0; n /= 2)
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                const Both<Keys> low = zipped(Both<Keys>{least[i], least[i + n]});
                const Both<Keys> high = zipped(Both<Keys>{most[i], most[i + n]});
                least[i] = smaller(low.first, low.second), most[i] = larger(high.first, high.second);
            }
        if constexpr (kTracks > 2) {
            least[0] = smaller(least[0], partners<2 * kGroup>(least[0]));
            most[0] = larger(most[0], partners<2 * kGroup>(most[0]));
        }
        if constexpr (kTracks > 1) {
            least[0] = smaller(least[0], partners<kGroup>(least[0]));
            most[0] = larger(most[0], partners<kGroup>(most[0]));
        }
        Word low[kLanesOf<Keys>], high[kLanesOf<Keys>];
        store(least[0], low), store(most[0], high);
        for (int i = 0; i < kGroup; i++) low_keys[b + i] = low[i], high_keys[b + i] = high[i];
    }
}

// Bf16Pair::fit in half as many operations, and which blocks are too strange for that: far from float32's limits nothing
// is halved or scaled up.
template <class T>
void fit(const uint32_t* __restrict low_keys, const uint32_t* __restrict high_keys, int blocks, float levels,
         float* __restrict minima, float* __restrict inverses, uint32_t* __restrict metadata,
         uint32_t* __restrict strange) {
    constexpr uint32_t above = ordered<T>(T::kInfinity), below = (typename T::Word) ~above;
    for (int b = 0; b < blocks; b++) {
        const float low = T::widen(unordered<T>(low_keys[b])), high = T::widen(unordered<T>(high_keys[b]));
        float minimum = high_half(low);
        minimum = choose(mask(minimum > low), next_up(minimum), minimum);
        const float spread = high - minimum;
        float scale = high_half(spread / levels);
        scale = choose(mask(scale * levels < spread), next_up(scale), scale);
        minima[b] = minimum;
        inverses[b] = choose(mask(scale > 0), 1.0f / scale, 0.0f);
        metadata[b] = bits_of(scale) >> 16 | (bits_of(minimum) & 0xFFFF0000);
        const uint32_t finite = mask(high_keys[b] < above) & mask(low_keys[b] > below);
        const uint32_t usual = mask(spread < 0x1p126f) & mask(bits_of(scale) - 1 >= bits_of(Bf16Pair::kTiny) - 1);
        const uint32_t exact = mask(minimum == low) | (mask(minimum < low) & mask(low < high));
        strange[b] = ~(finite & usual & exact);
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

// T::widen of finite numbers in the upper halves of lanes.
template <class T> FC_INLINE Vector widened(Words upper) {
    if constexpr (kIsHalf<T>) return (Vector)((Words)((Lanes)upper >> 3) & 0x8FFFE000) * 0x1p112f;
    else return (Vector)upper;
}

// quantize of 16-bit values at 4 bits, packed: the two codes of a 32-bit lane are a byte of the plane. Four vectors at a
// time, of `values` no fewer; the last four begin early enough, so that some values are done twice.
template <class T, int kBlock>
void quantize_and_pack(const typename T::Word* __restrict x, const float* __restrict minima,
                       const float* __restrict inverses, size_t values, uint8_t* __restrict plane) {
    constexpr size_t kEach = 2 * kLanes, kStep = 4 * kEach;  // values of a vector, of four
    for (size_t end = kStep; end < values + kStep; end += kStep) {
        const size_t from = (end < values ? end : values) - kStep, block = from / kBlock;
        Lanes bytes[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++) {
            const size_t in_step = i * kEach / kBlock;
            const Vector minimum = minima[block + in_step] - Vector{}, inverse = inverses[block + in_step] - Vector{};
            const Words pairs = load<Words>(x + from + i * kEach);
            const Words even = (Words)((widened<T>(pairs << 16) - minimum) * inverse + 0x1.8p23f);  // as rounded()
            const Words odd = (Words)((widened<T>(pairs & 0xFFFF0000) - minimum) * inverse + 0x1.8p23f);
            bytes[i] = (Lanes)((even | odd << 4) & 0xFF);
        }
        const Both<HalfWords> halves = {(HalfWords)joined(Both<Lanes>{bytes[0], bytes[1]}),
                                        (HalfWords)joined(Both<Lanes>{bytes[2], bytes[3]})};
        const Words packed = (Words)joined(halves);  // of every vector four bytes in every track
        store(shuffled(packed, packed, [](int i) { return i / kTracks + i % kTracks * 4; }), plane + from / 2);
    }
}

bool any(const uint32_t* marks, int blocks) {
    uint32_t all = 0;
    for (int b = 0; b < blocks; b++) all |= marks[b];
    return all;
}

template <class T, int kBlock>
void quantize_strange(const typename T::Word* x, int blocks, float levels, Strip& s, uint8_t* codes) {
    for (int b = 0; b < blocks; b++) {
        if (!s.strange[b]) continue;
        const Fit fit = Bf16Pair::fit<T>(s.low_keys[b], s.high_keys[b], levels);
        s.metadata[b] = fit.scale_bits | fit.minimum_bits << 16;
        for (int i = b * kBlock; i < (b + 1) * kBlock; i++) codes[i] = (uint8_t)code_of(T::widen(x[i]), fit);
    }
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
    fit<T>(s.low_keys, s.high_keys, blocks, at.levels(), s.minima, s.inverses, s.metadata, s.strange);
    const bool usual = !any(s.strange, blocks);
    if constexpr (sizeof(*x) == 2)
        if (at.bits == 4 && usual && blocks * kBlock >= 8 * kLanes) {
            quantize_and_pack<T, kBlock>(x, s.minima, s.inverses, blocks * kBlock, payload + 4 * from.octet);
            return store_metadata(at, from.block, blocks, s.metadata, payload);
        }
    uint8_t* codes = at.bits == 8 ? payload + 8 * from.octet : s.codes;  // a plane of 8 bits is the codes themselves
    quantize<T, kBlock>(x, s.minima, s.inverses, blocks, codes);
    if (!usual) quantize_strange<T, kBlock>(x, blocks, at.levels(), s, codes);
    pack_planes(at.bits, at.octets, from.octet, blocks * kBlock, codes, payload);
    store_metadata(at, from.block, blocks, s.metadata, payload);
}

// ---- decode --------------------------------------------------------------------------------------------------

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
        if (at.bits < 8) unpack_planes(at.bits, at.octets, from.octet, blocks * kBlock, payloads[p], s.codes);
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
