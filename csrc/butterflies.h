// Butterflies on the CPU: an unnormalized Walsh-Hadamard transform of one block in vectors.
//
// Within a vector a butterfly is a shuffle and a sum or difference; between vectors, plain additions. Both add
// the same two numbers in the same order as the definition, so the bits are the same on every instruction set.
#pragma once

#include <stdint.h>
#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace flashcomm::FLASHCOMM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// Every lane's partner, kStride away.
template <int kStride, class V> inline V partners(V x) {
    Lanes lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i ^ kStride;
#if defined(__clang__)
    V y;
    for (int i = 0; i < kLanes; i++) y[i] = x[lane[i]];
    return y;
#else
    return __builtin_shuffle(x, lane);
#endif
}

// (a, b) -> (a + b, a - b) for lanes kStride apart: the partner, plus this lane or, where it is b, minus it. A product
// by one is exact, so that fused or not the sum is rounded once.
template <int kStride> inline Vector across(Vector x) {
    Vector sign;
    for (int i = 0; i < kLanes; i++) sign[i] = i & kStride ? -1.0f : 1.0f;
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)x, (__m512)sign, (__m512)partners<kStride>(x));
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)x, (__m256)sign, (__m256)partners<kStride>(x));
#else
    return partners<kStride>(x) + x * sign;
#endif
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

// The largest lane.
inline uint32_t largest_of(Words x) {
    const auto meet = [](Words x, Words y) { return x > y ? x : y; };
    if constexpr (kLanes > 8) x = meet(x, partners<8>(x));
    if constexpr (kLanes > 4) x = meet(x, partners<4>(x));
    x = meet(x, partners<2>(x));
    return meet(x, partners<1>(x))[0];
}

// Numbers ordered by magnitude, the negative one first among equals: the sign moves to the lowest bit.
inline Words magnitude_key(Vector x) { return (Words)x << 1 | (Words)x >> 31; }

// Rotates a block in place; kBlock is its size, or 0 if only known at run time.
template <int kBlock> inline void butterflies(float* x, int block) {
    if constexpr (kBlock != 0) {
        constexpr int kCount = kBlock / kLanes;
        Vector v[kCount];
#pragma GCC unroll 16
        for (int i = 0; i < kCount; i++) v[i] = within(((Vector*)x)[i]);
#pragma GCC unroll 16
        for (int stride = 1; stride < kCount; stride *= 2)
#pragma GCC unroll 16
            for (int i = 0; i < kCount; i++)
                if (!(i & stride)) pair(v[i], v[i + stride]);
#pragma GCC unroll 16
        for (int i = 0; i < kCount; i++) ((Vector*)x)[i] = v[i];
    } else {
        Vector* v = (Vector*)x;
        const int count = block / kLanes;
        for (int i = 0; i < count; i++) v[i] = within(v[i]);
        for (int stride = 1; stride < count; stride *= 2)
            for (int start = 0; start < count; start += 2 * stride)
                for (int i = start; i < start + stride; i++) pair(v[i], v[i + stride]);
    }
}

// The largest magnitude_key of a block.
template <int kBlock> inline uint32_t largest_key(const float* x, int block) {
    const Vector* v = (const Vector*)x;
    const int count = (kBlock ? kBlock : block) / kLanes;
    Words most = magnitude_key(v[0]);
#pragma GCC unroll 16
    for (int i = 1; i < count; i++) {
        const Words key = magnitude_key(v[i]);
        most = key > most ? key : most;
    }
    return largest_of(most);
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
