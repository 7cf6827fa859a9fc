// Block integers of 2 to 8 bits: the format in C++ and CUDA, one value, one octet or one block at a time.
//
// flashcomm_megatron/codec/uniform.py is the definition and explains the idea; this header equals it bit for bit
// and is what every faster path must equal in turn. A payload of rows in blocks (rows.h):
//
//     | 8-, 4-, 2-, 1-bit planes ...          | scales        | minima        |   sections start on 16 bytes,
//     | octets * w bytes for each plane       | blocks x bf16 | blocks x bf16 |   gaps are zero, little endian
//
//     planes      the set bits of `bits`, widest first (7 = 4 + 2 + 1); the first holds the low bits of every code
//     octet       eight codes are w whole bytes in the plane of width w: value i sits at bit i * w
//     scale       NaN: the block held a NaN or an Inf. Sign bit set: a constant, float32 bits
//                 minimum << 16 | (scale & 0x7fff) << 1 | (code & 1)
//     value       minimum + code * scale, limited to the finite range of the output's dtype
//
// Three ideas meet here, each by itself: number types (Float32, Float16, BFloat16), metadata (Bf16Pair: what a block
// says about itself) and planes (Layout and the octets). Compile with -ffp-contract=off (nvcc: -fmad=false).
#pragma once

#include "format/rows.h"

namespace flashcomm::FLASHCOMM_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little endian");

FC_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

FC_INLINE float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// All ones or all zeros, and what such a mask chooses.
FC_INLINE uint32_t mask(bool condition) { return 0u - (uint32_t)condition; }
FC_INLINE uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) { return (yes & mask) | (no & ~mask); }
FC_INLINE float choose(uint32_t mask, float yes, float no) { return float_of(choose(mask, bits_of(yes), bits_of(no))); }

// ---- number types --------------------------------------------------------------------------------------------
// widen: finite numbers only. narrow: rounds to nearest even, overflows to Inf, any number that is not NaN.

struct Float32 {
    using Word = uint32_t;
    using Signed = int32_t;
    static constexpr Word kInfinity = 0x7F800000, kNan = 0x7FC00000;
    static constexpr float kMax = 0x1.fffffep127f;
    static FC_INLINE float widen(uint32_t word) { return float_of(word); }
    static FC_INLINE uint32_t narrow(float x) { return bits_of(x); }
};

struct BFloat16 {
    using Word = uint16_t;
    using Signed = int16_t;
    static constexpr Word kInfinity = 0x7F80, kNan = 0x7FC0;
    static constexpr float kMax = 0x1.fep127f;
    static FC_INLINE float widen(uint32_t word) { return float_of(word << 16); }
    static FC_INLINE uint32_t narrow(float x) {
        const uint32_t bits = bits_of(x);
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    }
};

struct Float16 {
    using Word = uint16_t;
    using Signed = int16_t;
    static constexpr Word kInfinity = 0x7C00, kNan = 0x7E00;
    static constexpr float kMax = 65504.0f;
    // Exponent and mantissa move to float32's place; the power of two mends the bias, denormals included.
    static FC_INLINE float widen(uint32_t word) {
        return float_of((uint32_t)((int32_t)(word << 16) >> 3) & 0x8FFFE000) * 0x1p112f;
    }
    static FC_INLINE uint32_t narrow(float x) {
        const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF;
        const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
        const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // 0.5 has the step 2**-24
        const uint32_t small = magnitude < (113u << 23) ? denormal : normal;
        return (bits >> 16 & 0x8000) | (magnitude < bits_of(65520.0f) ? small : (uint32_t)kInfinity);
    }
};

