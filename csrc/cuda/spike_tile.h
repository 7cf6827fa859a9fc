// Blocks with reserved spikes (spike.h) by one thread block: what a block's two smallest and two largest values tell.
//
// Without its minimum and maximum a block reaches from its second smallest value to its second largest, so every octet
// leaves two of each and the places of the spikes in shared memory; one thread a block puts them together and writes
// the metadata, every thread its codes, and one thread for four blocks their positions.
//
// Width and block are runtime values, as in rotated_tile.h. A tile's own payload is that of its values; of a tensor's
// payload it is a part (Place), if positions of four blocks, whole bytes in all planes, stay together.
#pragma once

#include <math.h>

#include "format/spike.h"
#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

template <class T> struct SpikeTile {
    using Word = typename T::Word;
    static constexpr bool kRotates = false, kKeepsResiduals = false;
    static constexpr int kLargestBlock = 8 * kWarp;  // of a tensor; positions of blocks in whole tiles
    static constexpr int kMostAhead = 1;
    // 8 bits in blocks of 8, of which each has 6 bytes and two places of 3 bits beside it.
    static constexpr int kMaxBytes = kTileValues<T> * 15 / 8 < kSlotBytes ? kTileValues<T> * 15 / 8 : (int)kSlotBytes;
    static constexpr int kBlocksTogether = 4;  // whose positions are an octet

    // The two least and the two greatest keys of some values, and where the least and the greatest come first.
    struct Ends {
        Word low[2], high[2];
        uint8_t low_at, high_at;
    };

    struct alignas(16) Meta {  // what the codes of a block depend on; inverse 0: all are zero
        float prescale, start, inverse;
        uint8_t low_at, high_at;
    };

    // Where the sections of a tile begin in a payload; `octets` and `pairs` are those of all its planes.
    template <class Offset> struct Place {
        Offset octets, pairs, octet, minima, maxima, spans, lows, positions, pair;
    };

    int bits, octets_per_block, octet_shift, position_bits;  // octet_shift: -1 if blocks are no power of two

    FC_INLINE explicit SpikeTile(Setting with)
        : bits(with.bits), octets_per_block(with.block / 8), octet_shift(0), position_bits(3) {
        while (1 << position_bits < with.block) position_bits++;
        while (1 << octet_shift < octets_per_block) octet_shift++;
        if (1 << octet_shift != octets_per_block) octet_shift = -1;
    }

    FC_INLINE int block() const { return 8 * octets_per_block; }
    FC_INLINE int unit() const { return kBlocksTogether * block(); }
    FC_INLINE int scratch_bytes() const {
        return kTileOctets<T> * (int)sizeof(Ends) + kTileValues<T> / block() * (int)sizeof(Meta);
    }
    template <class Offset> FC_INLINE Offset octets(Offset values) const { return (values + 7) / 8; }
    template <class Offset> FC_INLINE Offset block_of(Offset octet) const {
        return octet_shift < 0 ? octet / octets_per_block : octet >> octet_shift;
    }
    template <class Offset> FC_INLINE Offset blocks(Offset values) const {
        return block_of(octets(values) + octets_per_block - 1);
    }

    template <class Offset> FC_INLINE Place<Offset> own(Offset values) const {
        const Offset blocks = this->blocks(values), octets = this->octets(values);
        const Offset pairs = (blocks + kBlocksTogether - 1) / kBlocksTogether, minima = plane_bytes(bits, octets);
        const Offset halves = padded16(2 * blocks), bytes = padded16(blocks), spans = minima + 2 * halves;
        return {octets, pairs, 0, minima, minima + halves, spans, spans + bytes, spans + 2 * bytes, 0};
    }
    FC_INLINE Place<int64_t> part(const Place<int64_t>& whole, int64_t octet, int64_t block) const {
        Place<int64_t> part = whole;
        part.octet += octet, part.pair += block / kBlocksTogether;
        part.minima += 2 * block, part.maxima += 2 * block, part.spans += block, part.lows += block;
        return part;
    }
    FC_INLINE int bytes(int values) const {
        if (values <= 0) return 0;
        const Place<int> place = own(values);
        return place.positions + plane_bytes(position_bits, place.pairs);
    }

    // Encodes a tile into the payload that `place` is of; kOwn: there is nothing else in it.
    template <bool kOwn, class Offset>
    FC_DEVICE void encode_to(const Octet<T> (&x)[kRows<T>], int values, uint8_t* scratch, uint8_t* payload,
                             const Place<Offset>& place, Word*) const {
        const int lane = thread(), begin = first_octet<T>(), octets = this->octets(values),
                  blocks = this->blocks(values);
        Ends* ends = (Ends*)scratch;
        Meta* metas = (Meta*)(scratch + kTileOctets<T> * (int)sizeof(Ends));
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = begin + row;
            if (octet < octets) ends[octet] = ends_of(x[row], values - 8 * octet, place_of(octet));
        }
        sync();
        if (kOwn && lane == kThreads - 1) zero_gaps(place, (Offset)values, payload);
        for (int index = lane; index < blocks; index += kThreads)
            metas[index] = fit(ends, index, values, payload, place);
        sync();
        for (int pair = lane; pair * kBlocksTogether < blocks; pair += kThreads)
            store_positions(metas, pair, blocks, payload, place);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            const int octet = begin + row;
            if (octet < octets) store_codes(x[row], octet, values, metas, payload, place);
        }
        sync();
    }

    // The octets from `octet` on, counted from where `place` is of in a payload.
    template <bool kAlone, class Offset>
    FC_DEVICE uint32_t decode_from(const uint8_t* payload, const Place<Offset>& place, int octet, uint32_t,
                                   float (&x)[kRows<T>][8]) const {
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) {
            if (place.octet + octet + row >= place.octets) continue;
            float value[8];
            decode_octet(payload, place, octet + row, value);
            put<kAlone>(value, x[row]);
        }
        return 0;
    }
    template <class Visit> FC_DEVICE void with_blocks(Visit visit) const { visit(*this); }
    template <bool> FC_DEVICE void finish(float (&)[kRows<T>][8], uint32_t) const {}

    template <class Offset>
    FC_DEVICE float bound(const uint8_t* payload, const Place<Offset>& place, int octet) const {
        const int index = block_of(octet);
        if (place.octet + octet >= place.octets || payload[place.spans + index] == kConstantSpan) return 0;
        const float minimum = float_of((uint32_t)((const uint16_t*)(payload + place.minima))[index] << 16);
        const float maximum = float_of((uint32_t)((const uint16_t*)(payload + place.maxima))[index] << 16);
        const Frame frame = Frame::of(minimum, maximum);
        const float step = frame.span(payload[place.spans + index]) / (float)((1 << bits) - 1);
        return Frame::bound(minimum, maximum, step, 1 / frame.prescale);
    }

    // One octet, within the finite range of T.
    template <class Offset>
    FC_DEVICE void decode_octet(const uint8_t* payload, const Place<Offset>& place, int octet, float (&x)[8]) const {
        const int index = block_of(octet);
        const uint32_t low_bits = ((const uint16_t*)(payload + place.minima))[index];
        const uint32_t high_bits = ((const uint16_t*)(payload + place.maxima))[index];
        const float minimum = float_of(low_bits << 16), maximum = float_of(high_bits << 16);
        const uint32_t code = payload[place.spans + index];
        if (code == kConstantSpan || minimum != minimum) {
            const float value = float_of(code == kConstantSpan ? low_bits << 16 | high_bits : Float32::kNan);
            FC_UNROLL for (int i = 0; i < 8; i++) x[i] = limited(value);
            return;
        }
        Eight codes[1] = {};
        load_planes<1, Offset>(bits, place.octets, place.octet + octet, payload, codes, codes);
        const Frame frame = Frame::of(minimum, maximum);
        const float span = frame.span(code), step = span / (float)((1 << bits) - 1), grow = 1 / frame.prescale;
        const float low = frame.anchor + (float)(int8_t)payload[place.lows + index] * (span / kUnits);
        const int begin = place_of(octet);
        const int low_at = (int)position(payload, place, 2 * index),
                  high_at = (int)position(payload, place, 2 * index + 1);
        FC_UNROLL for (int i = 0; i < 8; i++) {
            const float rest = (low + (float)(int)number_of(codes[0], i) * step) * grow;
            x[i] = limited(low_at == begin + i ? minimum : high_at == begin + i ? maximum : rest);
        }
    }

    template <class Offset>
    FC_DEVICE void zero_gaps(const Place<Offset>& place, Offset values, uint8_t* payload) const {
        const Offset blocks = this->blocks(values);
        each_plane(bits, place.octets, [&](auto width, int, Offset start) {
            zero_gap<Offset>(payload + start, place.octets * width.value);
        });
        each_plane(position_bits, place.pairs, [&](auto width, int, Offset start) {
            zero_gap<Offset>(payload + place.positions + start, place.pairs * width.value);
        });
        zero_gap<Offset>(payload + place.minima, 2 * blocks);
        zero_gap<Offset>(payload + place.maxima, 2 * blocks);
        zero_gap<Offset>(payload + place.spans, blocks);
        zero_gap<Offset>(payload + place.lows, blocks);
    }

