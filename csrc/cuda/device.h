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
// The same number; what follows from it is worked out again from here on, instead of kept in registers.
FC_DEVICE int again(int number) {
    asm volatile("" : "+r"(number));
    return number;
}
FC_DEVICE int64_t block_index() { return blockIdx.x; }
FC_DEVICE int64_t block_count() { return gridDim.x; }
FC_DEVICE void sync() { __syncthreads(); }
FC_DEVICE bool sync_and(bool mine) { return __syncthreads_and(mine); }

// All 32 lanes of a warp take part in these: what the lane holds whose number differs by the bit `stride`, and in whose
// lanes something is so.
FC_DEVICE uint32_t exchange(uint32_t mine, int stride) { return __shfl_xor_sync(~0u, mine, stride); }
FC_DEVICE void exchange(const float (&mine)[8], int stride, float (&theirs)[8]) {
    FC_UNROLL for (int i = 0; i < 8; i++) theirs[i] = __shfl_xor_sync(~0u, mine[i], stride);
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
// In one access, whatever registers the words come from.
FC_DEVICE void store_global(Vec16* at, const Vec16& v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(v.w[0]),
                 "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}
FC_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
FC_DEVICE uint32_t byte_perm_signed(uint32_t a, uint32_t b, uint32_t selector) {  // + 8: its sign, repeated
    uint32_t found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
    return found;
}
FC_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
// In one instruction; compilers that know a sign of the factors take four.
FC_DEVICE int64_t product(int a, int b) {
    int64_t found;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(found) : "r"(a), "r"(b));
    return found;
}
// min(max(x + more, 0), most): one instruction on sm_90.
FC_DEVICE uint32_t clamped(uint32_t x, int more, int most) { return __viaddmin_s32_relu((int)x, more, most); }
FC_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// 1 / x, rounded to nearest, of x between 2**-120 and 2**120: what the division does there, without asking where.
FC_DEVICE float reciprocal(float x) {
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(x));
    return __fmaf_rn(near, -__fmaf_rn(x, near, -1.0f), near);
}

#else

int thread();
FC_DEVICE int again(int number) { return number; }
int64_t block_index();
int64_t block_count();
void sync();
bool sync_and(bool mine);
uint32_t exchange(uint32_t mine, int stride);
void exchange(const float (&mine)[8], int stride, float (&theirs)[8]);
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
FC_DEVICE void store_global(Vec16* at, const Vec16& v) { *at = v; }

FC_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t picked = 0;
    for (int i = 0; i < 4; i++) picked |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return picked;
}
FC_DEVICE uint32_t byte_perm_signed(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t picked = byte_perm(a, b, selector);
    for (int i = 0; i < 4; i++)
        if (selector >> (4 * i) & 8)
            picked = (picked & ~(0xFFu << 8 * i)) | (picked >> (8 * i + 7) & 1) * (0xFFu << 8 * i);
    return picked;
}
FC_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
FC_DEVICE int64_t product(int a, int b) { return (int64_t)a * b; }
FC_DEVICE uint32_t clamped(uint32_t x, int more, int most) {
    const int sum = (int)(x + (uint32_t)more);
    return sum < 0 ? 0 : sum > most ? most : sum;
}
FC_DEVICE float fused_multiply_add(float a, float b, float c) { return a * b + c; }  // only where a * b is exact
FC_DEVICE float reciprocal(float x) { return 1.0f / x; }

#endif

// ---- eight values of one thread --------------------------------------------------------------------------------

template <class T> struct alignas(16) Octet {
    static constexpr int kWords = 2 * sizeof(typename T::Word), kVectors = kWords / 4;
    uint32_t w[kWords];

    FC_DEVICE Vec16 vector(int v) const { return {{w[4 * v], w[4 * v + 1], w[4 * v + 2], w[4 * v + 3]}}; }
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

// Any number but NaN.
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
    return octet;
}
template <class T> FC_DEVICE Octet<T> octet_of_nan() {
    Octet<T> octet;
    FC_UNROLL for (int i = 0; i < Octet<T>::kWords; i++) octet.w[i] =
        T::kNan * (sizeof(typename T::Word) == 4 ? 1u : 0x10001u);
    return octet;
}

// The ordered keys of the smallest and the largest of some values.
template <class T> struct Keys {
    typename T::Word low = (typename T::Word) ~(typename T::Word)0, high = 0;

    FC_DEVICE void take(const Keys& more) {
        low = more.low < low ? more.low : low;
        high = more.high > high ? more.high : high;
    }
};

