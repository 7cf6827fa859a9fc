// What the kernels need of the machine that runs them, in two dozen small functions.
//
// Compiled by nvcc these are CUDA. Compiled by a host compiler they are only declared: tests/support/stand_ins/cuda
// defines them with one fiber for each thread, so that the kernels run and are checked without a GPU.
// What an emulation cannot show is the memory model; the PTX below is where that is decided.
#pragma once

#include "format/codec.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FC_DEVICE __device__ __forceinline__
#else
#define FC_DEVICE inline
#endif
#if defined(__CUDA_ARCH__)
#define FC_UNROLL _Pragma("unroll")
#else
#define FC_UNROLL
#endif

namespace flashcomm::FLASHCOMM_ISA {

constexpr int kWarp = 32;

struct alignas(16) Vec16 {
    uint32_t w[4];
};

#if defined(__CUDACC__)

// Opaque, lest the compiler computes every offset of every step once before the first round and keeps them all: that
// took 200 registers where 100 do.
FC_DEVICE int thread() {
    int index = (int)threadIdx.x;
    asm volatile("" : "+r"(index));
    return index;
}
FC_DEVICE int64_t block_index() { return blockIdx.x; }
FC_DEVICE int64_t block_count() { return gridDim.x; }
FC_DEVICE void sync() { __syncthreads(); }
FC_DEVICE bool sync_and(bool mine) { return __syncthreads_and(mine); }

// All 32 lanes of a warp take part in these: what the lane `apart` away holds, and in whose lanes something is so.
FC_DEVICE uint32_t exchange(uint32_t mine, int apart) { return __shfl_xor_sync(~0u, mine, apart); }
FC_DEVICE void exchange(const float (&mine)[8], int apart, float (&theirs)[8]) {
    FC_UNROLL for (int i = 0; i < 8; i++) theirs[i] = __shfl_xor_sync(~0u, mine[i], apart);
}
FC_DEVICE uint32_t votes(bool mine) { return __ballot_sync(~0u, mine); }

FC_DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(16) uint8_t memory[];
    return memory;
}

// System scope: the other end may be another GPU or the host. A barrier of the block before a release makes it cover
// what all threads of the block wrote. A reader polls with relaxed loads and fences once, when it has seen the flag;
// a barrier behind the fence lets all threads of its block read.
FC_DEVICE uint64_t load_relaxed(const uint64_t* word) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}
FC_DEVICE void fence_acquire() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
FC_DEVICE void rest(uint32_t nanoseconds) { __nanosleep(nanoseconds); }
FC_DEVICE void store_release(uint64_t* word, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
FC_DEVICE uint64_t swap_if(uint64_t* word, uint64_t expected, uint64_t value) {
    return atomicCAS((unsigned long long*)word, expected, value);
}
FC_DEVICE uint32_t count_up(uint32_t* word) {  // all this block did is ordered before, all after it behind
    __threadfence();
    const uint32_t before = atomicAdd(word, 1u);
    __threadfence();
    return before;
}
FC_DEVICE uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Past the first-level cache: the bytes were written by somebody else.
FC_DEVICE Vec16 load_fresh(const Vec16* at) {
    const uint4 v = __ldcg((const uint4*)at);
    return {v.x, v.y, v.z, v.w};
}
FC_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
FC_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
FC_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

#else

int thread();
int64_t block_index();
int64_t block_count();
void sync();
bool sync_and(bool mine);
uint32_t exchange(uint32_t mine, int apart);
void exchange(const float (&mine)[8], int apart, float (&theirs)[8]);
uint32_t votes(bool mine);
uint8_t* shared_memory();
uint64_t load_relaxed(const uint64_t* word);
void fence_acquire();
void rest(uint32_t nanoseconds);
void store_release(uint64_t* word, uint64_t value);
uint64_t swap_if(uint64_t* word, uint64_t expected, uint64_t value);
uint32_t count_up(uint32_t* word);
uint64_t nanoseconds();
Vec16 load_fresh(const Vec16* at);

FC_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t picked = 0;
    for (int i = 0; i < 4; i++) picked |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return picked;
}
FC_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
FC_DEVICE float fused_multiply_add(float a, float b, float c) { return a * b + c; }  // only where a * b is exact

#endif

// ---- eight values of one thread --------------------------------------------------------------------------------

template <class T> struct alignas(16) Octet {
    static constexpr int kWords = 2 * sizeof(typename T::Word), kVectors = kWords / 4;
    uint32_t w[kWords];

    FC_DEVICE uint32_t at(int i) const {
        return sizeof(typename T::Word) == 4 ? w[i] : w[i / 2] >> (16 * (i & 1)) & 0xFFFF;
    }
};

