// Rotated blocks (rotated.h) by one thread block: a thread holds 32 neighbouring values (of float32: 16) in registers.
//
// So most of a butterfly, the largest coefficient and the codes of a block are a thread's own affair; blocks of 64 to
// 256 values take one to three exchanges between neighbouring lanes. With blocks of 32 a warp is a super-block: no
// barrier, no shared memory. Only the tops of larger super-blocks meet there. Additions come in the definition's order.
//
//     encode   rotate, + residual, largest coefficient -> each block its key -> each super-block the top, steps
//              -> codes; the rounding error -> residual
//     decode   codes -> coefficients, which are added up -> finish: rotate back
//
// Nearly all blocks are plain or constant. NaN, Inf and huge values are noticed by their coefficients, as in
// rotated_plain.h, and are then looked at closer by their whole warp. Width and block are runtime values: the planes
// are a few uniform branches beside the butterflies, and one kernel serves all legs.
#pragma once

#include "cuda/rotated_codes.h"

namespace flashcomm::FLASHCOMM_ISA {

// The work on blocks of which a thread has kParts whole ones, or, kShared, several threads have one.
template <class T, bool kResiduals, int kParts, bool kShared> struct RotatedBlocks : RotatedCodes {
    using Word = typename T::Word;
    using Values = float[kRows<T>][8];                                       // of a thread
    static constexpr int kMaxBytes = kTileValues<T> * (256 + 16 + 1) / 256;  // 8 bits, blocks of 16
    static constexpr int kOctets = kRows<T> / kParts, kPart = 8 * kOctets;   // of a part
    static constexpr int kThreadShift = kRows<T> == 4 ? 2 : 1;               // 1 << kThreadShift octets are a thread's
    static constexpr uint32_t kShrunk = 256, kFiner = 512;

    struct Meta {          // of a block
        uint32_t largest;  // its largest coefficient's bits << 1 | sign, see rotated_plain.h
        uint32_t value;    // of a constant, in the thread that has the block's first value
        uint32_t kind;     // 0, kNanBlock or kConstant; plus kShrunk; plus kFiner * eighths of an octave (search())
    };
    struct alignas(4 * sizeof(Word)) Quad {  // of a residual
        uint32_t w[sizeof(Word)];
    };

    FC_INLINE explicit RotatedBlocks(const RotatedCodes& codes) : RotatedCodes(codes) {}

    // Encodes a tile into the payload that `place` is of; kOwn: there is nothing else in it. `residual`, if kResiduals:
    // is added to the coefficients, then replaced by the rounding error.
    template <bool kOwn, class Offset>
    FC_DEVICE void encode_to(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                             const Place<Offset>& place, Word* residual) const {
        const int octets = this->octets(values), begin = first_octet<T>();
        uint32_t* words = (uint32_t*)scratch;
        Values c;
        Meta meta[kParts];
        const float last = float_of(fetch_last(x, begin, values, words + kThreads / kWarp));
        rotate(x, residual, begin, values, octets, last, c, meta);
        if (levels <= kSearched) search(c, meta);
        if (kOwn) {
            sync();
            if (thread() == kThreads - 1) zero_gaps(place, (Offset)values, payload);
        }
        uint32_t key[kParts], top = kLeastKey;
        FC_UNROLL for (int part = 0; part < kParts; part++) {
            key[part] = first_key(meta[part]) - meta[part].kind / kFiner;
            const bool counts = begin + kOctets * part < octets && !(meta[part].kind & 0x7F);
            top = counts && key[part] > top ? key[part] : top;
        }
        top = largest_of_super_block(top, words);
        uint32_t code[8 * kRows<T>];
        FC_UNROLL for (int part = 0; part < kParts; part++)
            quantize(c, part, begin, octets, meta[part], key[part], top, payload, place, residual, &code[kPart * part]);
        if (begin < octets)
            store_codes<kRows<T>, Offset>(code, place.octet + begin, begin + kRows<T> - 1 < octets, payload,
                                          place.groups);
        if (kOwn || kShared || (values & (block() - 1))) sync();
    }

    // Coefficients of the octets from `octet` on, counted from where `place` is of in a payload, to be shrunk where
    // `shrunk` has a bit for an octet; not kAlone: added to x. Returns such bits of blocks whose butterflies could
    // overflow.
    template <bool kAlone, class Offset>
    FC_DEVICE uint32_t decode_from(const uint8_t* payload, const Place<Offset>& place, int octet, uint32_t shrunk,
                                   Values& x) const {
        Eight words[kRows<T>];
        load_codes<kRows<T>, Offset>(payload, place.octet + octet, place.groups, words);
        int bias = kBias + zero;
        if (kAlone && adds_codes()) bias = kBias + add_neighbours(words);
        uint32_t huge = 0, constants = 0;
        FC_UNROLL for (int part = 0; part < kParts; part++) {
            const Step step = step_at(payload, place, (octet + kOctets * part) >> octet_shift);
            const bool is_huge = (bits_of(step.each) & 0x7FFFFFFF) >= bits_of(kHugeStep) && step.each == step.each;
            huge |= is_huge ? of_part(part) : 0;
            constants |= (uint32_t)step.is_constant << part;
            const float factor = (shrunk & of_part(part)) || (kAlone && is_huge) ? kShrink : 1.0f;
            const float each = step.each * factor, less = each * (float)-bias;
            FC_UNROLL for (int pair = 0; pair < kOctets / 2; pair++) {
                const int row = kOctets * part + 2 * pair;
                uint32_t number[16];
                numbers_of(words[row], words[row + 1], number);
                FC_UNROLL for (int i = 0; i < 16; i++) {
                    float coefficient = fused_multiply_add(float_of(number[i]), each, less);  // exact, never -0
                    if (pair == 0 && i == 0 && step.is_constant) coefficient = -0.0f;
                    float& to = x[row + i / 8][i % 8];
                    to = kAlone ? coefficient : to + coefficient;
                }
            }
        }
        return constants ? huge | add_constants<kAlone>(payload, place, octet, shrunk, constants, x) : huge;
    }

    template <class Offset>
    FC_DEVICE float bound(const uint8_t* payload, const Place<Offset>& place, int octet) const {
        const Step step = step_at(payload, place, octet >> octet_shift);
        const float off = RotatedLayout::steps_off(levels) * (float)block();
        return step.is_constant ? 0 : float_of(bits_of(step.each) & 0x7FFFFFFF) * off;
    }

    // A sum of such coefficients, or one alone, becomes values: all lanes of a warp.
    template <bool kAlone> FC_DEVICE void finish(Values& x, uint32_t shrunk) const {
        butterflies<kAlone>(x);
        if (!shrunk && (!kAlone || T::kMax > 1e30f)) return;
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const float grow = shrunk >> row & 1 ? kGrow : 1.0f;
            FC_UNROLL for (int i = 0; i < 8; i++) {
                float& value = x[row][i];
                value *= grow;
                if (kAlone) value = value < -T::kMax ? -T::kMax : value > T::kMax ? T::kMax : value;
            }
        }
    }

private:
    // A bit for each octet.
    static FC_DEVICE uint32_t of_part(int part) { return ((1u << kOctets) - 1) << kOctets * part; }