// A sum of float16 is Inf where the exact sum may be too large, since a loss scaler waits for it. bound: by how much the
// sum may be off; 0 of one payload, which is finite. It is a worst case, so no more of it counts than kMostOff: sums that
// are far from overflowing stay finite.
constexpr float kRounding = 33.0f / 64;  // of a step: a half, and what choosing the code in float32 costs at most
constexpr float kMostOff = 65520 / 2;    // sums below half of what overflows are never Inf
constexpr float kLarge = 60000;          // sums of float16 below it need no second look
template <class T> constexpr bool kIsHalf = T::kInfinity == Float16::kInfinity;
template <class T> FC_INLINE float overflowed(float sum, float bound) {
    const uint32_t bits = bits_of(sum), magnitude = bits & 0x7FFFFFFF;
    if (!kIsHalf<T> || !(float_of(magnitude) + (bound < kMostOff ? bound : kMostOff) >= 65520.0f)) return sum;
    return float_of((bits & 0x80000000) | Float32::kInfinity);
}
template <class T> FC_INLINE typename T::Word rounded_sum(float sum, float bound) {
    sum = overflowed<T>(sum, bound);
    return sum == sum ? (typename T::Word)T::narrow(sum) : T::kNan;
}

// float32 rounded toward zero to a bfloat16 number, and the bfloat16 number next farther from zero.
FC_INLINE float high_half(float x) { return float_of(bits_of(x) & 0xFFFF0000); }
FC_INLINE float next_up(float x) { return float_of(bits_of(x) + 0x10000); }

// Bit patterns in the order of the numbers (-0 below +0, NaN outermost), the one order in which a minimum does not
// depend on who computes it.
template <class T> FC_INLINE constexpr typename T::Word ordered(typename T::Word word) {
    using Word = typename T::Word;
    constexpr int top = 8 * sizeof(Word) - 1;
    return word ^ (Word)((Word)((typename T::Signed)word >> top) | (Word)((Word)1 << top));
}

// The way back, in 32 bits: what follows is float32 and must not mix lanes of two widths.
template <class T> FC_INLINE uint32_t unordered(uint32_t key) {
    constexpr int top = 8 * sizeof(typename T::Word) - 1;
    return key ^ ((((key >> top) - 1) & ((1u << top) - 1)) | 1u << top);
}

// ---- metadata ------------------------------------------------------------------------------------------------

// What encoding needs to know of a block. `constant` is the code of every value where it is not kVaries; `plain`
// is a mask: code = round((x - minimum) * inverse) and nothing else matters. So it is in all but strange blocks.
struct Fit {
    static constexpr uint32_t kVaries = 256;
    float minimum, prescale, inverse;
    uint32_t minimum_bits, scale_bits, constant, plain;
};

// A bfloat16 minimum rounded down and a bfloat16 scale rounded up.
struct Bf16Pair {
    uint32_t scale, minimum;  // upper halves of float32

    static constexpr uint32_t kNan = 0x7FC0;
    static constexpr uint32_t kHuge = 0x7A80;  // 2**118: scales from here on could overflow, halve first
    static constexpr float kTiny = 0x1p-100f;  // scales below have a reciprocal beyond float32: scale up first

    // The metadata of a block whose extremes have these ordered keys; levels = 2**bits - 1.
    // Without a branch or a bool that could become one, so that a loop over blocks stays a loop over vectors.
    template <class T> static FC_INLINE Fit fit(uint32_t low_key, uint32_t high_key, float levels) {
        constexpr uint32_t above = ordered<T>(T::kInfinity), below = (typename T::Word) ~above;
        const uint32_t finite = mask(high_key < above) & mask(low_key > below);
        const float low = choose(finite, T::widen(unordered<T>(low_key)), 0.0f);
        const float high = choose(finite, T::widen(unordered<T>(high_key)), 0.0f);

        float minimum = high_half(low);
        minimum = choose(mask(minimum > low), next_up(minimum), minimum);
        minimum = choose(mask(minimum < -BFloat16::kMax), -BFloat16::kMax, minimum);
        const uint32_t wide = mask(high * 0.5f - minimum * 0.5f >= 0x1p126f);  // max - min overflows float32
        const float halve = choose(wide, 0.5f, 1.0f);
        float spread = high * halve - minimum * halve;
        spread = choose(mask(spread > 0), spread, 0.0f);
        float scale = high_half(spread / levels);
        scale = choose(mask(scale * levels < spread), next_up(scale), scale) * choose(wide, 2.0f, 1.0f);
        const uint32_t varies = mask(scale > 0);
        const float prescale = choose(varies & mask(scale < kTiny), 0x1p64f, halve);
        const float inverse = choose(varies, 1.0f / (scale * prescale), 0.0f);

        const uint32_t bits = bits_of(low);
        const uint32_t escaped = finite & mask(low == high) & mask(minimum != low);
        const uint32_t minimum_bits = choose(escaped, bits, bits_of(minimum)) >> 16;
        const uint32_t scale_bits = choose(escaped, 0x8000 | (bits >> 1 & 0x7FFF), bits_of(scale) >> 16);
        return {minimum,
                prescale,
                inverse,
                choose(finite, minimum_bits, kNan),
                choose(finite, scale_bits, kNan),
                choose(escaped, bits & 1, choose(finite, Fit::kVaries, 0)),
                finite & ~escaped & mask(prescale == 1.0f) & mask(minimum <= low)};
    }