// Two 16-bit values of one word as float32, and back. Any value but NaN.
template <class T> FC_DEVICE void widen2(uint32_t word, float& first, float& second) {
    first = T::widen(word & 0xFFFF);
    second = T::widen(word >> 16);
}
template <class T> FC_DEVICE uint32_t narrow2(float first, float second) {
    return T::narrow(first) | T::narrow(second) << 16;
}

#if defined(__CUDACC__)
template <> FC_DEVICE void widen2<BFloat16>(uint32_t word, float& first, float& second) {
    first = float_of(word << 16);
    second = float_of(word & 0xFFFF0000);
}
template <> FC_DEVICE void widen2<Float16>(uint32_t word, float& first, float& second) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    first = __low2float(pair);
    second = __high2float(pair);
}
template <> FC_DEVICE uint32_t narrow2<BFloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}
template <> FC_DEVICE uint32_t narrow2<Float16>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}
#endif

template <class T> FC_DEVICE void widen(const Octet<T>& octet, float (&x)[8]) {
    FC_UNROLL for (int i = 0; i < 8; i += 2) {
        if constexpr (sizeof(typename T::Word) == 4) {
            x[i] = float_of(octet.w[i]);
            x[i + 1] = float_of(octet.w[i + 1]);
        } else {
            widen2<T>(octet.w[i / 2], x[i], x[i + 1]);
        }
    }
}

// NaN comes in whole octets, since octets never straddle blocks.
template <class T> FC_DEVICE Octet<T> narrow(const float (&x)[8]) {
    constexpr bool kWide = sizeof(typename T::Word) == 4;
    Octet<T> octet;
    FC_UNROLL for (int i = 0; i < 8; i += 2) {
        if constexpr (kWide) {
            octet.w[i] = bits_of(x[i]);
            octet.w[i + 1] = bits_of(x[i + 1]);
        } else {
            octet.w[i / 2] = narrow2<T>(x[i], x[i + 1]);
        }
    }
    constexpr uint32_t kNan = T::kNan * (kWide ? 1u : 0x10001u);
    if (x[0] != x[0]) FC_UNROLL for (int i = 0; i < Octet<T>::kWords; i++) octet.w[i] = kNan;
    return octet;
}

// The ordered keys of the smallest and the largest of eight values.
template <class T> struct Keys {
    typename T::Word low, high;
};

template <class T> FC_DEVICE Keys<T> extremes(const Octet<T>& octet) {
    using Word = typename T::Word;
    Keys<T> keys = {(Word) ~(Word)0, 0};
    FC_UNROLL for (int i = 0; i < 8; i++) {
        const Word key = ordered<T>((Word)octet.at(i));
        keys.low = key < keys.low ? key : keys.low;
        keys.high = key > keys.high ? key : keys.high;
    }
    return keys;
}

#if defined(__CUDACC__)
// min and max of the hardware keep NaN, order -0 below +0 and know denormals: the same order, two values at a time.
template <class T, class Pair, class Min, class Max>
FC_DEVICE Keys<T> paired_extremes(const Octet<T>& octet, Min least, Max most) {
    Pair x[4];
    memcpy(x, octet.w, 16);
    Pair low = least(least(x[0], x[1]), least(x[2], x[3])), high = most(most(x[0], x[1]), most(x[2], x[3]));
    uint32_t bits[2];
    memcpy(&bits[0], &low, 4);
    memcpy(&bits[1], &high, 4);
    const uint32_t swapped[2] = {byte_perm(bits[0], 0, 0x1032), byte_perm(bits[1], 0, 0x1032)};
    Pair turned[2];
    memcpy(turned, swapped, 8);
    low = least(low, turned[0]);
    high = most(high, turned[1]);
    memcpy(&bits[0], &low, 4);
    memcpy(&bits[1], &high, 4);
    return {ordered<T>((uint16_t)bits[0]), ordered<T>((uint16_t)bits[1])};
}
template <> FC_DEVICE Keys<BFloat16> extremes(const Octet<BFloat16>& octet) {
    using Pair = __nv_bfloat162;
    return paired_extremes<BFloat16, Pair>(
        octet, [](Pair a, Pair b) { return __hmin2_nan(a, b); }, [](Pair a, Pair b) { return __hmax2_nan(a, b); });
}
template <> FC_DEVICE Keys<Float16> extremes(const Octet<Float16>& octet) {
    using Pair = __half2;
    return paired_extremes<Float16, Pair>(
        octet, [](Pair a, Pair b) { return __hmin2_nan(a, b); }, [](Pair a, Pair b) { return __hmax2_nan(a, b); });
}
#endif

}  // namespace flashcomm::FLASHCOMM_ISA
