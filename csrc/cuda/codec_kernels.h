// The codec over a whole tensor on CUDA: tiles of tile.h, with the sections of every tile moved to where the payload of
// the tensor has them. All memory traffic is in 16-byte words, neighbours by neighbouring threads.
#pragma once

#include "api.h"
#include "cuda/rotated_tile.h"
#include "cuda/shape.h"
#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

constexpr int kMaxPayloads = 64;

struct Payloads {
    const uint8_t* at[kMaxPayloads];
};

// Values of a tile whose sections all are whole 16-byte words, at most `most`; 0 if the block is too odd for that.
inline int whole_tile(int64_t block, int most) {
    const int64_t unit = common_multiple(128, 8 * block);
    return (int)(most / unit * unit);
}

// The smallest tile that leaves `enough` tiles or fewer, as in shape_of().
template <class T> int tensor_tile(int64_t numel, int64_t block, int64_t enough) {
    for (int most = kLeastTile; most < kTileValues<T>; most *= 2) {
        const int values = whole_tile(block, most);
        if (values && ceil_div(numel, values) <= enough) return values;
    }
    return whole_tile(block, kTileValues<T>);
}

template <int kBits, class T> struct TensorCodec {
    using Word = typename T::Word;
    using Tile = UniformTile<kBits, T>;

    Layout whole;
    Tile codec;
    int tile;  // values

    TensorCodec(int64_t numel, int64_t block, int tile) : whole(numel, kBits, block), codec({kUniformFormat, kBits, (int)block}), tile(tile) {}

    // Shared memory. As little as this block needs, for it bounds how many thread blocks are resident.
    int encode_bytes() const { return codec.bytes(tile) + codec.scratch_bytes(); }
    int decode_bytes() const { return 2 * codec.bytes(tile); }

    FC_INLINE int64_t tiles() const { return (whole.numel + tile - 1) / tile; }
    FC_DEVICE int values(int64_t t) const {
        const int64_t left = whole.numel - t * tile;
        return left < tile ? (int)left : tile;
    }

    // Where byte `offset` of the payload of tile t lies in the payload of the tensor.
    FC_DEVICE int64_t place(int64_t t, int offset, const typename Tile::At& at) const {
        const int64_t metadata = t * (tile / (8 * codec.octets_per_block)) * 2;
        if (offset >= at.minima) return whole.minima + metadata + offset - at.minima;
        if (offset >= at.scales) return whole.scales + metadata + offset - at.scales;
        int64_t found = 0, start = 0;
        each_plane(kBits, at.octets, [&](auto width, int, int begin) {
            if (offset >= begin) found = start + t * (tile / 8) * width.value + offset - begin;
            start += Layout::padded(whole.octets * width.value);
        });
        return found;
    }

    FC_DEVICE void encode(const Word* x, uint8_t* payload) const {
        uint8_t* packed = shared_memory();
        const int lane = thread();
        for (int64_t t = block_index(); t < tiles(); t += block_count()) {
            const int count = values(t);
            Octet<T> octets[kRows<T>];
            load<T>(x + t * tile, count, octets);
            codec.encode(octets, count, packed + codec.bytes(tile), packed);
            const auto at = codec.at(count);
            for (int offset = 16 * lane; offset < at.bytes; offset += 16 * kThreads)
                *(Vec16*)(payload + place(t, offset, at)) = *(const Vec16*)(packed + offset);
        }
    }

    FC_DEVICE void decode_sum(const Payloads& payloads, int count, Word* out) const {
        constexpr int kAhead = (Tile::kMaxBytes + 16 * kThreads - 1) / (16 * kThreads);
        int turn = 0;
        const int lane = thread();
        for (int64_t t = block_index(); t < tiles(); t += block_count()) {
            const int valid = values(t);
            const auto at = codec.at(valid);
            float total[kRows<T>][8];
            Octet<T> octets[kRows<T>];
            clear(total);
            Vec16 ahead[kAhead];
            auto fetch = [&](int p) {
                FC_UNROLL for (int k = 0; k < kAhead; k++) {
                    const int offset = 16 * (k * kThreads + lane);
                    if (offset < at.bytes) ahead[k] = *(const Vec16*)(payloads.at[p] + place(t, offset, at));
                }
            };
            fetch(0);
            for (int p = 0; p < count; p++, turn ^= 1) {
                uint8_t* packed = shared_memory() + turn * codec.bytes(tile);
                FC_UNROLL for (int k = 0; k < kAhead; k++) {
                    const int offset = 16 * (k * kThreads + lane);
                    if (offset < at.bytes) *(Vec16*)(packed + offset) = ahead[k];
                }
                if (p + 1 < count) fetch(p + 1);
                sync();  // the buffer written next was read before this barrier
                if (kRows<T> * lane < at.octets)
                    codec.template decode<false>(packed, valid, kRows<T> * lane, 0, total);
            }
            narrow<T>(total, octets);
            store<T>(out + t * tile, valid, octets);
        }
    }
};

