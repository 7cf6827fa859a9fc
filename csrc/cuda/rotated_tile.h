// Rotated blocks (rotated.h) by one thread block: a tile's encoding and decoding with butterflies across warps' lanes.
//
// A thread holds eight neighbouring values, so strides 1, 2, 4 of a butterfly are its own and the others an exchange
// between lanes: blocks of up to 256 values are one warp's. Additions come in the order of the definition.
//
//     encode   rotate, + residual, largest coefficient -> per block its key -> per family of 32 blocks the top, steps
//              -> codes; the rounding error -> residual
//     decode   codes -> coefficients, which are added up -> finish: rotate back
//
// Nearly all blocks are plain or constant. NaN, Inf and huge values are noticed by their coefficients, as in
// rotated_plain.h, and are then looked at closer by their whole warp. Width and block are runtime values: the planes are
// a few uniform branches beside the butterflies, and one kernel serves all legs.
#pragma once

#include "cuda/rotated_codes.h"

namespace flashcomm::FLASHCOMM_ISA {

template <class T, bool kResiduals = false> struct RotatedTile : RotatedCodes {
    using RotatedCodes::RotatedCodes;
    using Word = typename T::Word;
    static constexpr bool kRotates = true, kKeepsResiduals = kResiduals;
    static constexpr int kMostAhead = 1;
    static constexpr int kMaxBytes = kTileValues<T> * (256 + 16 + 1) / 256;  // 8 bits, blocks of 16
    static constexpr int kLargestBlock = 8 * kWarp;

    struct Meta {  // of a block: first its largest coefficient and what it is, then what its codes depend on
        uint32_t largest;  // bits << 1 | sign, see rotated_plain.h; then the reciprocal of the step, 0 for escapes
        uint32_t value;    // of a constant; then of others the step
        uint32_t kind;     // 0, kNanBlock or kConstant; kShrunk beside it, and kFiner times the step's eighths of an octave
    };                  // below that which reaches the largest coefficient
    struct alignas(4 * sizeof(Word)) Quad {  // of a residual
        uint32_t w[sizeof(Word)];
    };
    static constexpr uint32_t kShrunk = 256, kFiner = 512;

    // Coefficients wait in shared memory for their steps: 32 registers held over two barriers made the compiler spill.
    FC_INLINE int scratch_bytes() const {
        return kTileValues<T> * (int)sizeof(float) + kTileValues<T> / block() * (int)sizeof(Meta) + 16;
    }
    // `residual`, if kKeepsResiduals: added to the coefficients, then replaced by the rounding error.
    FC_DEVICE void encode(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                          Word* residual = nullptr) const {
        encode_to<true>(x, values, scratch, payload, own(values), residual);
    }

    // Encodes a tile into the payload that `place` is of; kOwn: there is nothing else in it.
    template <bool kOwn, class Offset>
    FC_DEVICE void encode_to(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                             const Place<Offset>& place, Word* residual = nullptr) const {
        const int lane = thread(), blocks = this->blocks(values), octets = this->octets(values);
        Vec16* coefficients = (Vec16*)scratch;  // [half an octet][octet]
        Meta* metas = (Meta*)(coefficients + 2 * kTileOctets<T>);
        uint32_t* last = (uint32_t*)(metas + kTileValues<T> / block());
        fetch_last(x, values, last);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            float c[8];
            rotate(x[row], residual, row * kThreads + lane, values, octets, *last, c, metas);
            FC_UNROLL for (int half = 0; half < 2; half++)
                __builtin_memcpy(&coefficients[half * kTileOctets<T> + row * kThreads + lane], c + 4 * half, 16);
        }
        sync();
        if (levels <= kSearched) search(coefficients, octets, metas);
        if (kOwn && lane == kThreads - 1) zero_gaps(place, (Offset)values, payload);
        for (int family = lane / kWarp; family * kFamily < blocks; family += kThreads / kWarp)
            fit(metas, family, blocks, payload + place.scales, payload + place.tops);
        sync();
        for (int octet = lane; (octet & ~(kWarp - 1)) < octets; octet += kThreads) {
            float c[8];
            fetch(coefficients, octet, c);
            quantize(c, octet, octet < octets, metas, payload, place, residual);
        }
        sync();
    }

    template <bool kAlone>
    FC_DEVICE bool decode(const uint8_t* payload, int values, int octet, bool shrink, float (&x)[8]) const {
        return decode_from<kAlone>(payload, own(values), octet, shrink, x);
    }

