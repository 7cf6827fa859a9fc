// One thread block codes one tile: up to 16 KiB of values in registers, their payload in shared memory.
//
// A thread holds four neighbouring octets (of float32: two), so that most of what a block needs is in its registers. The
// payload of a tile is the payload of its values, so it is independent of who coded it and how the tensor was cut. A
// codec is
//
//     Codec(Setting)                               width and block, as far as they are not in the type
//     block(), unit()                              slices are multiples of one, tiles of the other
//     octets(values), bytes(values)                that a payload holds; its length, a multiple of 16
//     scratch_bytes()                              that encoding needs
//     residual_numel(values)                       numbers of the residual of a tensor, where kKeepsResiduals
//     own(values)                                  Place: where a payload of these values alone has its sections
//     with_blocks(visit)                           visit(the codec of such blocks): asked once, around all work on them
//
// and the codec of blocks has
//
//     encode_to<kOwn>(octets, values, scratch, payload, place, residual)    all threads; kOwn: the payload is this
//                                                  tile's alone: a barrier, then writes, then a barrier
//     decode_from<kAlone>(payload, place, octet, shrink, x)    whole warps: octets of a thread as float32; kAlone: not
//                                                  to be added
//     bound(payload, place, octet)                 by how much the values of an octet may be off (codec.h)
//     finish<kAlone>(x, shrunk)                    whole warps: inverse transform of decoded coefficients
//
// Most codecs decode values; a rotated one (kRotates) decodes coefficients, and finish() transforms their sum back. Its
// decode_from() returns whether this block's sum could overflow; the sum is then taken again, scaled down. kMostAhead: how
// many 16-byte words of the next payload a thread prefetches, as registers allow without spilling on sm_100 and sm_120.
//
// The codecs are in uniform_tile.h, rotated_tile.h and spike_tile.h; ExactTile is here. What one value costs of them:
// benchmarks/results/sass_counts.json.
#pragma once

#include "cuda/planes.h"
#include "cuda/protocol.h"

namespace flashcomm::FLASHCOMM_ISA {

constexpr int kThreads = 256;
constexpr int kLeastTile = 8 * kThreads;  // values: one octet a thread

template <class T> constexpr int kRows = 8 / (int)sizeof(typename T::Word);  // octets of one thread
template <class T> constexpr int kTileOctets = kThreads * kRows<T>;
template <class T> constexpr int kTileValues = 8 * kTileOctets<T>;
constexpr int kThreadsValues = 32;  // of one thread, at most
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
    if (((uintptr_t)x & 15) == 0 && first + 8 * kRows<T> <= values) {
        FC_UNROLL for (int v = 0; v < 4; v++)((Vec16*)octets)[v] = ((const Vec16*)(x + first))[v];
    } else {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) load<T>(x, values, first + 8 * row, octets[row]);
    }
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
    if (((uintptr_t)out & 15) == 0 && first + 8 * kRows<T> <= values) {
        constexpr int kVectors = Octet<T>::kVectors;
        FC_UNROLL for (int v = 0; v < 4; v++)
            store_global((Vec16*)(out + first) + v, octets[v / kVectors].vector(v % kVectors));
    } else {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) store<T>(out, values, first + 8 * row, octets[row]);
    }
}

// By how much sums of float16 may be off, an octet's each, which decides whether they overflow; nothing for other types.
template <class T, bool = kIsHalf<T>> struct Bounds {
    template <class Codec, class Place> FC_DEVICE void add(const Codec&, const uint8_t*, const Place&, int) {}
    FC_DEVICE void apply(float (&)[kRows<T>][8]) const {}
};
template <class T> struct Bounds<T, true> {
    float rows[kRows<T>] = {};

    template <class Codec, class Place>
    FC_DEVICE void add(const Codec& codec, const uint8_t* payload, const Place& place, int octet) {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) rows[row] += codec.bound(payload, place, octet + row);
    }
    FC_DEVICE void apply(float (&x)[kRows<T>][8]) const {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) FC_UNROLL for (int i = 0; i < 8; i++) x[row][i] =
            overflowed<T>(x[row][i], rows[row]);
    }
};

// NaN comes in whole octets, since octets never straddle blocks.
template <class T> FC_DEVICE void narrow(const float (&x)[kRows<T>][8], Octet<T> (&octets)[kRows<T>]) {
    bool is_any_nan = false;
    FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
        octets[row] = narrow<T>(x[row]);
        is_any_nan |= x[row][0] != x[row][0];
    }
    if (is_any_nan)
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) if (x[row][0] != x[row][0]) octets[row] = octet_of_nan<T>();
}

// -0 is what changes nothing when a float is added to it, -0 included.
template <int kCount> FC_DEVICE void clear(float (&total)[kCount][8]) {
    FC_UNROLL for (int row = 0; row < kCount; row++) FC_UNROLL for (int i = 0; i < 8; i++) total[row][i] = -0.0f;
}

// A number alone, or one of a sum.
template <bool kAlone> FC_DEVICE void put(const float (&value)[8], float (&x)[8]) {
    FC_UNROLL for (int i = 0; i < 8; i++) x[i] = kAlone ? value[i] : x[i] + value[i];
}

// What a codec is made of when a kernel starts; `format` as in api.h.
struct Setting {
    int format, bits, block;
};

// ---- payloads ----------------------------------------------------------------------------------------------------

// Bytes behind a section up to the next.
template <class Size> FC_DEVICE void zero_gap(uint8_t* section, Size size) {
    for (Size i = size; i < padded16(size); i++) section[i] = 0;
}

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
    FC_INLINE int own(int values) const { return octets(values); }

    template <bool>
    FC_DEVICE void encode_to(const Octet<T> (&x)[kRows<T>], int, uint8_t*, uint8_t* payload, int octets,
                             typename T::Word*) const {
        sync();
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = first_octet<T>() + row;
            if (octet < octets) ((Octet<T>*)payload)[octet] = x[row];
        }
        sync();
    }
    template <bool kAlone>
    FC_DEVICE uint32_t decode_from(const uint8_t* payload, int octets, int octet, uint32_t,
                                   float (&x)[kRows<T>][8]) const {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (octet + row >= octets) continue;
            float value[8];
            widen<T>(((const Octet<T>*)payload)[octet + row], value);
            put<kAlone>(value, x[row]);
        }
        return 0;
    }
    template <class Visit> FC_DEVICE void with_blocks(Visit visit) const { visit(*this); }
    template <bool> FC_DEVICE void finish(float (&)[kRows<T>][8], uint32_t) const {}
    FC_DEVICE float bound(const uint8_t*, int, int) const { return 0; }
};

}  // namespace flashcomm::FLASHCOMM_ISA
