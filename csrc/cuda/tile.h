// One thread block codes one tile: up to 16 KiB of values in registers, their payload in shared memory.
//
// A thread holds four neighbouring octets (of float32: two), so that most of what a block needs is in its registers. The
// payload of a tile is the payload of its values, so it is independent of who coded it and how the tensor was cut. A
// codec is
//
//     Codec(Setting)                               width and block, as far as they are not in the type
//     block(), unit()                              slices are multiples of one, tiles of the other
//     octets(values), bytes(values)                that a payload holds; its length, a multiple of 16
//     scratch_bytes(), encode(octets, values, scratch, payload)    all threads; a barrier, then writes, then a barrier
//     encode(octets, values, scratch, payload, residual)           the same with a residual, where kKeepsResiduals
//     residual_numel(values)                       numbers of the residual of a tensor
//     decode<kAlone>(payload, values, octet, shrink, x)            eight numbers as float32; kAlone: not to be added
//     finish<kAlone>(x, shrunk)                    Inverse transform of decoded coefficients. All lanes of a warp must
//                                                  call it.
//
// Most codecs decode values; a rotated one (kRotates) decodes coefficients, and finish() transforms their sum back. Its
// decode() returns whether this block's sum could overflow; the sum is then taken again, scaled down. kMostAhead: how
// many 16-byte words of the next payload a thread prefetches, as registers allow without spilling on sm_100 and sm_120.
//
// UniformTile and ExactTile are here, the others in rotated_tile.h and spike_tile.h. Encoding has three stages with a
// barrier behind each: every thread finds the extremes of its octets; one thread for each block computes the metadata,
// so that the divisions are done once for a block and not once for a thread; every thread computes its codes. Extremes
// meet in shared memory rather than in shuffles: a block may be any multiple of 8, and for blocks of 32 one 16-byte
// load replaces eight shuffles.
//
// Numbers: a bf16 value costs about 10 instructions to encode and 6 to decode; the memory of an H100 allows 18.
#pragma once

#include "cuda/device.h"
#include "cuda/protocol.h"

