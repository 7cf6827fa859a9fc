// What a rotated tile finds out about its blocks (rotated_tile.h): constants, NaN, Inf and huge values, the largest
// coefficient, and which of the steps tried loses least. All lanes of a warp call these together.
#pragma once

namespace flashcomm::FLASHCOMM_ISA {

template <class T, bool kResiduals>
FC_DEVICE void RotatedTile<T, kResiduals>::rotate_strange(const Octet<T> (&x)[kRows<T>], const Word* residual,
                                                          int begin, int values, int octets, float last, Values& c,
                                                          Meta (&meta)[kHalves]) const {
    fill(x, begin, values, octets, last, c);
    uint32_t magnitude[kHalves];
    bool is_any_huge = false, is_huge[kHalves], is_nan[kHalves];
    FC_UNROLL for (int half = 0; half < kHalves; half++) magnitude[half] =
        is_finite(x, half, begin, values) ? largest(c, half) >> 1 : ~0u;
    share_largest(magnitude);
    FC_UNROLL for (int half = 0; half < kHalves; half++) {
        is_nan[half] = magnitude[half] >= Float32::kInfinity, is_huge[half] = magnitude[half] >= bits_of(kHugeStep);
        is_any_huge |= is_huge[half];
        FC_UNROLL for (int i = 0; i < 16; i++) {
            float& value = c[2 * half + i / 8][i % 8];
            value = is_nan[half] ? 0.0f : value * (is_huge[half] ? kShrink : 1.0f);
        }
    }
    butterflies(c);
    if (kResiduals) {
        Values with;
        FC_UNROLL for (int i = 0; i < 8 * kRows<T>; i++) with[i / 8][i % 8] = c[i / 8][i % 8];
        add_residual(residual, begin, octets, with);
        FC_UNROLL for (int half = 0; half < kHalves; half++) {
            const uint32_t keep = mask(is_huge[half]);
            FC_UNROLL for (int i = 0; i < 16; i++) {
                float& value = c[2 * half + i / 8][i % 8];
                value = choose(keep, value, with[2 * half + i / 8][i % 8]);
            }
        }
    }
    measure(c, begin, meta);
    FC_UNROLL for (int half = 0; half < kHalves; half++) {
        if (is_huge[half]) meta[half].value = bits_of(float_of(meta[half].value) * kGrow);
        if (is_nan[half] || meta[half].largest >> 1 >= Float32::kInfinity) meta[half] = {0, 0, kNanBlock};
        else if (is_huge[half]) meta[half].kind |= kShrunk;
    }
}

// What is known of blocks by their coefficients. A constant's are zero but for the first.
template <class T, bool kResiduals>
FC_DEVICE void RotatedTile<T, kResiduals>::measure(const Values& c, int begin, Meta (&meta)[kHalves]) const {
    uint32_t most[kHalves];
    float value[kHalves];
    bool varies[kHalves];
    FC_UNROLL for (int half = 0; half < kHalves; half++) value[half] =
        (octet_shift > 1 ? c[0][0] : c[2 * half][0]) * (1.0f / (float)block());
    if (kRows<T> == 2 && octet_shift > 1)  // the second thread has a part of a constant's bits
        value[0] = float_of(exchange(bits_of(value[0]), begin / kRows<T> & 1));
    FC_UNROLL for (int half = 0; half < kHalves; half++) {
        most[half] = largest(c, half);
        uint32_t bits = is_first(begin + 2 * half) ? 0 : bits_of(c[2 * half][0]);
        FC_UNROLL for (int i = 1; i < 16; i++) bits |= bits_of(c[2 * half + i / 8][i % 8]);
        varies[half] = bits << 1;
    }
    if (octet_shift > 1) {
        bool any = varies[0];
        FC_UNROLL for (int half = 1; half < kHalves; half++) any |= varies[half];
        if (octet_shift > kThreadShift) any = votes(any) & lanes_of_block(thread());
        FC_UNROLL for (int half = 0; half < kHalves; half++) varies[half] = any;
    }
    share_largest(most);
    FC_UNROLL for (int half = 0; half < kHalves; half++)
        meta[half] = {most[half], bits_of(value[half]), kConstant * (uint32_t)!varies[half]};
}

// Notes for every block which of the steps tried loses least.
template <class T, bool kResiduals>
FC_DEVICE void RotatedTile<T, kResiduals>::search(const Values& c, Meta (&meta)[kHalves]) const {
    FC_UNROLL for (int half = 0; half < kHalves; half++) {
        if (half && octet_shift > 1) {
            meta[half].kind = meta[0].kind;
            continue;
        }
        const uint32_t first = first_key(meta[half]);
        const float unit = shrink_of(meta[half]) * (meta[half].largest & 1 ? (float)block() : -(float)block());
        const uint32_t best = best_key(first, levels, [&](uint32_t key) {
            const float eighths = eighths_of(key, unit);
            uint32_t errors = errors_of(c, half, eighths);
            if (octet_shift > 1) {
                FC_UNROLL for (int other = 1; other < kHalves; other++) errors += errors_of(c, other, eighths);
            }
            each_distance([&](int apart) { errors += exchange(errors, apart); });
            return errors;
        });
        meta[half].kind += kFiner * (first - best);
    }
}

template <class T, bool kResiduals>
FC_DEVICE uint32_t RotatedTile<T, kResiduals>::errors_of(const Values& c, int half, float eighths) const {
    uint32_t errors = 0;
    FC_UNROLL for (int i = 0; i < 16; i++) errors += squared_error(c[2 * half + i / 8][i % 8], eighths, zero, levels);
    return errors;
}

}  // namespace flashcomm::FLASHCOMM_ISA
