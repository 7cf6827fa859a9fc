// Blocks in registers on the CPU, one in every track: loads, Walsh-Hadamard butterflies, stores.
//
//     load_values    of kTracks blocks, track t those of block t: the even and the odd values of every octet by themselves, which
//                    is how 16-bit types widen without a shuffle
//     rotate         strides 1, 2, 4 in an octet's two vectors, transposed before each; 8, 16, .. between octets
//     store_quads    what comes out: vector k holds values 4k .. 4k + 3
//
// Every butterfly adds the same two numbers in the same order as the definition. Integers are exact in any order, and
// take the one that ends in the wanted arrangement.
#pragma once

#include "cpu/butterflies.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// ---- pieces: 128 bits, a track's share of a vector -----------------------------------------------------------------

template <int kSize = 4, int kCount> FC_INLINE void unzip_pieces(Words (&v)[kCount]) {
    const auto even = [](int i) { return i / kSize * 2 * kSize + i % kSize; };
    const auto odd = [](int i) { return i / kSize * 2 * kSize + kSize + i % kSize; };
    Words w[kCount];
#pragma GCC unroll 32
    for (int i = 0; i < kCount / 2; i++) {
        w[i] = shuffled(v[2 * i], v[2 * i + 1], even);
        w[i + kCount / 2] = shuffled(v[2 * i], v[2 * i + 1], odd);
    }
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++) v[i] = w[i];
}

template <int kCount> FC_INLINE void zip_pieces(Words (&v)[kCount]) {
    const auto lower = [](int i) { return i / 8 * 4 + i / 4 % 2 * kLanes + i % 4; };
    const auto upper = [](int i) { return i / 8 * 4 + i / 4 % 2 * kLanes + i % 4 + kLanes / 2; };
    Words w[kCount];
#pragma GCC unroll 32
    for (int i = 0; i < kCount / 2; i++) {
        w[2 * i] = shuffled(v[i], v[i + kCount / 2], lower);
        w[2 * i + 1] = shuffled(v[i], v[i + kCount / 2], upper);
    }
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++) v[i] = w[i];
}

// kCount pieces of every block, which follow each other in memory: vector i becomes piece i of all of them.
template <int kCount> FC_INLINE void load_pieces(const void* from, Words (&v)[kCount]) {
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++) v[i] = load<Words>((const char*)from + i * sizeof(Words));
    if constexpr (kCount <= kTracks) {
        for (int n = 1; n < kCount; n *= 2) unzip_pieces(v);
    } else {
        for (int n = 1; n < kTracks; n *= 2) zip_pieces(v);
    }
}

template <int kCount> FC_INLINE void store_pieces(Words (&v)[kCount], void* to) {
    if constexpr (kCount <= kTracks) {
        for (int n = 1; n < kCount; n *= 2) zip_pieces(v);
    } else {
        for (int n = 1; n < kTracks; n *= 2) unzip_pieces(v);
    }
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++) store(v[i], (char*)to + i * sizeof(Words));
}

// ---- values --------------------------------------------------------------------------------------------------------
// kCount vectors: two for every octet of a block. NaN and Inf stay what they are; what is stored is finite and rounded
// once.

// v[2k], v[2k + 1]: even and odd values of octet k.
template <class T, int kCount> FC_INLINE void load_values(const typename T::Word* x, Vector (&v)[kCount]) {
    if constexpr (sizeof(typename T::Word) == 4) {
        Words quads[kCount];
        load_pieces(x, quads);
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i += 2) {
            const auto octet = unzipped(Both<Vector>{(Vector)quads[i], (Vector)quads[i + 1]});
            v[i] = octet.first, v[i + 1] = octet.second;
        }
    } else {
        Words octets[kCount / 2];
        load_pieces(x, octets);
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i += 2) {
            const Words both = octets[i / 2];
            if constexpr (T::kInfinity == Float16::kInfinity)
                v[i] = widened_half(both & 0xFFFF), v[i + 1] = widened_half(both >> 16);
            else v[i] = (Vector)(both << 16), v[i + 1] = (Vector)(both & 0xFFFF0000);
        }
    }
}

// v[k]: values 4k .. 4k + 3. Sixteen lanes of a 16-bit type are half a vector, of which every track has 64 bits.
template <class T, int kCount> FC_INLINE void store_quads(const Vector (&v)[kCount], typename T::Word* out) {
    constexpr bool kNarrows = sizeof(typename T::Word) == 2;
    Words quads[kNarrows ? kCount / 2 : kCount];
    if constexpr (!kNarrows) {
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i++) quads[i] = (Words)v[i];
        store_pieces(quads, out);
    } else if constexpr (kTracks == 4) {
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i += 2) quads[i / 2] = narrowed<T>(v[i], v[i + 1]);
        unzip_pieces<2>(quads);
        unzip_pieces<2>(quads);
#pragma GCC unroll 32
        for (int i = 0; i < kCount / 2; i++) store(quads[i], out + i * 2 * kLanes);
    } else {
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i += 2) quads[i / 2] = narrowed<T>(v[i], v[i + 1]);
        store_pieces(quads, out);
    }
}

// ---- butterflies ---------------------------------------------------------------------------------------------------

// Every two vectors kStride from each other, then twice as far.
template <int kStride, class V, int kCount> FC_INLINE void between(V (&v)[kCount]) {
    if constexpr (kStride < kCount) {
#pragma GCC unroll 32
        for (int i = 0; i < kCount; i++)
            if (!(i & kStride)) pair(v[i], v[i + kStride]);
        between<2 * kStride>(v);
    }
}

struct Unzip {
    template <class V> FC_INLINE Both<V> operator()(Both<V> x) const { return unzipped(x); }
};
struct Zip {
    template <class V> FC_INLINE Both<V> operator()(Both<V> x) const { return zipped(x); }
};

// Transpose: the bit kStride of a vector's index changes places with that of a lane's.
template <int kStride, class How, class V, int kCount> FC_INLINE void transpose(V (&v)[kCount]) {
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++)
        if (!(i & kStride)) {
            const Both<V> both = How()(Both<V>{v[i], v[i + kStride]});
            v[i] = both.first, v[i + kStride] = both.second;
        }
}

template <int kStride, class How, class V, int kCount> FC_INLINE void transpose_and_pair(V (&v)[kCount]) {
    transpose<kStride, How>(v);
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++)
        if (!(i & kStride)) pair(v[i], v[i + kStride]);
}

// As load_values leaves them -> quads.
template <int kCount> FC_INLINE void rotate(Vector (&v)[kCount]) {
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i += 2) pair(v[i], v[i + 1]);
    transpose_and_pair<1, Unzip>(v);
    transpose_and_pair<1, Unzip>(v);
    between<2>(v);
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