namespace flashcomm::FLASHCOMM_ISA {

constexpr int kThreads = 256;
constexpr int kLeastTile = 8 * kThreads;  // values: one octet a thread

template <class T> constexpr int kRows = 8 / (int)sizeof(typename T::Word);  // octets of one thread
template <class T> constexpr int kTileOctets = kThreads * kRows<T>;
template <class T> constexpr int kTileValues = 8 * kTileOctets<T>;
constexpr int kMinBlock = 8;

// The first of the octets of this thread in a tile.
template <class T> FC_DEVICE int first_octet() { return kRows<T> * thread(); }

// The octet that starts at value `first` of x[0 .. values). What a last, partial octet lacks is its last value again,
// which changes no extreme.
template <class T> FC_DEVICE void load(const typename T::Word* x, int values, int first, Octet<T>& octet) {
    if (((uintptr_t)x & 15) == 0 && first + 8 <= values) {
        FC_UNROLL for (int v = 0; v < Octet<T>::kVectors; v++)((Vec16*)&octet)[v] = ((const Vec16*)(x + first))[v];
    } else if (first < values) {
        FC_UNROLL for (int i = 0; i < 8; i++) {
            const uint32_t word = x[first + i < values ? first + i : values - 1];
            if constexpr (sizeof(typename T::Word) == 4) octet.w[i] = word;
            else octet.w[i / 2] = i & 1 ? octet.w[i / 2] | word << 16 : word;
        }
    }
}

// Reads the octets of this thread.
template <class T> FC_DEVICE void load(const typename T::Word* x, int values, Octet<T> (&octets)[kRows<T>]) {
    const int first = 8 * first_octet<T>();
    FC_UNROLL for (int row = 0; row < kRows<T>; row++) load<T>(x, values, first + 8 * row, octets[row]);
}

// Writes the octet that starts at value `first` of out[0 .. values).
template <class T> FC_DEVICE void store(typename T::Word* out, int values, int first, const Octet<T>& octet) {
    if (((uintptr_t)out & 15) == 0 && first + 8 <= values) {
        FC_UNROLL for (int v = 0; v < Octet<T>::kVectors; v++)((Vec16*)(out + first))[v] = ((const Vec16*)&octet)[v];
    } else {
        FC_UNROLL for (int i = 0; i < 8; i++) if (first + i < values) out[first + i] = (typename T::Word)octet.at(i);
    }
}

// Pads the octet of which `left` values are left with its last one, as load() does.
template <class T> FC_DEVICE void repeat_last(Octet<T>& octet, int left) {
    if (left <= 0 || left >= 8) return;
    uint32_t last = 0;
    FC_UNROLL for (int i = 0; i < 8; i++) {
        const uint32_t word = i < left ? octet.at(i) : last;
        last = word;
        if constexpr (sizeof(typename T::Word) == 4) octet.w[i] = word;
        else octet.w[i / 2] = i & 1 ? (octet.w[i / 2] & 0xFFFF) | word << 16 : (octet.w[i / 2] & 0xFFFF0000) | word;
    }
}

template <class T> FC_DEVICE void store(typename T::Word* out, int values, const Octet<T> (&octets)[kRows<T>]) {
    const int first = 8 * first_octet<T>();
    FC_UNROLL for (int row = 0; row < kRows<T>; row++) store<T>(out, values, first + 8 * row, octets[row]);
}

template <class T> FC_DEVICE void narrow(const float (&x)[kRows<T>][8], Octet<T> (&octets)[kRows<T>]) {
    FC_UNROLL for (int row = 0; row < kRows<T>; row++) octets[row] = narrow<T>(x[row]);
}

// -0 is what changes nothing when a float is added to it, -0 included.
template <int kCount> FC_DEVICE void clear(float (&total)[kCount][8]) {
    FC_UNROLL for (int row = 0; row < kCount; row++) FC_UNROLL for (int i = 0; i < 8; i++) total[row][i] = -0.0f;
}

// A number alone, or one of a sum.
template <bool kAlone> FC_DEVICE void put(const float (&value)[8], float (&x)[8]) {
    FC_UNROLL for (int i = 0; i < 8; i++) x[i] = kAlone ? value[i] : x[i] + value[i];
}

template <class Size> FC_INLINE Size padded16(Size size) { return (size + 15) & ~(Size)15; }

// What a codec is made of when a kernel starts; `format` as in api.h.
struct Setting {
    int format, bits, block;
};

// ---- bit planes ------------------------------------------------------------------------------------------------

// Four codes, one a byte and below 2**kWidth, to and from 4 * kWidth bits.
template <int kWidth> FC_DEVICE uint32_t pack4(uint32_t c) {
    if constexpr (kWidth == 8) return c;
    if constexpr (kWidth == 4) return c |= c >> 4, (c & 0xFF) | (c >> 8 & 0xFF00);
    if constexpr (kWidth == 2) return c |= c >> 6, c |= c >> 12, c & 0xFF;
    if constexpr (kWidth == 1) return c |= c >> 7, c |= c >> 14, c & 0xF;
}
template <int kWidth> FC_DEVICE uint32_t unpack4(uint32_t c) {
    if constexpr (kWidth == 8) return c;
    if constexpr (kWidth == 4) return c = (c | c << 8) & 0x00FF00FF, (c | c << 4) & 0x0F0F0F0F;
    if constexpr (kWidth == 2) return c = (c | c << 12) & 0x000F000F, (c | c << 6) & 0x03030303;
    if constexpr (kWidth == 1) return c = (c | c << 14) & 0x00030003, (c | c << 7) & 0x01010101;
}

// The kWidth bytes of an octet in a plane.
template <int kWidth> FC_DEVICE void store_plane(uint8_t* at, uint32_t low, uint32_t high) {
    if constexpr (kWidth == 8) ((uint32_t*)at)[0] = low, ((uint32_t*)at)[1] = high;
    if constexpr (kWidth == 4) *(uint32_t*)at = low | high << 16;
    if constexpr (kWidth == 2) *(uint16_t*)at = (uint16_t)(low | high << 8);
    if constexpr (kWidth == 1) *at = (uint8_t)(low | high << 4);
}
template <int kWidth> FC_DEVICE void load_plane(const uint8_t* at, uint32_t& low, uint32_t& high) {
    if constexpr (kWidth == 8) low = ((const uint32_t*)at)[0], high = ((const uint32_t*)at)[1];
    if constexpr (kWidth == 4) low = *(const uint32_t*)at & 0xFFFF, high = *(const uint32_t*)at >> 16;
    if constexpr (kWidth == 2) low = *(const uint16_t*)at & 0xFF, high = *(const uint16_t*)at >> 8;
    if constexpr (kWidth == 1) low = *at & 0xF, high = *at >> 4;
}

template <int kWidth> struct Width {
    static constexpr int value = kWidth;
};

// visit(width, shift, start): as Layout::each_plane, with the width in a type. Returns where the planes end.
template <class Size, class Visit> FC_DEVICE Size each_plane(int bits, Size octets, Visit visit) {
    Size start = 0;
    int shift = 0;
    auto plane = [&](auto width) {
        if (!(bits & width.value)) return;
        visit(width, shift, start);
        start += padded16<Size>(octets * width.value);
        shift += width.value;
    };
    plane(Width<8>{});
    plane(Width<4>{});
    plane(Width<2>{});
    plane(Width<1>{});
    return start;
}

template <class Size> FC_INLINE Size plane_bytes(int bits, Size octets) {
    Size bytes = 0;
    FC_UNROLL for (int width = 8; width; width >>= 1) bytes += bits & width ? padded16<Size>(octets * width) : 0;
    return bytes;
}

// Eight codes, a byte each, to and from all planes of `bits` bits, whose octets this one is `octet` of.
template <class Size>
FC_DEVICE void store_octet(int bits, Size octets, Size octet, uint32_t low, uint32_t high, uint8_t* planes) {
    each_plane(bits, octets, [&](auto width, int shift, Size start) {
        constexpr uint32_t kMask = 0x01010101u * ((1u << width.value) - 1);
        store_plane<width.value>(planes + start + octet * width.value, pack4<width.value>(low >> shift & kMask),
                                 pack4<width.value>(high >> shift & kMask));
    });
}
template <class Size>
FC_DEVICE void load_octet(int bits, Size octets, Size octet, const uint8_t* planes, uint32_t (&codes)[2]) {
    codes[0] = codes[1] = 0;
    each_plane(bits, octets, [&](auto width, int shift, Size start) {
        uint32_t low, high;
        load_plane<width.value>(planes + start + octet * width.value, low, high);
        codes[0] |= unpack4<width.value>(low) << shift;
        codes[1] |= unpack4<width.value>(high) << shift;
    });
}

// Eight numbers below 256 as bytes, lowest first, and one of them.
FC_DEVICE uint32_t four_bytes(const uint32_t* code) {
    return byte_perm(byte_perm(code[0], code[1], 0x0040), byte_perm(code[2], code[3], 0x0040), 0x5410);
}
FC_DEVICE uint32_t byte_of(const uint32_t (&codes)[2], int i) { return codes[i / 4] >> (8 * (i & 3)) & 0xFF; }

// Bytes behind a section up to the next.
template <class Size> FC_DEVICE void zero_gap(uint8_t* section, Size size) {
    for (Size i = size; i < padded16(size); i++) section[i] = 0;
}

// ---- the codecs ------------------------------------------------------------------------------------------------

// codec.h's format, kBits a compile-time constant so that planes cost no branch; the block is a runtime value.
template <int kBits, class T> struct UniformTile {
    using Word = typename T::Word;
    static constexpr bool kRotates = false, kKeepsResiduals = false;
    static constexpr int kMostAhead = 4;
    static constexpr int kMaxBytes = kTileOctets<T> * kBits + 2 * 2 * (kTileValues<T> / kMinBlock);
    static constexpr float kLevels = (float)((1 << kBits) - 1);
    static constexpr uint32_t kPlain = 2 * Fit::kVaries;

    struct alignas(16) Meta {  // what the codes of a block depend on; constant == kPlain: prescale is 1
        float minimum, prescale, inverse;
        uint32_t constant;
    };

    // Offsets in the payload of a tile.
    struct At {
        int octets, blocks, scales, minima, bytes;
    };

    int octets_per_block;
    uint32_t reciprocal;  // of octets_per_block, times 2**20, rounded up: exact for up to 1024 octets

    FC_INLINE explicit UniformTile(Setting with)
        : octets_per_block(with.block / 8), reciprocal(((1u << 20) + with.block / 8 - 1) / (with.block / 8)) {}

    FC_INLINE int block() const { return 8 * octets_per_block; }
    static FC_INLINE int octets(int values) { return (values + 7) / 8; }
    FC_INLINE int unit() const { return block(); }
    FC_INLINE int scratch_bytes() const {
        return kTileOctets<T> * (int)sizeof(Keys<T>) + (kTileValues<T> / block()) * (int)sizeof(Meta);
    }
    FC_INLINE int block_of(int octet) const { return (int)(octet * reciprocal >> 20); }

    FC_INLINE At at(int values) const {
        At at;
        at.octets = octets(values);
        at.blocks = block_of(at.octets - 1) + 1;
        at.scales = plane_bytes(kBits, at.octets);
        at.minima = at.scales + padded16(2 * at.blocks);
        at.bytes = at.minima + padded16(2 * at.blocks);
        return at;
    }
    FC_INLINE int bytes(int values) const { return values > 0 ? at(values).bytes : 0; }

    FC_DEVICE void encode(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload) const {
        const At at = this->at(values);
        Keys<T>* keys = (Keys<T>*)scratch;
        Meta* metas = (Meta*)(keys + kTileOctets<T>);
        const int lane = thread(), first = first_octet<T>();
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = first + row;
            if (octet < at.octets) keys[octet] = extremes<T>(x[row]);
        }
        sync();
        for (int index = lane; index < at.blocks; index += kThreads) metas[index] = fit(keys, index, at, payload);
        if (lane == kThreads - 1) zero_gaps(at, payload);
        sync();
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = first + row;
            if (octet < at.octets) store_codes(x[row], values - 8 * octet, metas[block_of(octet)], octet, at, payload);
        }
        sync();
    }

    template <bool kAlone>
    FC_DEVICE uint32_t decode(const uint8_t* payload, int values, int octet, uint32_t, float (&x)[kRows<T>][8]) const {
        const At at = this->at(values);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (octet + row >= at.octets) continue;
            float value[8];
            decode_octet(payload, at, octet + row, value);
            put<kAlone>(value, x[row]);
        }
        return 0;
    }
    template <bool> FC_DEVICE void finish(float (&)[kRows<T>][8], uint32_t) const {}