    // Whether value() is minimum + code * scale for every code, in one rounding since the product is exact.
    template <class T> FC_INLINE bool plain(float levels) const {
        const float least = float_of(minimum << 16), most = least + levels * float_of(scale << 16);
        return (scale < kHuge) & (least >= -T::kMax) & (most <= T::kMax);
    }

    // By how much a value may be off.
    FC_INLINE float bound() const { return scale & 0x8000 ? 0.0f : float_of(scale << 16) * kRounding; }

    // What a code stands for, as float32 within the finite range of T.
    template <class T> FC_INLINE float value(uint32_t code) const {
        if (scale & 0x8000) return float_of(minimum << 16 | (scale & 0x7FFF) << 1 | (code & 1));
        if ((scale & 0x7FFF) > 0x7F80) return float_of(Float32::kNan);
        const float halve = scale >= kHuge ? 0.5f : 1.0f, limit = T::kMax * halve;
        const float x = float_of(minimum << 16) * halve + (float)(int)code * (float_of(scale << 16) * halve);
        return (x < -limit ? -limit : x > limit ? limit : x) * (scale >= kHuge ? 2.0f : 1.0f);
    }
};

// Adding 1.5 * 2**23 rounds to nearest even and leaves the integer in the lowest bits.
FC_INLINE uint32_t rounded(float x) { return bits_of(x + 0x1.8p23f); }

FC_INLINE uint32_t code_of(float x, const Fit& fit) {
    const float scaled = (x * fit.prescale - fit.minimum * fit.prescale) * fit.inverse;
    return fit.constant != Fit::kVaries ? fit.constant : rounded(scaled > 0 ? scaled : 0.0f) & 0xFF;
}

// ---- planes --------------------------------------------------------------------------------------------------

struct Layout {
    int bits;
    Rows rows;
    int64_t numel, block, octets, blocks;
    int64_t scales, minima, bytes;  // offsets of the metadata sections, length of the payload

    FC_INLINE Layout(int64_t numel, int bits, int64_t block, int64_t width = 0)
        : bits(bits), rows(numel, width, block), numel(numel), block(block), octets(rows.all_octets()),
          blocks(rows.all_blocks()) {
        scales = each_plane(bits, octets, [](int, int, int64_t) {});
        minima = scales + padded(2 * blocks);
        bytes = minima + padded(2 * blocks);
    }

    static FC_INLINE int64_t padded(int64_t size) { return (size + 15) & ~(int64_t)15; }
    FC_INLINE float levels() const { return (float)((1 << bits) - 1); }

    // visit(width, shift, start): a plane of `width` bits holds the codes' bits from `shift` on, `start` bytes in. Returns
    // where the planes end.
    template <class Visit> static FC_INLINE int64_t each_plane(int bits, int64_t octets, Visit visit) {
        int64_t start = 0;
        for (int width = 8, shift = 0; width; width >>= 1) {
            if (!(bits & width)) continue;
            visit(width, shift, start);
            start += padded(octets * width);
            shift += width;
        }
        return start;
    }
    template <class Visit> FC_INLINE void each_plane(Visit visit) const { each_plane(bits, octets, visit); }

    // Zeros from the end of a section's `size` bytes to the next section.
    static FC_INLINE void zero(uint8_t* section, int64_t size) {
        for (int64_t i = size; i < padded(size); i++) section[i] = 0;
    }

