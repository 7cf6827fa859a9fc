// Plain super-blocks of rotated blocks on the CPU: whole blocks of 32 or 64 values, none constant, strange or huge.
//
//     encode   load -> butterflies, + residual -> coefficients, largest; by the super-block's top, round -> bytes ->
//              planes; the rounding errors -> residual
//     decode   rotated_plain_decode.h
//
// Nearly all super-blocks are plain, and everything but the planes happens in registers, a block in every track
// (tracks.h). What is not plain is noticed by its coefficients: every coefficient is a sum of all values, so NaN and
// Inf reach them all, and the largest is at least the largest value. rotated_cpu.cpp then does the super-block once
// more, block by block.
#pragma once

#include "cpu/super_block.h"
#include "cpu/tracks.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

constexpr uint32_t kHugeMagnitude = (127 + 99) << 24;  // magnitude_key from which on a block is not plain
constexpr int kUnits = kSuperBlock / kTracks;          // a unit: the blocks that are worked on at once, one in a track

// A super-block's units. The last one may lack blocks (a row's last super-block need not fill it): it works on copies
// at the edge.
struct Units {
    int count, whole, rest;  // `rest` blocks, in the last unit, if the others are whole
    explicit Units(int blocks)
        : count((blocks + kTracks - 1) / kTracks), whole(blocks / kTracks), rest(blocks % kTracks) {}
};

// All ones in the first `tracks` tracks.
FC_INLINE Words first_tracks(int tracks) {
    Words x;
    for (int i = 0; i < kLanes; i++) x[i] = i / 4 < tracks ? ~0u : 0;
    return x;
}

// Room for one super-block while it is coded.
template <int kBlock> struct Plain : Steps {
    Vector numbers[kUnits][kBlock / 4];  // coefficients
    Words largest[kUnits];
    float steps[kSuperBlock],
        eighths[kTried][kSuperBlock];  // of such numbers; what makes eighths of the steps tried of them
    Bytes<kBlock> bytes;
};

// ---- encode ----------------------------------------------------------------------------------------------------

// The largest magnitude_key of vectors kFirst .. kEnd - 1, lane by lane.
template <int kFirst, int kEnd> FC_INLINE Words largest_of(const Vector* v) {
    if constexpr (kEnd - kFirst == 1) return magnitude_key(v[kFirst]);
    else {
        constexpr int kHalf = (kFirst + kEnd) / 2;
        return larger(largest_of<kFirst, kHalf>(v), largest_of<kHalf, kEnd>(v));
    }
}

// Coefficients and largest keys of a unit of `tracks` blocks; false if all but the first four coefficients of a block are
// zero, as a constant's are.
template <class T, int kBlock, bool kCarries>
FC_INLINE bool rotate_unit(const typename T::Word* x, const typename T::Word* residual, Vector (&numbers)[kBlock / 4],
                           Words& keys, int tracks = kTracks) {
    Vector v[kBlock / 4];
    load_values<T>(x, v);
    rotate(v);
    if constexpr (kCarries) {
#pragma GCC unroll 32
        for (int i = 0; i < kBlock / 4; i += 2) {
            const auto more = load_numbers<T>(residual + i * 4 * kGroup);
            v[i] = v[i] + more.first, v[i + 1] = v[i + 1] + more.second;
        }
    }
    const Words rest = largest_of<1, kBlock / 4>(v);
    keys = larger(rest, magnitude_key(v[0]));
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 4; i++) numbers[i] = v[i];
    const uint32_t lanes = nonzero(rest >> 1), pairs = lanes | lanes >> 1;
    const uint32_t needed = 0x1111u >> (16 - 4 * tracks);
    return ((pairs | pairs >> 2) & needed) == needed;
}

// Where a residual has the first numbers of a unit.
template <int kBlock> FC_INLINE int residual_of(int unit) { return (int)residual_index(unit * kTracks, 0, kBlock); }

template <class T, int kBlock, bool kCarries>
bool rotate_edge(const typename T::Word* x, const typename T::Word* residual, Units units, Plain<kBlock>& f) {
    typename T::Word edge[kTracks * kBlock] = {};
    __builtin_memcpy(edge, x, units.rest * kBlock * sizeof(*x));
    auto& numbers = f.numbers[units.whole];
    Words& largest = f.largest[units.whole];
    const bool varies = rotate_unit<T, kBlock, kCarries>(edge, residual, numbers, largest, units.rest);
    const Words there = first_tracks(units.rest);
    for (Vector& each : numbers) each = (Vector)((Words)each & there);
    largest &= there;
    return varies;
}

