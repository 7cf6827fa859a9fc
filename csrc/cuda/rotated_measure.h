// What a rotated tile finds out about its blocks (rotated_blocks.h): constants, NaN, Inf and huge values, the largest
// coefficient, and which of the steps tried loses least. All lanes of a warp call these together.
#pragma once

namespace flashcomm::FLASHCOMM_ISA {

template <class T, bool kResiduals, int kParts, bool kShared>
FC_DEVICE void RotatedBlocks<T, kResiduals, kParts, kShared>::rotate_strange(const Octet<T> (&x)[kRows<T>],
                                                                             const Word* residual, int begin,
                                                                             int values, int octets, float last,
                                                                             Values& c, Meta (&meta)[kParts]) const {
    fill(x, begin, values, octets, last, c);
    uint32_t magnitude[kParts];
    bool is_any_huge = false, is_huge[kParts], is_nan[kParts];
    FC_UNROLL for (int part = 0; part < kParts; part++) magnitude[part] =
        is_finite(x, part, begin, values) ? largest(c, part) >> 1 : ~0u;
    share_largest(magnitude);
    FC_UNROLL for (int part = 0; part < kParts; part++) {
        is_nan[part] = magnitude[part] >= Float32::kInfinity, is_huge[part] = magnitude[part] >= bits_of(kHugeStep);
        is_any_huge |= is_huge[part];
        FC_UNROLL for (int i = 0; i < kPart; i++) {
            float& value = c[kOctets * part + i / 8][i % 8];
            value = is_nan[part] ? 0.0f : value * (is_huge[part] ? kShrink : 1.0f);
        }
    }
    butterflies<false>(c);
    if (kResiduals) {
        Values with;
        FC_UNROLL for (int i = 0; i < 8 * kRows<T>; i++) with[i / 8][i % 8] = c[i / 8][i % 8];
        add_residual(residual, begin, octets, with);
        FC_UNROLL for (int part = 0; part < kParts; part++) {
            const uint32_t keep = mask(is_huge[part]);
            FC_UNROLL for (int i = 0; i < kPart; i++) {
                float& value = c[kOctets * part + i / 8][i % 8];
                value = choose(keep, value, with[kOctets * part + i / 8][i % 8]);
            }
        }
    }
    measure(c, begin, meta);
    FC_UNROLL for (int part = 0; part < kParts; part++) {
        if (is_huge[part]) meta[part].value = bits_of(float_of(meta[part].value) * kGrow);
        if (is_nan[part] || meta[part].largest >> 1 >= Float32::kInfinity) meta[part] = {0, 0, kNanBlock};
        else if (is_huge[part]) meta[part].kind |= kShrunk;
    }
}

// What is known of blocks by their coefficients. A constant's are zero but for the first.
template <class T, bool kResiduals, int kParts, bool kShared>
FC_DEVICE void RotatedBlocks<T, kResiduals, kParts, kShared>::measure(const Values& c, int begin,
                                                                      Meta (&meta)[kParts]) const {
    uint32_t most[kParts];
    float value[kParts];
    bool varies[kParts];
    FC_UNROLL for (int part = 0; part < kParts; part++) value[part] = c[kOctets * part][0] * (1.0f / (float)block());
    if (kRows<T> == 2 && kShared)  // the second thread has a part of a constant's bits
        value[0] = float_of(exchange(bits_of(value[0]), begin / kRows<T> & 1));
    FC_UNROLL for (int part = 0; part < kParts; part++) {
        most[part] = largest(c, part);
        uint32_t bits = is_first(begin + kOctets * part) ? 0 : bits_of(c[kOctets * part][0]);
        FC_UNROLL for (int i = 1; i < kPart; i++) bits |= bits_of(c[kOctets * part + i / 8][i % 8]);
        varies[part] = bits << 1;
    }
    if (kShared) varies[0] = votes(varies[0]) & lanes_of_block(thread());
    share_largest(most);
    FC_UNROLL for (int part = 0; part < kParts; part++)
        meta[part] = {most[part], bits_of(value[part]), kConstant * (uint32_t)!varies[part]};
}

// Notes for every block which of the steps tried loses least.
template <class T, bool kResiduals, int kParts, bool kShared>
FC_DEVICE void RotatedBlocks<T, kResiduals, kParts, kShared>::search(const Values& c, Meta (&meta)[kParts]) const {
    FC_UNROLL for (int part = 0; part < kParts; part++) {
        const uint32_t first = first_key(meta[part]);
        const float unit = shrink_of(meta[part]) * (meta[part].largest & 1 ? (float)block() : -(float)block());
        const uint32_t best = best_key(first, levels, [&](uint32_t key) {
            const float eighths = eighths_of(key, unit);
            uint32_t errors = errors_of(c, part, eighths);
            each_stride([&](int stride) { errors += exchange(errors, stride); });
            return errors;
        });
        meta[part].kind += kFiner * (first - best);
    }
}

template <class T, bool kResiduals, int kParts, bool kShared>
FC_DEVICE uint32_t RotatedBlocks<T, kResiduals, kParts, kShared>::errors_of(const Values& c, int part,
                                                                            float eighths) const {
    uint32_t errors = 0;
    FC_UNROLL for (int i = 0; i < kPart; i++) errors +=
        squared_error(c[kOctets * part + i / 8][i % 8], eighths, zero, levels);
    return errors;
}

}  // namespace flashcomm::FLASHCOMM_ISA