    // Coefficients of the octet of a payload that `place` is of; whether its block's butterflies could overflow.
    template <bool kAlone, class Offset>
    FC_DEVICE bool decode_from(const uint8_t* payload, const Place<Offset>& place, Offset octet, bool shrink,
                               float (&x)[8]) const {
        const Offset index = octet >> octet_shift, first = index << octet_shift;
        const uint32_t scale = payload[place.scales + index], kind = scale & 0x7F;
        const uint32_t top = *(const uint16_t*)(payload + place.tops + 2 * (index / kFamily));
        const bool is_constant = kind == kConstant;
        uint32_t codes[2], constant = 0;
        // A constant's bits are spread over the first codes of its block.
        const Offset from = is_constant ? first : octet, heads = is_constant ? constant_octets() : 1;
        for (Offset o = from; o < from + heads; o++) {
            load_codes(payload, place, o, codes);
            if (is_constant) constant |= constant_part(codes, (int)(o - first));
        }
        const float step = kind == kNanBlock ? float_of(Float32::kNan) : step_of(top, scale);
        const float size = float_of((is_constant ? constant : bits_of(step)) & 0x7FFFFFFF);
        const bool is_huge = size >= kHugeStep;
        const float factor = shrink || (kAlone && is_huge) ? kShrink : 1.0f, shrunk = step * factor;
        FC_UNROLL for (int i = 0; i < 8; i++)
            x[i] = fused_multiply_add((float)((int)byte_of(codes, i) - zero), shrunk, 0.0f);  // exact, never -0
        if (is_constant) {
            FC_UNROLL for (int i = 0; i < 8; i++) x[i] = 0.0f;
            if (octet == first) x[0] = float_of(constant) * factor;
        }
        return is_huge;
    }

    template <bool kAlone, class Limit = T> FC_DEVICE void finish(float (&x)[8], bool shrunk) const {
        butterflies(x);
        if (!shrunk && (!kAlone || Limit::kMax > 1e30f)) return;
        const float grow = shrunk ? kGrow : 1.0f;
        FC_UNROLL for (int i = 0; i < 8; i++) {
            x[i] *= grow;
            if (kAlone) x[i] = x[i] < -Limit::kMax ? -Limit::kMax : x[i] > Limit::kMax ? Limit::kMax : x[i];
        }
    }

private:
    // ---- rotation ------------------------------------------------------------------------------------------------

    FC_DEVICE void butterflies(float (&x)[8]) const {
        FC_UNROLL for (int stride = 1; stride < 8; stride *= 2)
            FC_UNROLL for (int i = 0; i < 8; i++) {
                if (i & stride) continue;
                const float a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
        const int lane = thread();
        for (int apart = 1; apart >> octet_shift == 0; apart *= 2) {
            float theirs[8];
            exchange(x, apart, theirs);
            const float sign = lane & apart ? -1.0f : 1.0f;
            FC_UNROLL for (int i = 0; i < 8; i++) x[i] = fused_multiply_add(x[i], sign, theirs[i]);
        }
    }

    // The largest of what the lanes of a block hold.
    FC_DEVICE uint32_t largest_of_block(uint32_t mine) const {
        for (int apart = 1; apart >> octet_shift == 0; apart *= 2) {
            const uint32_t theirs = exchange(mine, apart);
            mine = theirs > mine ? theirs : mine;
        }
        return mine;
    }
    FC_DEVICE uint32_t lanes_of_block(int lane) const {  // as votes() counts them
        const int first = lane & (kWarp - 1) & ~((1 << octet_shift) - 1);
        return (uint32_t)(((uint64_t)1 << (1 << octet_shift)) - 1) << first;
    }

    // Where the last block is not whole, the last value: it fills the block.
    FC_DEVICE void fetch_last(const Octet<T> (&x)[kRows<T>], int values, uint32_t* last) const {
        if ((values & (block() - 1)) == 0) return;
        const int lane = thread(), octet = (values - 1) / 8;
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (row * kThreads + lane != octet) continue;
            float widened[8];
            widen<T>(x[row], widened);
            *last = bits_of(widened[7]);
        }
        sync();
    }

