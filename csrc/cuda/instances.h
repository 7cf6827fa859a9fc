// Which kernels exist: the codecs by width and number type, and the pairs of legs a collective may have. Whether a
// collective has one is a pure function of the configuration, so all ranks agree on it.
#pragma once

#include <type_traits>

#include "api.h"
#include "cuda/rotated_tile.h"
#include "cuda/shape.h"
#include "cuda/spike_tile.h"
#include "cuda/uniform_tile.h"

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

// The widths of uniform blocks that recipes have (codec/recipes.py); others are coded block by block (codec_part.cu).
template <class Visit> bool with_bits(int bits, Visit visit) {
    if (bits == 4) return visit(Bits<4>{}), true;
    if (bits == 8) return visit(Bits<8>{}), true;
    return false;
}

constexpr int kExactBits = 16;  // both legs uncompressed: what benchmarks compare with

// Kernels are compiled in parts, each for one number type and either uniform blocks or the other formats, so that many
// cores share the work: setup.py lists the parts, FLASHCOMM_PART_TYPE and _UNIFORM say which one is compiled. The width
// is in the type where the time is in the planes, and a runtime value where it is in the arithmetic: three kernels for
// rotated blocks, not 39.

// visit(tile codec) for a format whose width is a runtime value; false: not one of them.
template <class T, class Visit> bool with_direct(int format, bool with_residuals, Visit visit) {
    if (format == kRotatedFormat && with_residuals) return visit(Is<RotatedTile<T, true>>{}), true;
    if (format == kRotatedFormat) return visit(Is<RotatedTile<T>>{}), true;
    if (format == kSpikeFormat && !with_residuals) return visit(Is<SpikeTile<T>>{}), true;
    return false;
}

// visit(tile codec) of a part; false: it has none.
template <class T, bool kUniform, class Visit> bool with_tile(const Setting& with, bool with_residuals, Visit visit) {
    if constexpr (!kUniform) return with_direct<T>(with.format, with_residuals, visit);
    else return with_bits(with.bits, [&](auto bits) { visit(Is<UniformTile<bits.value, T>>{}); });
}

// visit(tile codec of the reduce leg, of the gather leg); false: there is no such kernel.
template <class T, bool kUniform, class Visit>
bool with_legs_of(const Setting& reduce, const Setting& gather, bool with_residuals, Visit visit) {
    if (reduce.format != gather.format || (reduce.format == kUniformFormat) != kUniform) return false;
    if constexpr (!kUniform) {
        return with_direct<T>(reduce.format, with_residuals, [&](auto codec) { visit(codec, codec); });
    } else {
        if (with_residuals) return false;
        if (reduce.bits == 4 && gather.bits == 8)  // Flash Communication's "INT6"
            return visit(Is<UniformTile<4, T>>{}, Is<UniformTile<8, T>>{}), true;
        if constexpr (sizeof(typename T::Word) == 2)
            if (reduce.bits == kExactBits && gather.bits == kExactBits)
                return visit(Is<ExactTile<T>>{}, Is<ExactTile<T>>{}), true;
        return reduce.bits == gather.bits && with_bits(reduce.bits, [&](auto bits) {
                   visit(Is<UniformTile<bits.value, T>>{}, Is<UniformTile<bits.value, T>>{});
               });
    }
}

// The same for any part; visit is given the number type as well.
template <class Visit>
bool with_legs(const Setting& reduce, const Setting& gather, int dtype, bool with_residuals, Visit visit) {
    bool found = false;
    with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const auto pass_on = [&](auto first, auto second) { visit(first, second, type); };
        found = reduce.format == kUniformFormat ? with_legs_of<T, true>(reduce, gather, with_residuals, pass_on)
                                                : with_legs_of<T, false>(reduce, gather, with_residuals, pass_on);
    });
    return found;
}

// visit(number type, is uniform) as types, for the part that has these kernels.
template <class Visit> void with_part(int format, int dtype, Visit visit) {
    with_dtype(dtype, [&](auto type) {
        if (format == kUniformFormat) visit(type, std::true_type{});
        else visit(type, std::false_type{});
    });
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
