// Uniform blocks (codec.h) by one thread block, kBits a compile-time constant so that planes cost no branch.
//
// A thread holds 32 neighbouring values (of float32: 16), its codes are 16 bytes at 4 bits. Most blocks are those of one
// thread or of 2 to 32 neighbouring ones: these find their extremes by shuffles, fit the block each for itself, and write
// codes without a barrier. Of other blocks, which may be any multiple of 8, extremes meet in shared memory, and one
// thread for each fits it.
#pragma once

#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

template <int kBits, class T> struct UniformTile {
    using Word = typename T::Word;
    using Values = float[kRows<T>][8];  // of a thread
    static constexpr bool kRotates = false, kKeepsResiduals = false;
    static constexpr int kMostAhead = 4, kLargestBlock = kTileValues<T>;
    static constexpr int kMaxBytes = kTileOctets<T> * kBits + 2 * 2 * (kTileValues<T> / kMinBlock);
    static constexpr float kLevels = (float)((1 << kBits) - 1), kNear = 1 / kLevels;
    static constexpr float kAbove =
        (double)kNear * kLevels < 1 ? kNear + kNear * 0x1p-24f : kNear;  // 1 / kLevels, or more

    // Where the sections of a tile begin in a payload of `octets`: its own, or a whole tensor's.
    template <class Offset> struct Place {
        Offset octets, octet, scales, minima;  // octet: the tile's first
    };

    int octets_per_block;
    uint32_t inverse;  // of octets_per_block, times 2**20, rounded up: exact for up to 1024 octets
    int lanes;         // that hold a block; 0: not whole ones, or more than a warp
    // 2**23 as a float's bits, for bytes to be put into. As a constant it would be the immediate of every such
    // instruction, and the selector, of which there are four, would take a move each time.
    uint32_t magic = 0x4B000000;

    FC_INLINE explicit UniformTile(Setting with)
        : octets_per_block(with.block / 8), inverse(((1u << 20) + with.block / 8 - 1) / (with.block / 8)), lanes(0) {
        for (int count = 1; count <= kWarp; count *= 2)
            if (octets_per_block == count * kRows<T>) lanes = count;
    }

    FC_INLINE int block() const { return 8 * octets_per_block; }
    FC_INLINE int unit() const { return block(); }
    FC_INLINE int scratch_bytes() const {
        return lanes ? 0 : kTileOctets<T> * (int)sizeof(Keys<T>) + (kTileValues<T> / block()) * (int)sizeof(Fit);
    }
    template <class Offset> static FC_INLINE Offset octets(Offset values) { return (values + 7) >> 3; }
    template <class Offset> FC_INLINE Offset blocks(Offset values) const { return (values + block() - 1) / block(); }
    FC_INLINE int block_of(int octet) const { return (int)(octet * inverse >> 20); }

    template <class Offset> FC_INLINE Place<Offset> own(Offset values) const {
        const Offset octets = this->octets(values), scales = plane_bytes(kBits, octets);
        return {octets, 0, scales, scales + padded16(2 * blocks(values))};
    }
    FC_INLINE Place<int64_t> part(const Place<int64_t>& whole, int64_t octet, int64_t block) const {
        return {whole.octets, whole.octet + octet, whole.scales + 2 * block, whole.minima + 2 * block};
    }
    FC_INLINE int bytes(int values) const { return values > 0 ? own(values).minima + padded16(2 * blocks(values)) : 0; }

    // Encodes a tile into the payload that `place` is of; kOwn: there is nothing else in it.
    template <bool kOwn, class Offset>
    FC_DEVICE void encode_to(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                             const Place<Offset>& place, Word*) const {
        if (kOwn) {
            sync();
            if (thread() == kThreads - 1) zero_gaps(place, (Offset)values, payload);
        }
        if (lanes) encode_lanes(x, values, payload, place);
        else encode_blocks(x, values, scratch, payload, place);
        if (kOwn || !lanes) sync();
    }

    // The octets from `octet` on, counted from where `place` is of in a payload.
    template <bool kAlone, class Offset>
    FC_DEVICE uint32_t decode_from(const uint8_t* payload, const Place<Offset>& place, int octet, uint32_t,
                                   Values& x) const {
        if (lanes) {
            decode_some<kAlone, kRows<T>>(payload, place, octet, x);
        } else {
            FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
                float alone[1][8];
                if (place.octet + octet + row >= place.octets) continue;
                decode_some<true, 1>(payload, place, octet + row, alone);
                put<kAlone>(alone[0], x[row]);
            }
        }
        return 0;
    }
    template <class Visit> FC_DEVICE void with_blocks(Visit visit) const { visit(*this); }
    template <bool> FC_DEVICE void finish(Values&, uint32_t) const {}
    template <class Offset>
    FC_DEVICE float bound(const uint8_t* payload, const Place<Offset>& place, int octet) const {
        if (place.octet + octet >= place.octets) return 0;
        return Bf16Pair{((const uint16_t*)(payload + place.scales))[block_of(octet)], 0}.bound();
    }

    template <class Offset>
    FC_DEVICE void zero_gaps(const Place<Offset>& place, Offset values, uint8_t* payload) const {
        each_plane(kBits, place.octets, [&](auto width, int, Offset start) {
            zero_gap<Offset>(payload + start, place.octets * width.value);
        });
        zero_gap<Offset>(payload + place.scales, 2 * blocks(values));
        zero_gap<Offset>(payload + place.minima, 2 * blocks(values));
    }

