// Butterflies on the CPU: an unnormalized Walsh-Hadamard transform of one block in memory.
//
// Within a vector a butterfly is a shuffle and a sum or difference; between vectors, plain additions. Both add
// the same two numbers in the same order as the definition, so the bits are the same on every instruction set.
#pragma once

#include "cpu/vectors.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// (a, b) -> (a + b, a - b) for lanes whose numbers differ by kStride: the partner, plus this lane or, where it is b,
// minus it.
template <int kStride, class V> FC_INLINE V across(V x) {
    V sign = {};
    for (int i = 0; i < kLanesOf<V>; i++) sign[i] = i & kStride ? -1 : 1;
    if constexpr (sizeof(x[0]) == 2) return x * sign + partners<kStride>(x);
    else return scaled(x, sign, partners<kStride>(x));
}

// a - b. Where additions and fused multiplications have units of their own, both are kept busy.
template <class V> FC_INLINE V difference(V a, V b) {
#if defined(__FMA__)
    if constexpr (sizeof(a[0]) == 4) return scaled(b, V{} - 1, a);
#endif
    return a - b;
}

template <class V> FC_INLINE void pair(V& a, V& b) {
    const V sum = a + b;
    b = difference(a, b);
    a = sum;
}

template <int kStride = 1> FC_INLINE Vector within(Vector x) {
    if constexpr (kStride < kLanes) return within<2 * kStride>(across<kStride>(x));
    else return x;
}

// Numbers ordered by magnitude, the negative one first among equals: the sign moves to the lowest bit.
FC_INLINE Words magnitude_key(Vector x) { return (Words)x << 1 | (Words)x >> 31; }

inline void butterflies(float* x, int block) {
    for (int i = 0; i < block; i += kLanes) store(within(load<Vector>(x + i)), x + i);
    for (int stride = kLanes; stride < block; stride *= 2)
        for (int start = 0; start < block; start += 2 * stride)
            for (int i = start; i < start + stride; i += kLanes) {
                Vector a = load<Vector>(x + i), b = load<Vector>(x + i + stride);
                pair(a, b);
                store(a, x + i);
                store(b, x + i + stride);
            }
}

template <int kStride = kLanes / 2> inline Words largest_of(Words x) {
    if constexpr (kStride > 0) return largest_of<kStride / 2>(larger(x, partners<kStride>(x)));
    else return x;
}

// The largest magnitude_key of a block.
inline uint32_t largest_key(const float* x, int block) {
    Words most = {};
    for (int i = 0; i < block; i += kLanes) most = larger(most, magnitude_key(load<Vector>(x + i)));
    return largest_of(most)[0];
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