template <class T, int kBlock, bool kCarries>
bool rotate_super_block(const typename T::Word* x, const typename T::Word* residual, Units units, Plain<kBlock>& f) {
    bool varies = true;
    const auto from = [&](int u) { return kCarries ? residual + residual_of<kBlock>(u) : residual; };
    for (int u = 0; u < units.whole; u++)
        varies &= rotate_unit<T, kBlock, kCarries>(x + u * kTracks * kBlock, from(u), f.numbers[u], f.largest[u]);
    if (units.rest)
        varies &= rotate_edge<T, kBlock, kCarries>(x + units.whole * kTracks * kBlock, from(units.whole), units, f);
    for (int u = units.count; u < kUnits; u++) f.largest[u] = Words{};
    return varies;
}

// The four lanes of every block made one, of four units, in the blocks' order.
template <class Join> FC_INLINE Words by_block(const Words* units, Join join) {
    const auto both = [join](Words x, Words y) {
        const auto pairs = unzipped(Both<Words>{x, y});
        return join(pairs.first, pairs.second);
    };
    const Words all = both(both(units[0], units[1]), both(units[2], units[3]));
    return shuffled(all, all, [](int i) { return i % kTracks * 4 + i / kTracks; });
}

constexpr int kVectors = kSuperBlock / kLanes;  // of a number for each block

// Sums of squared_error over every block of a unit, in four lanes each, for every step tried.
template <int kBlock>
FC_INLINE void add_errors(const Plain<kBlock>& f, int unit, const Coding& at, Words (&errors)[kTried][kUnits]) {
    const Shorts least = Shorts{} - (int16_t)at.zero, most = least + (int16_t)at.last;
    Lanes sums[kTried] = {};
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 4; i += 2)
#pragma GCC unroll 4
        for (int n = 0; n < kTried; n++) {
            const Vector eighths = spread(f.eighths[n] + unit * kTracks), *c = f.numbers[unit] + i;
            const Shorts fine = joined(Both<Lanes>{nearest(c[0] * eighths), nearest(c[1] * eighths)});
            const Shorts off = fine - (smaller(larger((Shorts)((fine + 4) >> 3), least), most) << 3);
            sums[n] += sum_products(off, off);
        }
    for (int n = 0; n < kTried; n++) errors[n][unit] = (Words)sums[n];
}

// best_key for every block: `keys` of the largest coefficients become those of the steps taken.
template <int kBlock>
void search(Plain<kBlock>& f, const Coding& at, int units, const Words (&signs)[kVectors], Words (&keys)[kVectors]) {
    const auto tried = [&at, &keys](int i, int n) {
        return larger(keys[i] - key_stride(at.levels) * n, Words{} + kLeastKey);
    };
    for (int n = 0; n < kTried; n++)
        for (int i = 0; i < kVectors; i++) {
            const Vector step = (Vector)(tried(i, n) << kKeyShift | signs[i]);
            store(1.0f / (step * (float)kBlock) * 8, f.eighths[n] + i * kLanes);
        }
    Words errors[kTried][kUnits] = {};
    for (int u = 0; u < units; u++) add_errors(f, u, at, errors);
    for (int i = 0; i < kVectors; i++) {
        Words least = ~Words{}, best = {};
        const Words finest = tried(i, kTried - 1) >> 3;
        for (int n = 0; n < kTried; n++) {
            const Words key = tried(i, n), eighths = (8 + (key & 7)) << ((key >> 3) - finest);  // as weighed() has it
            const Words error = by_block(errors[n] + 4 * i, [](Words x, Words y) { return x + y; }) * eighths * eighths;
            best = error < least ? key : best;
            least = smaller(error, least);
        }
        keys[i] = best;
    }
}

// What fit() does, for blocks that are neither constant nor shrunk: the super-block's top, and of every block the scale
// byte, the step and its reciprocal. False if a coefficient is huge, or no number.
template <int kBlock> bool fit(Plain<kBlock>& f, const Coding& at, int units) {
    const float unit = 1.0f / (float)(kBlock * at.zero);
    Words keys[kVectors], signs[kVectors], huge = {}, top = Words{} + kLeastKey;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
        const Words largest = by_block(f.largest + 4 * i, larger<Words>);
        huge |= (Words)(largest >= kHugeMagnitude);
        keys[i] = larger(((Words)((Vector)(largest >> 1) * unit) + rounding_of(at)) >> kKeyShift, Words{} + kLeastKey);
        signs[i] = (~largest & 1) << 31;  // the step is negative where the largest coefficient is positive
    }
    if (nonzero(huge)) return false;
    if (at.levels <= kSearched) search(f, at, units, signs, keys);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) top = larger(top, keys[i]);
    top = largest_of(top);
    f.top = top[0];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
        const Words distance = smaller(top - keys[i], Words{} + kLast);
        const Vector step = (Vector)((top - distance) << kKeyShift | signs[i]) * (float)kBlock;
        store(distance | signs[i] >> 24, f.scales + i * kLanes);
        store(step, f.steps + i * kLanes);
        store(1.0f / step, f.inverses + i * kLanes);
    }
    return true;
}