    // ---- lanes -----------------------------------------------------------------------------------------------------

    template <class Offset> FC_DEVICE bool is_first(Offset octet) const {
        return (octet & ((1 << octet_shift) - 1)) == 0;
    }
    // visit(1), visit(2), ...: strides between the lanes of a block; or from `first` on, which is not known before.
    template <class Visit> FC_DEVICE void each_stride(Visit visit) const {
        if constexpr (kShared) {
            visit(1);
            each_stride(visit, 2);
        }
    }
    template <class Visit> FC_DEVICE void each_stride(Visit visit, int first) const {
        for (int stride = first; stride < 1 << octet_shift >> kThreadShift; stride *= 2) visit(stride);
    }
    FC_DEVICE uint32_t lanes_of_block(int lane) const {  // as votes() counts them
        const int shift = octet_shift - kThreadShift, first = lane & (kWarp - 1) & ~((1 << shift) - 1);
        return (uint32_t)(((uint64_t)1 << (1 << shift)) - 1) << first;
    }
    // ---- rotation ------------------------------------------------------------------------------------------------

    // The sums of one payload's coefficients are exact, in whatever order: neighbouring lanes add codes of whole bytes,
    // four at a time, before they become numbers. Returns what has been added to a sum.
    FC_DEVICE bool adds_codes() const { return kShared && !pair_shift && word_bits < 8; }
    FC_DEVICE int add_neighbours(Eight (&words)[kRows<T>]) const {
        const bool subtracts = thread() & 1;
        const uint32_t flip = mask(subtracts) & 0x01010101u * (uint32_t)(levels - 1);  // levels - 1 - code
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            words[row].even = exchange(words[row].even, 1) + (words[row].even ^ flip);
            words[row].odd = exchange(words[row].odd, 1) + (words[row].odd ^ flip);
        }
        return subtracts ? levels - 1 : 2 * zero;
    }

    // kDecoded: of one payload, as decode_from<true>() leaves it.
    template <bool kDecoded> FC_DEVICE void butterflies(Values& x) const {
        FC_UNROLL for (int stride = 1; stride < 8; stride *= 2) FC_UNROLL for (int row = 0; row < kRows<T>; row++)
            FC_UNROLL for (int i = 0; i < 8; i++) if (!(i & stride)) butterfly(x[row][i], x[row][i + stride]);
        pair_rows<1>(x);
        if constexpr (kOctets == 4) pair_rows<2>(x);
        const int lane = thread();
        const auto meet = [&](int stride) {
            const float sign = lane & stride ? -1.0f : 1.0f;
            FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
                float theirs[8];
                exchange(x[row], stride, theirs);
                FC_UNROLL for (int i = 0; i < 8; i++) x[row][i] = fused_multiply_add(x[row][i], sign, theirs[i]);
            }
        };
        if constexpr (kDecoded && kShared) each_stride(meet, adds_codes() ? 2 : 1);
        else each_stride(meet);
    }
    static FC_DEVICE void butterfly(float& a, float& b) {
        const float sum = a + b, difference = a - b;
        a = sum, b = difference;
    }
    template <int kStride> static FC_DEVICE void pair_rows(Values& x) {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) FC_UNROLL for (int i = 0; i < 8; i++) if (!(row & kStride))
            butterfly(x[row][i], x[row + kStride][i]);
    }

    // The largest of what the threads of a block have.
    FC_DEVICE void share_largest(uint32_t (&mine)[kParts]) const {
        each_stride([&](int stride) {
            const uint32_t theirs = exchange(mine[0], stride);
            mine[0] = theirs > mine[0] ? theirs : mine[0];
        });
    }

    // Where the last block is not whole, the last value: it fills the block.
    FC_DEVICE uint32_t fetch_last(const Octet<T> (&x)[kRows<T>], int begin, int values, uint32_t* word) const {
        if ((values & (block() - 1)) == 0) return 0;
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (begin + row != (values - 1) / 8) continue;
            float widened[8];
            widen<T>(x[row], widened);
            *word = bits_of(widened[7]);
        }
        sync();
        return *word;
    }

    // Where a residual has the first four coefficients of an octet; the other four are 4 * kGroup further.
    FC_DEVICE int residual_place(int octet) const {
        return (int)residual_index(octet >> octet_shift, 8 * (octet & ((1 << octet_shift) - 1)), block());
    }
    FC_DEVICE void add_residual(const Word* residual, int begin, int octets, Values& c) const {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = begin + row;
            if (octet >= octets) continue;
            Octet<T> before;
            float more[8];
            FC_UNROLL for (int half = 0; half < 2; half++)((Quad*)&before)[half] =
                *(const Quad*)(residual + residual_place(octet) + half * 4 * kGroup);
            widen<T>(before, more);
            FC_UNROLL for (int i = 0; i < 8; i++) c[row][i] += more[i];
        }
    }
    FC_DEVICE void replace_residual(const float (&error)[8], int octet, Word* residual) const {
        const Octet<T> now = narrow<T>(error);
        FC_UNROLL for (int half = 0; half < 2; half++) * (Quad*)(residual + residual_place(octet) + half * 4 * kGroup) =
            ((const Quad*)&now)[half];
    }

    // The values of this thread; zeros behind the last block.
    static FC_DEVICE void fill(const Octet<T> (&x)[kRows<T>], int begin, int values, int octets, float last,
                               Values& c) {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) widen<T>(x[row], c[row]);
        if (8 * (begin + kRows<T>) <= values) return;
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (8 * (begin + row) < values) continue;
            const float value = begin + row < octets ? last : 0.0f;
            FC_UNROLL for (int i = 0; i < 8; i++) c[row][i] = value;
        }
    }

    // The coefficients c of this thread and what is known of their blocks.
    FC_DEVICE void rotate(const Octet<T> (&x)[kRows<T>], const Word* residual, int begin, int values, int octets,
                          float last, Values& c, Meta (&meta)[kParts]) const {
        fill(x, begin, values, octets, last, c);
        butterflies<false>(c);
        if (kResiduals) add_residual(residual, begin, octets, c);
        measure(c, begin, meta);
        bool is_plain = true;
        FC_UNROLL for (int part = 0; part < kParts; part++) {
            is_plain &= meta[part].largest < strange();
            if (kResiduals && T::kMax < 1e30f) is_plain &= is_finite(x, part, begin, values);  // sums may hide it
        }
        if (~votes(is_plain)) rotate_strange(x, residual, begin, values, octets, last, c, meta);
    }

    // Out of line in rotated_measure.h.
    FC_DEVICE void rotate_strange(const Octet<T> (&x)[kRows<T>], const Word* residual, int begin, int values,
                                  int octets, float last, Values& c, Meta (&meta)[kParts]) const;
    FC_DEVICE void measure(const Values& c, int begin, Meta (&meta)[kParts]) const;
    FC_DEVICE void search(const Values& c, Meta (&meta)[kParts]) const;
    FC_DEVICE uint32_t errors_of(const Values& c, int part, float eighths) const;

    static FC_DEVICE float shrink_of(const Meta& meta) { return meta.kind & kShrunk ? kShrink : 1.0f; }
    // The key of the step that reaches the largest coefficient.
    FC_DEVICE uint32_t first_key(const Meta& meta) const {
        const float needed = float_of(meta.largest >> 1) * (1.0f / (float)(block() * zero));
        const uint32_t half = 1u << (kKeyShift - 1);
        return key_of(needed, levels <= kNearest ? half : 2 * half - 1, shrink_of(meta));
    }

    // Of the values of a part; what lies behind the last value is that again.
    static FC_DEVICE bool is_finite(const Octet<T> (&x)[kRows<T>], int part, int begin, int values) {
        constexpr uint32_t above = ordered<T>(T::kInfinity), below = (typename T::Word) ~above;
        bool all = true;
        FC_UNROLL for (int row = kOctets * part; row < kOctets * (part + 1); row++) {
            const Keys<T> keys = extremes<T>(x[row]);
            all &= (keys.high < above && keys.low > below) || 8 * (begin + row) >= values;
        }
        return all;
    }

    // Coefficients from here on are a reason to look closer; Inf and NaN of float16 may have widened to finite numbers.
    static FC_DEVICE uint32_t strange() { return T::kMax < 1e30f ? bits_of(65504.0f) << 1 : bits_of(0x1p99f) << 1; }
    // The largest magnitude of a part, << 1, | 1 if a negative number has it. As integers the positive numbers are the
    // largest signed ones, and the negative ones the largest unsigned.
    static FC_DEVICE uint32_t largest(const Values& c, int part) {
        int32_t positive = 0;
        uint32_t negative = 0;
        FC_UNROLL for (int i = 0; i < kPart; i++) {
            const uint32_t bits = bits_of(c[kOctets * part + i / 8][i % 8]);
            positive = (int32_t)bits > positive ? (int32_t)bits : positive;
            negative = bits > negative ? bits : negative;
        }
        const uint32_t above = (uint32_t)positive << 1, below = (int32_t)negative < 0 ? negative << 1 | 1 : 0;
        return above > below ? above : below;
    }

    // ---- steps and codes -----------------------------------------------------------------------------------------

    FC_DEVICE uint32_t largest_of_super_block(uint32_t top, uint32_t* words) const {
        const int shift = octet_shift - kThreadShift + 5;  // 1 << shift lanes have a super-block's blocks
        FC_UNROLL for (int stride = 1; stride < kWarp; stride *= 2) {
            if (stride >> shift) continue;
            const uint32_t theirs = exchange(top, stride);
            top = theirs > top ? theirs : top;
        }
        if (!kShared) return top;  // else a super-block has more lanes than a warp
        const int warp = thread() / kWarp, warps = 1 << (shift - 5);
        if ((thread() & (kWarp - 1)) == 0) words[warp] = top;
        sync();
        for (int i = 0; i < warps; i++) {
            const uint32_t theirs = words[(warp & ~(warps - 1)) + i];
            top = theirs > top ? theirs : top;
        }
        return top;
    }

    // Codes of a part, its scale and its super-block's top; the residual.
    template <class Offset>
    FC_DEVICE void quantize(const Values& c, int part, int begin, int octets, const Meta& meta, uint32_t key,
                            uint32_t top, uint8_t* payload, const Place<Offset>& place, Word* residual,
                            uint32_t* code) const {
        const int octet = begin + kOctets * part, index = octet >> octet_shift;
        const uint32_t kind = meta.kind & 0x7F, scale = distance_of(top, key) | (meta.largest & 1 ? 0 : 0x80);
        if (is_first(octet) && octet < octets) {
            payload[place.scales + index] = (uint8_t)(kind ? kind : scale);
            if (index % kSuperBlock == 0)
                *(uint16_t*)(payload + place.tops + 2 * (index / kSuperBlock)) = (uint16_t)top;
        }
        const float step = step_of(top, scale) * shrink_of(meta) * (float)block(), inverse = 1.0f / step;
        Values error = {};
        if (!kind) {
            const bool keeps = kResiduals && !(meta.kind & kShrunk);
            FC_UNROLL for (int i = 0; i < kPart; i++) {
                const float coefficient = c[kOctets * part + i / 8][i % 8];
                code[i] = clamped(rounded(coefficient * inverse), zero - 0x4B400000, levels - 1);
                if (keeps)
                    error[i / 8][i % 8] =
                        kept_number<T>(fused_multiply_add((float)((int)code[i] - zero), -step, coefficient));
            }
        } else {
            const int width = constant_bits(), first = 8 * width * (octet & ((1 << octet_shift) - 1));
            FC_UNROLL for (int i = 0; i < kPart; i++) code[i] =
                first + i * width < 32 ? meta.value >> (first + i * width) & ((1u << width) - 1) : 0;
        }
        if (kResiduals) {
            FC_UNROLL for (int row = 0; row < kOctets; row++) if (octet + row < octets)
                replace_residual(error[row], octet + row, residual);
        }
    }

    struct Step {
        float each;  // 0 of a constant
        bool is_constant;
    };
    template <class Offset>
    FC_DEVICE Step step_at(const uint8_t* payload, const Place<Offset>& place, int index) const {
        const uint32_t scale = payload[place.scales + index], kind = scale & 0x7F;
        const uint32_t top = ((const uint16_t*)(payload + place.tops))[(uint32_t)index / kSuperBlock];
        const float each = kind == kNanBlock ? float_of(Float32::kNan) : step_of(top, scale);
        return {kind == kConstant ? 0.0f : each, kind == kConstant};
    }

    // The first coefficient of the parts that `constants` has a bit for: the constant, or 0 where no block starts.
    template <bool kAlone, class Offset>
    FC_DEVICE uint32_t add_constants(const uint8_t* payload, const Place<Offset>& place, int octet, uint32_t shrunk,
                                     uint32_t constants, Values& x) const {
        uint32_t huge = 0;
        float values[2] = {-0.0f, -0.0f};
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // rare: one copy
#endif
        for (int part = 0; part < kParts; part++) {
            if (!(constants >> part & 1)) continue;
            const int at = octet + kOctets * part, first = at >> octet_shift << octet_shift;
            const uint32_t bits = constant_of<Offset>(payload, place.octet + first, place.groups);
            const bool is_huge = (bits & 0x7FFFFFFF) >= bits_of(kHugeStep);
            huge |= is_huge ? of_part(part) : 0;
            const float factor = (shrunk & of_part(part)) || (kAlone && is_huge) ? kShrink : 1.0f;
            const bool is_added = kAlone && adds_codes();  // to the neighbour's first, which is 0
            const bool has_first = at < first + (is_added ? 2 * kRows<T> : 1);
            float value = has_first ? float_of(bits) * factor : 0.0f;
            if (is_added && at == first) value += 0.0f;  // a constant of -0 becomes 0
            if (part) values[1] = value;
            else values[0] = value;
        }
        FC_UNROLL for (int part = 0; part < kParts; part++) x[kOctets * part][0] += values[part];
        return huge;
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA

#include "cuda/rotated_measure.h"