    FC_INLINE void zero_gaps(uint8_t* payload) const {
        each_plane([&](int width, int, int64_t start) { zero(payload + start, octets * width); });
        zero(payload + scales, 2 * blocks);
        zero(payload + minima, 2 * blocks);
    }

    FC_INLINE void store(uint8_t* payload, int64_t index, uint32_t scale_bits, uint32_t minimum_bits) const {
        const uint16_t halves[2] = {(uint16_t)scale_bits, (uint16_t)minimum_bits};
        __builtin_memcpy(payload + scales + 2 * index, halves, 2);
        __builtin_memcpy(payload + minima + 2 * index, halves + 1, 2);
    }

    FC_INLINE Bf16Pair load(const uint8_t* payload, int64_t index) const {
        uint16_t halves[2];
        __builtin_memcpy(halves, payload + scales + 2 * index, 2);
        __builtin_memcpy(halves + 1, payload + minima + 2 * index, 2);
        return {halves[0], halves[1]};
    }

    FC_INLINE void store_codes(uint8_t* payload, int64_t octet, const uint8_t codes[8]) const {
        each_plane([&](int width, int shift, int64_t start) {
            uint64_t word = 0;
            for (int i = 0; i < 8; i++) word |= (uint64_t)(codes[i] >> shift & ((1 << width) - 1)) << (i * width);
            for (int i = 0; i < width; i++) payload[start + octet * width + i] = (uint8_t)(word >> (8 * i));
        });
    }

    FC_INLINE void load_codes(const uint8_t* payload, int64_t octet, uint8_t codes[8]) const {
        for (int i = 0; i < 8; i++) codes[i] = 0;
        each_plane([&](int width, int shift, int64_t start) {
            uint64_t word = 0;
            for (int i = 0; i < width; i++) word |= (uint64_t)payload[start + octet * width + i] << (8 * i);
            for (int i = 0; i < 8; i++) codes[i] |= (uint8_t)((word >> (i * width) & ((1 << width) - 1)) << shift);
        });
    }
};

// ---- the codec -----------------------------------------------------------------------------------------------

// Encodes block `index` of the tensor x; a row's last block may be short.
template <class T>
FC_BOTH void encode_block(const typename T::Word* x, const Layout& at, int64_t index, uint8_t* payload) {
    using Word = typename T::Word;
    const int64_t count = at.rows.values(index), octet = at.rows.first_octet(index);
    x += at.rows.first_value(index);
    Word low = (Word) ~(Word)0, high = 0;
    for (int64_t i = 0; i < count; i++) {
        const Word key = ordered<T>(x[i]);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    const Fit fit = Bf16Pair::fit<T>(low, high, at.levels());
    for (int64_t first = 0; first < count; first += 8) {
        uint8_t codes[8];
        for (int64_t i = 0; i < 8; i++)
            codes[i] = first + i < count ? (uint8_t)code_of(T::widen(x[first + i]), fit) : 0;
        at.store_codes(payload, octet + first / 8, codes);
    }
    at.store(payload, index, fit.scale_bits, fit.minimum_bits);
}

// Decodes eight values of `count` payloads, which lie `offset` bytes behind their addresses, and writes their float32
// sum, in the order given, into the tensor out.
template <class T>
FC_BOTH void decode_octet(const uint8_t* const* payloads, int count, const Layout& at, int64_t octet,
                          typename T::Word* out, int64_t offset = 0) {
    const int64_t row = octet / at.rows.octets, first = octet % at.rows.octets * 8;
    float sum[8] = {}, bound = 0;
    for (int p = 0; p < count; p++) {
        const Bf16Pair pair = at.load(payloads[p] + offset, row * at.rows.blocks + first / at.block);
        if (count > 1) bound += pair.bound();
        uint8_t codes[8];
        at.load_codes(payloads[p] + offset, octet, codes);
        for (int i = 0; i < 8; i++) {
            const float part = pair.value<T>(codes[i]);
            sum[i] = p ? sum[i] + part : part;
        }
    }
    out += row * at.rows.width + first;
    for (int i = 0; i < 8 && first + i < at.rows.width; i++) out[i] = rounded_sum<T>(sum[i], bound);
}

}  // namespace flashcomm::FLASHCOMM_ISA