// Codes of a unit less `zero`, which are limited to those there are if kLimits, to bytes: a word each, and what is beyond
// a byte.
template <int kBlock, bool kLimits>
FC_INLINE void store_codes(const Shorts (&codes)[kBlock / 8], const Coding& at, uint8_t* low, uint8_t* high) {
    const SignedOctets least = SignedOctets{} + (int8_t)-at.zero, most = SignedOctets{} + (int8_t)(at.last - at.zero);
    SignedOctets code[kBlock / 16];
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 16; i++) {
        code[i] = joined(Both<Shorts>{codes[2 * i], codes[2 * i + 1]});
        if constexpr (kLimits) code[i] = smaller(larger(code[i], least), most);
    }
    if (at.together == 1) {
        Words bytes[kBlock / 16];
#pragma GCC unroll 32
        for (int i = 0; i < kBlock / 16; i++) bytes[i] = (Words)((Octets)code[i] - (Octets)least);
        store_pieces(bytes, low);
        return;
    }
    const HalfWords zeros = HalfWords{} + (uint16_t)(at.zero + at.zero * at.radix);
    Words lows[kBlock / 32], highs[kBlock / 32];
#pragma GCC unroll 32
    for (int i = 0; i < kBlock / 32; i++) {
        const HalfWords first = (HalfWords)digits(code[2 * i], at.radix) + zeros;
        const HalfWords second = (HalfWords)digits(code[2 * i + 1], at.radix) + zeros;
        lows[i] = (Words)joined(Both<HalfWords>{first & 0xFF, second & 0xFF});
        highs[i] = (Words)joined(Both<HalfWords>{first >> 8, second >> 8});
    }
    store_pieces(lows, low);
    store_pieces(highs, high);
}

// Codes of the super-block's blocks, as bytes; with a residual, also what they lose.
template <class T, int kBlock, bool kCarries>
void quantize(typename T::Word* residual, int units, Coding at, uint8_t* low, Plain<kBlock>& f) {
    const auto code_of = [&at](Vector x) {
        return smaller(larger(nearest(x), Lanes{} - at.zero), Lanes{} + (at.last - at.zero));
    };
    for (int u = 0; u < units; u++) {
        const Vector inverse = spread(f.inverses + u * kTracks), step = spread(f.steps + u * kTracks);
        Shorts codes[kBlock / 8];
#pragma GCC unroll 32
        for (int i = 0; i < kBlock / 8; i++) {
            const Vector* numbers = f.numbers[u] + 2 * i;
            if constexpr (kCarries) {
                const Lanes first = code_of(numbers[0] * inverse);
                const Lanes second = code_of(numbers[1] * inverse);
                codes[i] = joined(Both<Lanes>{first, second});
                store_numbers<T>(scaled(__builtin_convertvector(first, Vector), -step, numbers[0]),
                                 scaled(__builtin_convertvector(second, Vector), -step, numbers[1]),
                                 residual + residual_of<kBlock>(u) + i * 8 * kGroup);
            } else {
                codes[i] = joined(Both<Lanes>{nearest(numbers[0] * inverse), nearest(numbers[1] * inverse)});
            }
        }
        const int bytes = u * kTracks * kBlock >> (at.together - 1);
        store_codes<kBlock, !kCarries>(codes, at, low + bytes, f.bytes.high + bytes);
    }
}

// Encodes a super-block and replaces its residual; false, and nothing done, if it is not plain.
template <class T, int kBlock, bool kCarries>
bool encode_plain(const typename T::Word* x, typename T::Word* residual, const Coding& at, int64_t super_block,
                  const Span& s, uint8_t* payload, Plain<kBlock>& f) {
    const Units units(s.blocks);
    if (s.values < s.blocks * kBlock) return false;
    if (kCarries) residual += s.residual;
    if (!rotate_super_block<T, kBlock, kCarries>(x + s.value, residual, units, f) || !fit(f, at, units.count))
        return false;
    const int64_t octet = octet_of(at, s);
    const int words = words_of(at, s);
    uint8_t* low = units.rest ? f.bytes.low : low_bytes(payload, at, s, f.bytes.low);
    quantize<T, kBlock, kCarries>(residual, units.count, at, low, f);
    if (units.rest && at.plane[0].width == 8) __builtin_memcpy(payload + at.plane[0].start + 8 * octet, low, words);
    pack(low, f.bytes.high, at, octet, words, payload);
    store_steps(f, at, super_block, s, payload);
    return true;
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