    // Where a residual has the first four coefficients of an octet; the other four are 4 * kGroup further.
    FC_DEVICE int residual_place(int octet) const {
        return (int)memory_place(octet >> octet_shift, 8 * (octet & ((1 << octet_shift) - 1)), block());
    }
    FC_DEVICE void add_residual(const Word* residual, int octet, float (&c)[8]) const {
        Octet<T> before;
        float more[8];
        FC_UNROLL for (int half = 0; half < 2; half++)
            ((Quad*)&before)[half] = *(const Quad*)(residual + residual_place(octet) + half * 4 * kGroup);
        widen<T>(before, more);
        FC_UNROLL for (int i = 0; i < 8; i++) c[i] += more[i];
    }
    FC_DEVICE void replace_residual(const float (&error)[8], int octet, Word* residual) const {
        const Octet<T> now = narrow<T>(error);
        FC_UNROLL for (int half = 0; half < 2; half++)
            *(Quad*)(residual + residual_place(octet) + half * 4 * kGroup) = ((const Quad*)&now)[half];
    }

    // The coefficients c of one octet, which is zero behind the last block; the first lane of a block notes its Meta.
    FC_DEVICE void rotate(const Octet<T>& octet, const Word* residual, int place, int values, int octets, uint32_t last,
                          float (&c)[8], Meta* metas) const {
        FC_UNROLL for (int i = 0; i < 8; i++) c[i] = 0;
        if ((place & ~(kWarp - 1)) >= octets) return;
        const bool is_first = (place & ((1 << octet_shift) - 1)) == 0, is_there = place < octets;
        const bool is_finite = this->is_finite(octet) || 8 * place >= values;
        auto fill = [&] {
            if (8 * place < values) return widen<T>(octet, c);
            FC_UNROLL for (int i = 0; i < 8; i++) c[i] = is_there ? float_of(last) : 0.0f;
        };
        fill();
        butterflies(c);
        if (kKeepsResiduals && is_there) add_residual(residual, place, c);
        Meta meta = measure(c, is_first, 1.0f);
        bool is_plain = meta.largest < strange();
        if (kKeepsResiduals && T::kMax < 1e30f) is_plain &= is_finite;  // sums may hide it
        if (~votes(is_plain)) {
            fill();
            const uint32_t magnitude = largest_of_block(is_finite ? largest(c) >> 1 : ~0u);
            const bool is_nan = magnitude >= Float32::kInfinity, is_huge = magnitude >= bits_of(kHugeStep);
            FC_UNROLL for (int i = 0; i < 8; i++) c[i] = is_nan ? 0.0f : c[i] * (is_huge ? kShrink : 1.0f);
            butterflies(c);
            if (kKeepsResiduals && is_there && !is_huge) add_residual(residual, place, c);
            meta = measure(c, is_first, is_huge ? kGrow : 1.0f);
            if (is_nan || meta.largest >> 1 >= Float32::kInfinity) meta = {0, 0, kNanBlock};
            else if (is_huge) meta.kind |= kShrunk;
        }
        if (is_first && is_there) metas[place >> octet_shift] = meta;
    }

    // What is known of a block by its coefficients. A constant's are zero but for the first.
    FC_DEVICE Meta measure(const float (&c)[8], bool is_first, float grow) const {
        bool varies = !is_first && c[0] != 0;
        FC_UNROLL for (int i = 1; i < 8; i++) varies |= c[i] != 0;
        const bool is_constant = !(votes(varies) & lanes_of_block(thread()));
        return {largest_of_block(largest(c)), bits_of(c[0] * (1.0f / (float)block()) * grow), is_constant ? kConstant : 0u};
    }

    static FC_DEVICE void fetch(const Vec16* coefficients, int octet, float (&c)[8]) {
        FC_UNROLL for (int half = 0; half < 2; half++)
            __builtin_memcpy(c + 4 * half, &coefficients[half * kTileOctets<T> + octet], 16);
    }

    // Notes for every block which of the steps tried loses least. A phase of its own: beside rotate() it would spill.
    FC_DEVICE void search(const Vec16* coefficients, int octets, Meta* metas) const {
        for (int octet = thread(); (octet & ~(kWarp - 1)) < octets; octet += kThreads) {
            const Meta meta = octet < octets ? metas[octet >> octet_shift] : Meta{0, 0, kConstant};
            const uint32_t first = first_key(meta);
            const float unit = shrink_of(meta) * (meta.largest & 1 ? (float)block() : -(float)block());
            float c[8];
            fetch(coefficients, octet, c);
            const uint32_t best = best_key(first, levels, [&](uint32_t key) {
                const float eighths = eighths_of(key, unit);
                uint32_t errors = 0;
                FC_UNROLL for (int i = 0; i < 8; i++) errors += squared_error(c[i], eighths, zero, levels);
                for (int apart = 1; apart >> octet_shift == 0; apart *= 2) errors += exchange(errors, apart);
                return errors;
            });
            const bool is_first = (octet & ((1 << octet_shift) - 1)) == 0;
            if (is_first && octet < octets) metas[octet >> octet_shift].kind = meta.kind + kFiner * (first - best);
        }
        sync();
    }