// Of two pairs of 16-bit values the smaller and the larger ones.
template <class T> FC_DEVICE uint32_t least_of_pairs(uint32_t a, uint32_t b);
template <class T> FC_DEVICE uint32_t most_of_pairs(uint32_t a, uint32_t b);
#if defined(__CUDACC__)
template <class Pair> FC_DEVICE Pair pair_of(uint32_t word) {
    Pair pair;
    memcpy(&pair, &word, 4);
    return pair;
}
template <class Pair> FC_DEVICE uint32_t word_of(Pair pair) {
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}
template <> FC_DEVICE uint32_t least_of_pairs<BFloat16>(uint32_t a, uint32_t b) {
    return word_of(__hmin2_nan(pair_of<__nv_bfloat162>(a), pair_of<__nv_bfloat162>(b)));
}
template <> FC_DEVICE uint32_t most_of_pairs<BFloat16>(uint32_t a, uint32_t b) {
    return word_of(__hmax2_nan(pair_of<__nv_bfloat162>(a), pair_of<__nv_bfloat162>(b)));
}
template <> FC_DEVICE uint32_t least_of_pairs<Float16>(uint32_t a, uint32_t b) {
    return word_of(__hmin2_nan(pair_of<__half2>(a), pair_of<__half2>(b)));
}
template <> FC_DEVICE uint32_t most_of_pairs<Float16>(uint32_t a, uint32_t b) {
    return word_of(__hmax2_nan(pair_of<__half2>(a), pair_of<__half2>(b)));
}
#endif

// The smallest and the largest of some values, while they are looked for. On GPUs min and max of the hardware keep NaN,
// order -0 below +0 and know denormals: the order of the keys, for two values at a time.
template <class T> class Extremes {
#if defined(__CUDACC__)
    static constexpr bool kPaired = sizeof(typename T::Word) == 2;
#else
    static constexpr bool kPaired = false;
#endif
    using Word = typename T::Word;
    // Of pairs of values, each with a smallest and a largest; else of keys.
    uint32_t low_ = kPaired ? T::kInfinity * 0x10001u : (Word) ~(Word)0;
    uint32_t high_ = kPaired ? (T::kInfinity | 0x8000u) * 0x10001u : 0;

    FC_DEVICE void take(uint32_t low, uint32_t high) {
        if constexpr (kPaired) {
            low_ = least_of_pairs<T>(low_, low), high_ = most_of_pairs<T>(high_, high);
        } else {
            low_ = low < low_ ? low : low_;
            high_ = high > high_ ? high : high_;
        }
    }
    FC_DEVICE uint32_t low_pair() const { return least_of_pairs<T>(low_, byte_perm(low_, 0, 0x1032)); }  // twice
    FC_DEVICE uint32_t high_pair() const { return most_of_pairs<T>(high_, byte_perm(high_, 0, 0x1032)); }
    static FC_DEVICE float first_of(uint32_t pair) {
        float first, second;
        widen2<T>(pair, first, second);
        return first;
    }

public:
    FC_DEVICE void take(const Octet<T>& octet) {
        if constexpr (kPaired) {
            FC_UNROLL for (int i = 0; i < 4; i++) take(octet.w[i], octet.w[i]);
        } else {
            FC_UNROLL for (int i = 0; i < 8; i++) {
                const uint32_t key = ordered<T>((Word)octet.at(i));
                take(key, key);
            }
        }
    }
    template <int kCount> FC_DEVICE void take(const Octet<T> (&octets)[kCount]) {
        FC_UNROLL for (int i = 0; i < kCount; i++) take(octets[i]);
    }
    FC_DEVICE void exchange(int stride) {
        take(flashcomm::FLASHCOMM_ISA::exchange(low_, stride), flashcomm::FLASHCOMM_ISA::exchange(high_, stride));
    }
    FC_DEVICE Keys<T> keys() const {
        if constexpr (kPaired) return {ordered<T>((Word)low_pair()), ordered<T>((Word)high_pair())};
        else return {(Word)low_, (Word)high_};
    }
    // As float32; NaN if one is among the values.
    FC_DEVICE float low() const {
        if constexpr (kPaired) return first_of(low_pair());
        else return T::widen(unordered<T>(low_));
    }
    FC_DEVICE float high() const {
        if constexpr (kPaired) return first_of(high_pair());
        else return T::widen(unordered<T>(high_));
    }
};

template <class T> FC_DEVICE Keys<T> extremes(const Octet<T>& octet) {
    Extremes<T> found;
    found.take(octet);
    return found.keys();
}

}  // namespace flashcomm::FLASHCOMM_ISA
