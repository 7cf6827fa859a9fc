// Rotated blocks (rotated.h) by one thread block: a tile's encoding and decoding with butterflies across warps' lanes.
//
// A thread holds eight neighbouring values, so strides 1, 2, 4 of a butterfly are its own and the others an exchange
// between lanes: blocks of up to 256 values are one warp's. Additions come in the order of the definition.
//
//     encode   rotate, largest coefficient -> per block its key -> per family of 32 blocks the top, steps -> codes
//     decode   codes -> coefficients, which are added up -> finish: rotate back
//
// Nearly all blocks are plain: neither constant nor strange nor huge. Others are noticed by their coefficients, as in
// rotated_plain.h, and are then looked at closer by their whole warp. With a memory of what roundings lost (kCarries)
// that is added to the values, and afterwards replaced by what the payload lost of the sum. Width and block are runtime
// values: the planes are a few uniform branches beside the butterflies, and one kernel serves all legs.
#pragma once

#include "rotated_codes.h"

namespace flashcomm::FLASHCOMM_ISA {

template <class T, bool kMemory = false> struct RotatedTile : RotatedCodes {
    using RotatedCodes::RotatedCodes;
    using Word = typename T::Word;
    static constexpr bool kRotates = true, kCarries = kMemory;
    static constexpr int kMostAhead = kCarries && sizeof(Word) == 4 ? 0 : 1;
    static constexpr int kMaxBytes = kTileValues<T> * (256 + 16 + 1) / 256;  // 8 bits, blocks of 16
    static constexpr int kLargestBlock = 8 * kWarp;

    struct Meta {  // of a block: first its largest coefficient and what it is, then what its codes depend on
        uint32_t largest;  // bits << 1 | sign, see rotated_plain.h; then the reciprocal of the step, 0 for escapes
        uint32_t constant;
        uint32_t kind;  // 0, kNanBlock or kConstant; kShrunk beside it, and kFiner times the step's eighths of an octave
    };                  // below that which reaches the largest coefficient
    static constexpr uint32_t kShrunk = 256, kFiner = 512;

    // Coefficients wait in shared memory for their steps: 32 registers held over two barriers made the compiler spill.
    FC_INLINE int scratch_bytes() const {
        return kTileValues<T> * (int)sizeof(float) + kTileValues<T> / block() * (int)sizeof(Meta) + 16;
    }
    // `lost` [values], if kCarries: what was lost before, then what is lost now.
    FC_DEVICE void encode(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                          Word* lost = nullptr) const {
        const Place<int> place = own(values);
        encode_to<true>(x, values, scratch, payload, place, lost);
        if constexpr (kCarries) keep_loss(x, values, payload, place, lost);
    }

    // Encodes a tile into the payload that `place` is of; kOwn: there is nothing else in it.
    template <bool kOwn, class Offset>
    FC_DEVICE void encode_to(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                             const Place<Offset>& place, const Word* lost = nullptr) const {
        const int lane = thread(), blocks = this->blocks(values), octets = this->octets(values);
        Vec16* coefficients = (Vec16*)scratch;  // [half an octet][octet]
        Meta* metas = (Meta*)(coefficients + 2 * kTileOctets<T>);
        uint32_t* last = (uint32_t*)(metas + kTileValues<T> / block());
        fetch_last(x, values, lost, last);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            float c[8];
            rotate(x[row], lost, row * kThreads + lane, values, octets, *last, c, metas);
            FC_UNROLL for (int half = 0; half < 2; half++)
                __builtin_memcpy(&coefficients[half * kTileOctets<T> + row * kThreads + lane], c + 4 * half, 16);
        }
        sync();
        if (kOwn && lane == kThreads - 1) zero_gaps(place, (Offset)values, payload);
        for (int family = lane / kWarp; family * kFamily < blocks; family += kThreads / kWarp)
            fit(metas, family, blocks, payload + place.scales, payload + place.tops);
        sync();
        for (int octet = lane; (octet & ~(kWarp - 1)) < octets; octet += kThreads) {
            float c[8];
            FC_UNROLL for (int half = 0; half < 2; half++)
                __builtin_memcpy(c + 4 * half, &coefficients[half * kTileOctets<T> + octet], 16);
            quantize(c, octet, octet < octets, metas, payload, place);
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

    // What of an octet is encoded: its values, and what they were to carry on.
    FC_DEVICE void widen_carried(const Octet<T>& octet, const Word* lost, int first, int values, float (&x)[8]) const {
        widen<T>(octet, x);
        if constexpr (kCarries) {
            Octet<T> before;
            float more[8];
            load<T>(lost, values, first, before);
            widen<T>(before, more);
            FC_UNROLL for (int i = 0; i < 8; i++) x[i] += more[i];
        }
    }

    // Where the last block is not whole, the last value that is encoded: it fills the block.
    FC_DEVICE void fetch_last(const Octet<T> (&x)[kRows<T>], int values, const Word* lost, uint32_t* last) const {
        if ((values & (block() - 1)) == 0) return;
        const int lane = thread(), octet = (values - 1) / 8;
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (row * kThreads + lane != octet) continue;
            float carried[8];
            widen_carried(x[row], lost, 8 * octet, values, carried);
            *last = bits_of(carried[7]);
        }
        sync();
    }

    // The coefficients c of one octet, which is zero behind the last block; the first lane of a block notes its Meta.
    FC_DEVICE void rotate(const Octet<T>& octet, const Word* lost, int place, int values, int octets, uint32_t last,
                          float (&c)[8], Meta* metas) const {
        const int lane = thread();
        FC_UNROLL for (int i = 0; i < 8; i++) c[i] = 0;
        if ((place & ~(kWarp - 1)) >= octets) return;
        auto fill = [&](float (&x)[8]) {
            if (8 * place < values) return widen_carried(octet, lost, 8 * place, values, x);
            FC_UNROLL for (int i = 0; i < 8; i++) x[i] = place < octets ? float_of(last) : 0.0f;
        };
        fill(c);
        butterflies(c);
        Meta meta = {largest_of_block(largest(c)), 0, 0};
        const bool is_first = (place & ((1 << octet_shift) - 1)) == 0;
        bool varies = !is_first && c[0] != 0;
        FC_UNROLL for (int i = 1; i < 8; i++) varies |= c[i] != 0;
        bool is_plain = (votes(varies) & lanes_of_block(lane)) && meta.largest < strange();
        if (kCarries && T::kMax < 1e30f) is_plain &= is_finite(octet) || 8 * place >= values;  // sums may hide it
        if (~votes(is_plain)) {
            fill(c);
            look_closer(is_finite(octet) || 8 * place >= values, c, meta);
        }
        if (levels <= kSearched) meta.kind += kFiner * finer(c, meta);
        if (is_first && place < octets) metas[place >> octet_shift] = meta;
    }

    // How far below the first key that of least error is; all lanes of the warp.
    FC_DEVICE uint32_t finer(const float (&c)[8], const Meta& meta) const {
        const uint32_t first = first_key(meta);
        const float unit = shrink_of(meta) * (meta.largest & 1 ? (float)block() : -(float)block());
        return first - best_key(first, levels, [&](uint32_t key) {
            const float eighths = eighths_of(key, unit);
            uint32_t errors = 0;
            FC_UNROLL for (int i = 0; i < 8; i++) errors += squared_error(c[i], eighths, zero, levels);
            for (int apart = 1; apart >> octet_shift == 0; apart *= 2) errors += exchange(errors, apart);
            return errors;
        });
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

    // What a block is if it may not be plain, by its values x, which become its coefficients; all lanes of the warp,
    // whose other blocks come out as before. is_finite: of what this lane's values were made of.
    FC_DEVICE void look_closer(bool is_finite, float (&x)[8], Meta& meta) const {
        constexpr uint32_t above = ordered<Float32>(Float32::kInfinity), below = ~above;
        Keys<Float32> mine = {~0u, 0};
        FC_UNROLL for (int i = 0; i < 8; i++) {
            const uint32_t key = ordered<Float32>(bits_of(x[i]));
            mine.low = key < mine.low ? key : mine.low;
            mine.high = key > mine.high ? key : mine.high;
        }
        const uint32_t high_key = largest_of_block(mine.high), low_key = ~largest_of_block(~mine.low);
        is_finite = !(votes(!is_finite) & lanes_of_block(thread())) && high_key < above && low_key > below;
        const float low = is_finite ? float_of(unordered<Float32>(low_key)) : 0.0f;
        const float high = is_finite ? float_of(unordered<Float32>(high_key)) : 0.0f;
        meta.kind = !is_finite ? kNanBlock : low == high ? kConstant : 0;
        if (meta.kind == kConstant) meta.constant = bits_of(low);
        const bool is_huge = !meta.kind && (-low > high ? -low : high) >= kHugeStep;
        FC_UNROLL for (int i = 0; i < 8; i++) x[i] = meta.kind ? 0.0f : x[i] * (is_huge ? kShrink : 1.0f);
        butterflies(x);
        meta.largest = largest_of_block(largest(x));
        meta.kind |= is_huge ? kShrunk : 0;
    }

    // What the payload lost of the values and what they carried; what is not finite is forgotten.
    FC_DEVICE void keep_loss(const Octet<T> (&x)[kRows<T>], int values, const uint8_t* payload,
                             const Place<int>& place, Word* lost) const {
        const int lane = thread(), octets = this->octets(values);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = row * kThreads + lane;
            if ((octet & ~(kWarp - 1)) >= octets) continue;
            float kept[8] = {}, carried[8];
            const bool is_huge = octet < octets && decode_from<true>(payload, place, octet, false, kept);
            finish<true, Float32>(kept, is_huge);
            if (8 * octet >= values) continue;
            widen_carried(x[row], lost, 8 * octet, values, carried);
            FC_UNROLL for (int i = 0; i < 8; i++) {
                const float loss = carried[i] - kept[i];
                carried[i] = (bits_of(loss) & 0x7FFFFFFF) < Float32::kInfinity ? loss : 0.0f;
            }
            store<T>(lost, values, 8 * octet, narrow<T>(carried));
        }
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
        const float inverse = kind ? 0.0f : 1.0f / (step_of(top, scale) * shrink * size);
        if (is_there) {
            metas[index].largest = bits_of(inverse);
            scales[index] = (uint8_t)(kind ? kind : scale);
        }
        if (index == family * kFamily) ((uint16_t*)tops)[family] = (uint16_t)top;
    }

    // All lanes of a warp.
    template <class Offset>
    FC_DEVICE void quantize(const float (&c)[8], int octet, bool is_there, const Meta* metas, uint8_t* payload,
                               const Place<Offset>& place) const {
        const int index = octet >> octet_shift, part = octet & ((1 << octet_shift) - 1);
        const Meta meta = is_there ? metas[index] : Meta{0, 0, 0};
        const float inverse = float_of(meta.largest);
        uint32_t code[8];
        if (inverse != 0) {
            FC_UNROLL for (int i = 0; i < 8; i++) {
                const int near = (int)(rounded(c[i] * inverse) - 0x4B400000u) + zero;
                code[i] = (uint32_t)(near < 0 ? 0 : near > levels - 1 ? levels - 1 : near);
            }
        } else {
            const int width = constant_bits(), first = 8 * width * part;
            FC_UNROLL for (int i = 0; i < 8; i++)
                code[i] = first < 32 ? meta.constant >> (first + i * width) & ((1u << width) - 1) : 0;
        }
        store_codes(code, place.octet + octet, is_there, payload, place.groups);
    }

};

}  // namespace flashcomm::FLASHCOMM_ISA