private:
    FC_DEVICE void decode_octet(const uint8_t* payload, const At& at, int octet, float (&x)[8]) const {
        const int index = block_of(octet);
        const Bf16Pair pair = {((const uint16_t*)(payload + at.scales))[index],
                               ((const uint16_t*)(payload + at.minima))[index]};
        uint32_t codes[2];
        load_octet(kBits, at.octets, octet, payload, codes);
        if (pair.plain<T>(kLevels)) {
            const float scale = float_of(pair.scale << 16), minimum = float_of(pair.minimum << 16);
            FC_UNROLL for (int i = 0; i < 8; i++) {  // 2**23 + code, bit by bit
                const uint32_t number = byte_perm(codes[i / 4], 0x4B000000, 0x7440 | (i & 3));
                x[i] = fused_multiply_add(float_of(number) - 0x1p23f, scale, minimum);
            }
        } else {
            FC_UNROLL for (int i = 0; i < 8; i++) x[i] = pair.value<T>(byte_of(codes, i));
        }
    }

    // Writes the metadata of one block into the payload and returns what its codes depend on.
    FC_DEVICE Meta fit(const Keys<T>* keys, int index, const At& at, uint8_t* payload) const {
        const int first = index * octets_per_block;
        const int last = first + octets_per_block < at.octets ? first + octets_per_block : at.octets;
        Keys<T> both = keys[first];
        for (int octet = first + 1; octet < last; octet++) {
            const Keys<T> more = keys[octet];
            both.low = more.low < both.low ? more.low : both.low;
            both.high = more.high > both.high ? more.high : both.high;
        }
        const Fit fit = Bf16Pair::fit<T>(both.low, both.high, kLevels);
        ((uint16_t*)(payload + at.scales))[index] = (uint16_t)fit.scale_bits;
        ((uint16_t*)(payload + at.minima))[index] = (uint16_t)fit.minimum_bits;
        return {fit.minimum, fit.prescale, fit.inverse, fit.plain ? kPlain : fit.constant};
    }

    // `left`: values from this octet on; codes behind the last one are zero.
    FC_DEVICE void store_codes(const Octet<T>& octet, int left, const Meta& meta, int index, const At& at,
                               uint8_t* payload) const {
        float x[8];
        uint32_t code[8];
        widen<T>(octet, x);
        if (meta.constant == kPlain) {
            FC_UNROLL for (int i = 0; i < 8; i++) code[i] = rounded((x[i] - meta.minimum) * meta.inverse);
        } else {
            const Fit fit = {meta.minimum, meta.prescale, meta.inverse, 0, 0, meta.constant, 0};
            FC_UNROLL for (int i = 0; i < 8; i++) code[i] = code_of(x[i], fit);
        }
        uint32_t codes[2] = {four_bytes(code), four_bytes(code + 4)};
        if (left < 8) {
            const uint64_t mask = ((uint64_t)1 << (8 * left)) - 1;
            codes[0] &= (uint32_t)mask;
            codes[1] &= (uint32_t)(mask >> 32);
        }
        store_octet(kBits, at.octets, index, codes[0], codes[1], payload);
    }

    FC_DEVICE void zero_gaps(const At& at, uint8_t* payload) const {
        each_plane(kBits, at.octets,
                   [&](auto width, int, int start) { zero_gap(payload + start, at.octets * width.value); });
        zero_gap(payload + at.scales, 2 * at.blocks);
        zero_gap(payload + at.minima, 2 * at.blocks);
    }
};