// A codec whose tiles are written and read where the payload of the tensor has them (Tile::part), without a stop in
// shared memory: its neighbouring threads have neighbouring bytes of every plane, so that whole sectors are moved.
template <class Tile, class T> struct DirectCodec {
    using Word = typename T::Word;

    Tile codec;
    int64_t numel;
    int tile;  // values; 0: no whole unit fits
    typename Tile::template Place<int64_t> whole;

    DirectCodec(Setting with, int64_t numel, int64_t enough)
        : codec(with), numel(numel), tile(0), whole(codec.template own<int64_t>(numel)) {
        for (int most = kLeastTile; most <= kTileValues<T> && (!tile || tiles() > enough); most *= 2)
            tile = most / codec.unit() * codec.unit();
        if (codec.block() > 8 * kWarp) tile = 0;  // nor can a warp rotate it
    }

    FC_INLINE int64_t tiles() const { return (numel + tile - 1) / tile; }

    // `residual`, if Tile::kKeepsResiduals: see rotated.h.
    FC_DEVICE void encode(const Word* x, uint8_t* payload, Word* residual) const {
        for (int64_t t = block_index(); t < tiles(); t += block_count()) {
            const int64_t first = t * tile, left = numel - first;
            const int count = (int)(left < tile ? left : tile);
            Octet<T> octets[kRows<T>];
            load<T>(x + first, count, octets);
            const auto place = codec.part(whole, first / 8);
            if constexpr (Tile::kKeepsResiduals)
                codec.template encode_to<false>(octets, count, shared_memory(), payload, place, residual + first);
            else codec.template encode_to<false>(octets, count, shared_memory(), payload, place);
        }
        if (block_index() == 0 && thread() == 0) codec.zero_gaps(whole, numel, payload);
    }

    FC_DEVICE void decode_sum(const Payloads& payloads, int count, Word* out) const {
        const int64_t stride = (int64_t)kThreads * kRows<T>, octets = codec.octets(numel);
        for (int64_t first = block_index() * stride; first < octets; first += block_count() * stride) {
            const int64_t octet = first + first_octet<T>();
            if (first + first_octet_of_warp() >= octets) continue;
            float x[kRows<T>][8];
            sum(payloads, count, octet < octets ? octet : 0, x);  // a lane behind the end decodes something, for nobody
            Octet<T> rounded[kRows<T>];
            narrow<T>(x, rounded);
            const int64_t left = numel - 8 * first;
            store<T>(out + 8 * first, (int)(left < 8 * stride ? left : 8 * stride), rounded);
        }
    }

private:
    static FC_DEVICE int first_octet_of_warp() { return kRows<T> * (thread() & ~(kWarp - 1)); }

    // Of the octets of this thread. Whole warps.
    FC_DEVICE void sum(const Payloads& payloads, int count, int64_t octet, float (&x)[kRows<T>][8]) const {
        uint32_t huge = 0, shrunk = 0;
        if (count == 1) {
            huge = codec.template decode_from<true>(payloads.at[0], whole, octet, 0, x);
            return codec.template finish<true>(x, huge);
        }
        do {
            shrunk = huge;
            clear(x);
            for (int p = 0; p < count; p++)
                huge |= codec.template decode_from<false>(payloads.at[p], whole, octet, shrunk, x);
        } while (shrunk != huge);
        codec.template finish<false>(x, shrunk);
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