    static FC_DEVICE float shrink_of(const Meta& meta) { return meta.kind & kShrunk ? kShrink : 1.0f; }
    // The key of the step that reaches the largest coefficient.
    FC_DEVICE uint32_t first_key(const Meta& meta) const {
        const float needed = float_of(meta.largest >> 1) * (1.0f / (float)(block() * zero));
        const uint32_t half = 1u << (kKeyShift - 1);
        return key_of(needed, levels <= kNearest ? half : 2 * half - 1, shrink_of(meta));
    }

    static FC_DEVICE bool is_finite(const Octet<T>& octet) {
        constexpr uint32_t above = ordered<T>(T::kInfinity), below = (typename T::Word)~above;
        const Keys<T> keys = extremes<T>(octet);
        return keys.high < above && keys.low > below;
    }

    // Coefficients from here on are a reason to look closer; Inf and NaN of float16 may have widened to finite numbers.
    static FC_DEVICE uint32_t strange() {
        return T::kMax < 1e30f ? bits_of(65504.0f) << 1 : bits_of(0x1p99f) << 1;
    }
    static FC_DEVICE uint32_t largest(const float (&c)[8]) {
        uint32_t most = 0;
        FC_UNROLL for (int i = 0; i < 8; i++) {
            const uint32_t key = bits_of(c[i]) << 1 | bits_of(c[i]) >> 31;
            most = key > most ? key : most;
        }
        return most;
    }

    // ---- steps and codes -----------------------------------------------------------------------------------------

    // One family's steps, by one warp, a lane for each block.
    FC_DEVICE void fit(Meta* metas, int family, int blocks, uint8_t* scales, uint8_t* tops) const {
        const int index = family * kFamily + (thread() & (kWarp - 1));
        const bool is_there = index < blocks;
        const Meta meta = is_there ? metas[index] : Meta{0, 0, kConstant};
        const uint32_t kind = meta.kind & 0x7F, key = first_key(meta) - meta.kind / kFiner;
        const float size = (float)block(), shrink = shrink_of(meta);
        uint32_t top = kind ? kLeastKey : key;
        FC_UNROLL for (int apart = 1; apart < kWarp; apart *= 2) {
            const uint32_t theirs = exchange(top, apart);
            top = theirs > top ? theirs : top;
        }
        const uint32_t scale = distance_of(top, key) | (meta.largest & 1 ? 0 : 0x80);
        const float step = step_of(top, scale) * shrink * size;
        if (is_there) {
            metas[index].largest = bits_of(kind ? 0.0f : 1.0f / step);
            if (kKeepsResiduals && !kind) metas[index].value = bits_of(step);
            scales[index] = (uint8_t)(kind ? kind : scale);
        }
        if (index == family * kFamily) ((uint16_t*)tops)[family] = (uint16_t)top;
    }

    // All lanes of a warp.
    template <class Offset>
    FC_DEVICE void quantize(const float (&c)[8], int octet, bool is_there, const Meta* metas, uint8_t* payload,
                            const Place<Offset>& place, Word* residual) const {
        const int index = octet >> octet_shift, part = octet & ((1 << octet_shift) - 1);
        const Meta meta = is_there ? metas[index] : Meta{0, 0, 0};
        const float inverse = float_of(meta.largest);
        uint32_t code[8];
        float error[8] = {};
        if (inverse != 0) {
            const bool keeps = kKeepsResiduals && !(meta.kind & kShrunk);
            FC_UNROLL for (int i = 0; i < 8; i++) {
                const int near = (int)(rounded(c[i] * inverse) - 0x4B400000u) + zero;
                code[i] = (uint32_t)(near < 0 ? 0 : near > levels - 1 ? levels - 1 : near);
                if (keeps)
                    error[i] = kept_number<T>(fused_multiply_add((float)((int)code[i] - zero), -float_of(meta.value), c[i]));
            }
        } else {
            const int width = constant_bits(), first = 8 * width * part;
            FC_UNROLL for (int i = 0; i < 8; i++)
                code[i] = first < 32 ? meta.value >> (first + i * width) & ((1u << width) - 1) : 0;
        }
        store_codes(code, place.octet + octet, is_there, payload, place.groups);
        if (kKeepsResiduals && is_there) replace_residual(error, octet, residual);
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