private:
    // ---- encoding --------------------------------------------------------------------------------------------------

    template <class Offset>
    FC_DEVICE void encode_lanes(const Octet<T> (&x)[kRows<T>], int values, uint8_t* payload,
                                const Place<Offset>& place) const {
        const int begin = first_octet<T>();
        const bool is_whole = 8 * (begin + kRows<T>) <= values;
        Extremes<T> ends;
        if (is_whole) ends.take(x);
        else FC_UNROLL for (int row = 0; row < kRows<T>; row++) if (8 * (begin + row) < values) ends.take(x[row]);
        for (int stride = 1; stride < lanes; stride *= 2) ends.exchange(stride);
        if (8 * begin >= values) return;
        Fit fit;
        Eight codes[kRows<T>];
        if (fits_plainly(ends, fit)) {
            FC_UNROLL for (int row = 0; row < kRows<T>; row++) codes[row] = plain_codes(x[row], fit);
        } else {
            const Keys<T> keys = ends.keys();
            fit = Bf16Pair::fit<T>(keys.low, keys.high, kLevels);
            FC_UNROLL for (int row = 0; row < kRows<T>; row++) codes[row] = codes_of(x[row], fit);
        }
        if ((thread() & (lanes - 1)) == 0) store_fit(fit, block_of(begin), payload, place);
        if (is_whole)
            return store_planes<kRows<T>, Offset>(kBits, place.octets, place.octet + begin, codes, codes, payload);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) store_last(codes[row], begin + row, values, payload, place);
    }

    template <class Offset>
    FC_DEVICE void encode_blocks(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                                 const Place<Offset>& place) const {
        const int begin = first_octet<T>(), octets = this->octets(values);
        Keys<T>* keys = (Keys<T>*)scratch;
        Fit* fits = (Fit*)(keys + kTileOctets<T>);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) if (begin + row < octets) keys[begin + row] =
            extremes<T>(x[row]);
        sync();
        for (int index = thread(); index < blocks(values); index += kThreads) {
            Keys<T> both;
            const int first = index * octets_per_block, end = first + octets_per_block;
            for (int octet = first; octet < end && octet < octets; octet++) both.take(keys[octet]);
            fits[index] = Bf16Pair::fit<T>(both.low, both.high, kLevels);
            store_fit(fits[index], index, payload, place);
        }
        sync();
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (begin + row >= octets) continue;
            const Fit fit = fits[block_of(begin + row)];
            const Eight codes = fit.plain ? plain_codes(x[row], fit) : codes_of(x[row], fit);
            store_last(codes, begin + row, values, payload, place);
        }
    }

    // Bf16Pair::fit in a few steps where nothing is out of the ordinary: a spread far from the limits of float32. The
    // scale is then the least bfloat16 number that reaches it, whatever approximation of the quotient that is not too
    // small one starts with. False: another block.
    static FC_DEVICE bool fits_plainly(const Extremes<T>& ends, Fit& fit) {
        const float low = ends.low(), high = ends.high();
        float minimum = high_half(low);
        if (T::kInfinity != BFloat16::kInfinity) minimum = minimum > low ? next_up(minimum) : minimum;
        const float spread = high - minimum;
        constexpr uint32_t least = (127 - 80) << 23, most = (127 + 100) << 23;
        const bool is_strange = T::kMax < 1e30f && !(low >= -T::kMax && high <= T::kMax);  // of float16
        if (bits_of(spread) - least > most - least || low == high || is_strange) return false;
        float scale = high_half(spread * kAbove);
        scale = scale * kLevels < spread ? next_up(scale) : scale;
        fit.minimum = minimum, fit.inverse = reciprocal(scale);
        fit.minimum_bits = bits_of(minimum) >> 16, fit.scale_bits = bits_of(scale) >> 16;
        return true;
    }

    template <class Offset>
    static FC_DEVICE void store_fit(const Fit& fit, int index, uint8_t* payload, const Place<Offset>& place) {
        ((uint16_t*)(payload + place.scales))[index] = (uint16_t)fit.scale_bits;
        ((uint16_t*)(payload + place.minima))[index] = (uint16_t)fit.minimum_bits;
    }

    static FC_DEVICE Eight plain_codes(const Octet<T>& octet, const Fit& fit) {
        float x[8];
        uint32_t code[8];
        widen<T>(octet, x);
        FC_UNROLL for (int i = 0; i < 8; i++) code[i] = rounded((x[i] - fit.minimum) * fit.inverse);
        return eight_of(code);
    }
    static FC_DEVICE Eight codes_of(const Octet<T>& octet, const Fit& fit) {
        float x[8];
        uint32_t code[8];
        widen<T>(octet, x);
        FC_UNROLL for (int i = 0; i < 8; i++) code[i] = code_of(x[i], fit);
        return eight_of(code);
    }

    // One octet, if it is there; codes behind the last value are zero.
    template <class Offset>
    static FC_DEVICE void store_last(Eight codes, int octet, int values, uint8_t* payload, const Place<Offset>& place) {
        const int left = values - 8 * octet;
        if (left <= 0) return;
        if (left < 8) {
            codes.even &= (uint32_t)(((uint64_t)1 << (left + 1) / 2 * 8) - 1);
            codes.odd &= (1u << left / 2 * 8) - 1;
        }
        const Eight one[1] = {codes};
        store_planes<1, Offset>(kBits, place.octets, place.octet + octet, one, one, payload);
    }

    // ---- decoding --------------------------------------------------------------------------------------------------

    // kCount octets of one block.
    template <bool kAlone, int kCount, class Offset>
    FC_DEVICE void decode_some(const uint8_t* payload, const Place<Offset>& place, int octet,
                               float (&x)[kCount][8]) const {
        const int index = block_of(octet);
        const Bf16Pair pair = {((const uint16_t*)(payload + place.scales))[index],
                               ((const uint16_t*)(payload + place.minima))[index]};
        Eight codes[kCount] = {};
        load_planes<kCount, Offset>(kBits, place.octets, place.octet + octet, payload, codes, codes);
        // A byte, `code` shifted up, in the bits 16 to 22 of 2**23, or of 8 bits in 8 to 15, is kUnit * (kBias + code).
        constexpr int kUp = kBits < 8 ? 7 - kBits : 0;
        constexpr float kUnit = kBits < 8 ? (float)(1 << (16 + kUp)) : 256.0f, kBias = 0x1p23f / kUnit;
        const float scale = float_of(pair.scale << 16), minimum = float_of(pair.minimum << 16);
        const float each = scale * (1 / kUnit), bias = scale * kBias, less = minimum - bias;
        const bool is_exact = less + bias == minimum && less - minimum == -bias && (scale == 0 || scale >= 0x1p-90f);
        if (is_exact && pair.plain<T>(kLevels)) {
            FC_UNROLL for (int row = 0; row < kCount; row++) FC_UNROLL for (int i = 0; i < 8; i++) {
                const uint32_t four = (i & 1 ? codes[row].odd : codes[row].even) << kUp;
                const uint32_t number = byte_perm(four, magic, kBits < 8 ? 0x7044 | i / 2 << 8 : 0x7404 | i / 2 << 4);
                const float value = fused_multiply_add(float_of(number), each, less);
                x[row][i] = kAlone ? value : x[row][i] + value;
            }
        } else {
            FC_UNROLL for (int row = 0; row < kCount; row++) FC_UNROLL for (int i = 0; i < 8; i++) {
                const float value = pair.value<T>(number_of(codes[row], i));
                x[row][i] = kAlone ? value : x[row][i] + value;
            }
        }
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
