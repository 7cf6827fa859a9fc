// Which kernels exist: the codecs by width and number type, and the pairs of legs a collective may have. Whether a
// collective has one is a pure function of the configuration, so all ranks agree on it.
#pragma once

#include "api.h"
#include "cuda/rotated_tile.h"
#include "cuda/shape.h"
#include "cuda/spike_tile.h"
#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

template <class T> struct Is {
    using type = T;
};
template <int kValue> struct Bits {
    static constexpr int value = kValue;
};

template <class Visit> bool with_dtype(int dtype, Visit visit) {
    if (dtype == kFloat32) return visit(Is<Float32>{}), true;
    if (dtype == kFloat16) return visit(Is<Float16>{}), true;
    if (dtype == kBFloat16) return visit(Is<BFloat16>{}), true;
    return false;
}

template <class Visit> bool with_bits(int bits, Visit visit) {
    if (bits == 2) return visit(Bits<2>{}), true;
    if (bits == 3) return visit(Bits<3>{}), true;
    if (bits == 4) return visit(Bits<4>{}), true;
    if (bits == 5) return visit(Bits<5>{}), true;
    if (bits == 6) return visit(Bits<6>{}), true;
    if (bits == 7) return visit(Bits<7>{}), true;
    if (bits == 8) return visit(Bits<8>{}), true;
    return false;
}

// visit(codec, number type) for formats whose width is a runtime value; false: not one of them.
template <class Visit> bool with_direct(int format, int dtype, bool with_residuals, Visit visit) {
    bool found = false;
    with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (format == kRotatedFormat && with_residuals) visit(Is<RotatedTile<T, true>>{}, type), found = true;
        if (format == kRotatedFormat && !with_residuals) visit(Is<RotatedTile<T>>{}, type), found = true;
        if (format == kSpikeFormat && !with_residuals) visit(Is<SpikeTile<T>>{}, type), found = true;
    });
    return found;
}

constexpr int kExactBits = 16;  // both legs uncompressed: what benchmarks compare with

// Whether collectives are compiled for a codec: always, but to try a compiler on a third of them.
template <int kBits, class T> constexpr bool compiled(Is<UniformTile<kBits, T>>) {
#ifdef FLASHCOMM_FEW_COLLECTIVES
    return kBits % 3 == (int)(sizeof(typename T::Word) / 4 + (T::kNan == 0x7FC0 ? 0 : 1));
#else
    return true;
#endif
}

template <int kBits, class T, class Visit>
bool visit_equal_legs(Is<UniformTile<kBits, T>> codec, Is<T> type, Visit visit) {
    if constexpr (compiled(Is<UniformTile<kBits, T>>{})) return visit(codec, codec, type), true;
    return false;
}

// visit(codec of the reduce leg, codec of the gather leg, number type); false: there is no such kernel. The width is in
// the type where the time is in the planes, and a runtime value where it is in the arithmetic: three kernels, not 39.
template <class Visit>
bool with_legs(const Setting& reduce, const Setting& gather, int dtype, bool with_residuals, Visit visit) {
    bool found = false;
    if (reduce.format != gather.format || (with_residuals && reduce.format != kRotatedFormat)) return false;
    with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (reduce.format == kRotatedFormat && with_residuals)
            visit(Is<RotatedTile<T, true>>{}, Is<RotatedTile<T, true>>{}, type), found = true;
        if (reduce.format == kRotatedFormat && !with_residuals)
            visit(Is<RotatedTile<T>>{}, Is<RotatedTile<T>>{}, type), found = true;
        if (reduce.format == kSpikeFormat)
            visit(Is<SpikeTile<T>>{}, Is<SpikeTile<T>>{}, type), found = true;
        if (reduce.format != kUniformFormat) return;
        if (reduce.bits == gather.bits)
            with_bits(reduce.bits, [&](auto bits) {
                found = visit_equal_legs(Is<UniformTile<bits.value, T>>{}, type, visit);
            });
        if (reduce.bits == 4 && gather.bits == 8)  // Flash Communication's "INT6"
            visit(Is<UniformTile<4, T>>{}, Is<UniformTile<8, T>>{}, type), found = true;
        if constexpr (sizeof(typename T::Word) == 2)
            if (reduce.bits == kExactBits && gather.bits == kExactBits)
                visit(Is<ExactTile<T>>{}, Is<ExactTile<T>>{}, type), found = true;
    });
    return found;
}

// Whether the kernel serves these legs: their units fit into one tile.
inline bool serves(const Setting& reduce, const Setting& gather, int dtype, bool with_residuals) {
    bool fits = false;
    with_legs(reduce, gather, dtype, with_residuals, [&](auto first, auto second, auto type) {
        using T = typename decltype(type)::type;
        const int64_t units[] = {typename decltype(first)::type(reduce).unit(),
                                 typename decltype(second)::type(gather).unit()};
        fits = common_multiple(units[0], units[1]) <= kTileValues<T>;
    });
    return fits;
}

}  // namespace flashcomm::FLASHCOMM_ISA