// No compression: the tile itself. What the others are measured against over the same inboxes; finite values only.
template <class T> struct ExactTile {
    static constexpr bool kRotates = false, kKeepsResiduals = false;
    static constexpr int kMostAhead = 4;
    static constexpr int kMaxBytes = kTileValues<T> * sizeof(typename T::Word);

    FC_INLINE explicit ExactTile(Setting) {}
    FC_INLINE int block() const { return 8; }
    static FC_INLINE int octets(int values) { return (values + 7) / 8; }
    FC_INLINE int unit() const { return 8; }
    FC_INLINE int scratch_bytes() const { return 0; }
    FC_INLINE int bytes(int values) const { return (values + 7) / 8 * (int)sizeof(Octet<T>); }

    FC_DEVICE void encode(const Octet<T> (&x)[kRows<T>], int values, uint8_t*, uint8_t* payload) const {
        const int first = first_octet<T>();
        sync();
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = first + row;
            if (8 * octet < values) ((Octet<T>*)payload)[octet] = x[row];
        }
        sync();
    }
    template <bool kAlone>
    FC_DEVICE uint32_t decode(const uint8_t* payload, int values, int octet, uint32_t, float (&x)[kRows<T>][8]) const {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (octet + row >= octets(values)) continue;
            float value[8];
            widen<T>(((const Octet<T>*)payload)[octet + row], value);
            put<kAlone>(value, x[row]);
        }
        return 0;
    }
    template <bool> FC_DEVICE void finish(float (&)[kRows<T>][8], uint32_t) const {}
};

}  // namespace flashcomm::FLASHCOMM_ISA