private:
    // Which value of its block an octet starts with.
    template <class Offset> FC_DEVICE int place_of(Offset octet) const {
        return 8 * (int)(octet - block_of(octet) * octets_per_block);
    }
    static FC_DEVICE float limited(float x) { return x < -T::kMax ? -T::kMax : x > T::kMax ? T::kMax : x; }

    // ---- the ends of a block -------------------------------------------------------------------------------------

    // Of the first `count` values of an octet whose first is number `at` of its block.
    static FC_DEVICE Ends ends_of(const Octet<T>& octet, int count, int at) {
        constexpr Word most = (Word) ~(Word)0;
        Ends ends = {{most, most}, {0, 0}, (uint8_t)at, (uint8_t)at};
        FC_UNROLL for (int i = 0; i < 8; i++) {
            if (i >= count) continue;
            const Word key = ordered<T>((Word)octet.at(i));
            take(ends, {{key, most}, {key, 0}, (uint8_t)(at + i), (uint8_t)(at + i)});
        }
        return ends;
    }

    // Adds the ends of values that come later.
    static FC_DEVICE void take(Ends& ends, const Ends& more) {
        if (more.low[0] < ends.low[0]) {
            ends.low[1] = ends.low[0] < more.low[1] ? ends.low[0] : more.low[1];
            ends.low[0] = more.low[0], ends.low_at = more.low_at;
        } else {
            ends.low[1] = more.low[0] < ends.low[1] ? more.low[0] : ends.low[1];
        }
        if (more.high[0] > ends.high[0]) {
            ends.high[1] = ends.high[0] > more.high[1] ? ends.high[0] : more.high[1];
            ends.high[0] = more.high[0], ends.high_at = more.high_at;
        } else {
            ends.high[1] = more.high[0] > ends.high[1] ? more.high[0] : ends.high[1];
        }
    }

    // ---- metadata ------------------------------------------------------------------------------------------------

    // To bfloat16's nearest number, within its finite range.
    static FC_DEVICE float spike_of(float x) {
        const float spike = float_of(BFloat16::narrow(x) << 16);
        return spike < -BFloat16::kMax ? -BFloat16::kMax : spike > BFloat16::kMax ? BFloat16::kMax : spike;
    }

    // Writes the metadata of one block but for its positions, and returns what its codes depend on.
    template <class Offset>
    FC_DEVICE Meta fit(const Ends* ends, int index, int values, uint8_t* payload, const Place<Offset>& place) const {
        constexpr uint32_t above = ordered<T>(T::kInfinity), below = (typename T::Word) ~above;
        const int left = values - index * block(), count = left < block() ? left : block();
        Ends e = ends[index * octets_per_block];
        for (int i = 1; 8 * i < count; i++) take(e, ends[index * octets_per_block + i]);
        const bool finite = e.high[0] < above && e.low[0] > below;
        const auto value = [finite](uint32_t key) { return finite ? T::widen(unordered<T>(key)) : 0.0f; };

        const float lowest = value(e.low[0]), highest = value(e.high[0]);
        const float minimum = spike_of(lowest), maximum = spike_of(highest);
        const Frame frame = Frame::of(minimum, maximum);
        const float low = value(count > 2 ? e.low[1] : e.low[0]) * frame.prescale;  // of two there is no rest
        const float high = value(count > 2 ? e.high[1] : e.low[0]) * frame.prescale;
        const uint32_t code = frame.code(low, high);
        const float span = frame.span(code), unit = span / kUnits, levels = (float)((1 << bits) - 1);
        float steps = span > 0 ? floorf((low - frame.anchor) / unit) : 0.0f;
        steps = steps < -128 ? -128.0f : steps > 127 ? 127.0f : steps;

        const uint32_t whole = bits_of(lowest);
        const bool escaped = finite && lowest == highest && lowest != minimum;
        const uint32_t low_half = escaped ? whole >> 16 : finite ? bits_of(minimum) >> 16 : (uint32_t)BFloat16::kNan;
        const uint32_t high_half = escaped ? whole : finite ? bits_of(maximum) >> 16 : (uint32_t)BFloat16::kNan;
        ((uint16_t*)(payload + place.minima))[index] = (uint16_t)low_half;
        ((uint16_t*)(payload + place.maxima))[index] = (uint16_t)high_half;
        payload[place.spans + index] = (uint8_t)(escaped ? kConstantSpan : code);
        payload[place.lows + index] = (uint8_t)(int8_t)steps;
        const float inverse = finite && span > 0 ? 1.0f / (span / levels) : 0.0f;
        return {frame.prescale, frame.anchor + steps * unit, inverse, e.low_at, e.high_at};
    }

    template <class Offset>
    FC_DEVICE void store_positions(const Meta* metas, int pair, int blocks, uint8_t* payload,
                                   const Place<Offset>& place) const {
        uint32_t code[8];
        FC_UNROLL for (int i = 0; i < kBlocksTogether; i++) {
            const int index = pair * kBlocksTogether + i;
            code[2 * i] = index < blocks ? metas[index].low_at : 0;
            code[2 * i + 1] = index < blocks ? metas[index].high_at : 0;
        }
        const Eight codes[1] = {eight_of(code)};
        store_planes<1, Offset>(position_bits, place.pairs, place.pair + pair, codes, codes, payload + place.positions);
    }

    // Code `i` of the positions.
    template <class Offset>
    FC_DEVICE uint32_t position(const uint8_t* payload, const Place<Offset>& place, int i) const {
        uint32_t found = 0;
        each_plane(position_bits, place.pairs, [&](auto width, int shift, Offset start) {
            const uint32_t byte = payload[place.positions + start + place.pair * width.value + i * width.value / 8];
            found |= (byte >> (i * width.value & 7) & ((1u << width.value) - 1)) << shift;
        });
        return found;
    }

    // ---- codes ---------------------------------------------------------------------------------------------------

    template <class Offset>
    FC_DEVICE void store_codes(const Octet<T>& octet, int at, int values, const Meta* metas, uint8_t* payload,
                               const Place<Offset>& place) const {
        const int index = block_of(at), begin = place_of(at);
        const Meta meta = metas[index];
        const float levels = (float)((1 << bits) - 1);
        float x[8];
        uint32_t code[8];
        widen<T>(octet, x);
        FC_UNROLL for (int i = 0; i < 8; i++) {
            const float q = (x[i] * meta.prescale - meta.start) * meta.inverse, above = q > 0 ? q : 0.0f;
            const bool is_rest =
                meta.inverse != 0 && 8 * at + i < values && begin + i != meta.low_at && begin + i != meta.high_at;
            code[i] = is_rest ? rounded(above < levels ? above : levels) & 0xFF : 0;
        }
        const Eight codes[1] = {eight_of(code)};
        store_planes<1, Offset>(bits, place.octets, place.octet + at, codes, codes, payload);
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
