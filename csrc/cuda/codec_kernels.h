// The codec over whole tensors on CUDA, in one launch whatever the number of slices.
//
// A tensor is cut into slices, each with a payload of its own (Cut), and slices into tiles (tile.h): a thread block
// takes tiles of any slice in turn. TensorCodec packs a tile in shared memory and moves its sections to where the
// payload of the slice has them, in 16-byte words, neighbours by neighbouring threads; DirectCodec writes them there at
// once. Both offer
//
//     tile, tiles(), values(t)                    values of a tile; tiles of the slice; values of tile t
//     encode_tile(t, octets, payload, residual)   all threads of the block
//     sum_tile(t, payloads, offset, count, x)     the sums of this thread's octets; all threads of the block
//
// Kernels: encode_slices, decode_slices (or the sum of many payloads of one tensor), and reduce, which decodes, sums,
// rounds and encodes a slice without leaving the registers.
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

// Slices of api.h as kernels take them: slice i holds values i * length .. and its payload lies at i * stride.
struct Cut {
    int64_t numel, length, stride;
    int count;

    FC_INLINE int64_t size(int64_t slice) const {
        const int64_t left = numel - slice * length;
        return left < 0 ? 0 : left < length ? left : length;
    }
    // The slice that is not whole, if one is; those behind it are empty.
    FC_INLINE int64_t short_slice() const { return numel / length; }
    FC_INLINE int64_t short_size() const { return size(short_slice()); }
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

    TensorCodec(Setting with, int64_t numel, int tile) : whole(numel, kBits, with.block), codec(with), tile(tile) {}

    // Shared memory. As little as this block needs, for it bounds how many thread blocks are resident.
    int encode_bytes() const { return codec.bytes(tile) + codec.scratch_bytes(); }
    int decode_bytes() const { return 2 * codec.bytes(tile); }

    FC_DEVICE void resize(const TensorCodec& other) { whole = other.whole; }
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

    FC_DEVICE void encode_tile(int64_t t, const Octet<T> (&octets)[kRows<T>], uint8_t* payload, Word*) const {
        uint8_t* packed = shared_memory();
        const int count = values(t);
        codec.encode(octets, count, packed + codec.bytes(tile), packed);
        const auto at = codec.at(count);
        for (int offset = 16 * thread(); offset < at.bytes; offset += 16 * kThreads)
            *(Vec16*)(payload + place(t, offset, at)) = *(const Vec16*)(packed + offset);
    }
    FC_DEVICE void zero_gaps(uint8_t*) const {}  // a tile's sections end with them

    // The payloads of a tile one after the other through two buffers in shared memory, one read ahead.
    FC_DEVICE void sum_tile(int64_t t, const Payloads& payloads, int64_t offset, int count,
                            float (&total)[kRows<T>][8]) const {
        constexpr int kAhead = (Tile::kMaxBytes + 16 * kThreads - 1) / (16 * kThreads);
        const int lane = thread(), valid = values(t);
        const auto at = codec.at(valid);
        clear(total);
        Vec16 ahead[kAhead];
        auto fetch = [&](int p) {
            FC_UNROLL for (int k = 0; k < kAhead; k++) {
                const int byte = 16 * (k * kThreads + lane);
                if (byte < at.bytes) ahead[k] = *(const Vec16*)(payloads.at[p] + offset + place(t, byte, at));
            }
        };
        fetch(0);
        for (int p = 0; p < count; p++) {
            uint8_t* packed = shared_memory() + (p & 1) * codec.bytes(tile);
            FC_UNROLL for (int k = 0; k < kAhead; k++) {
                const int byte = 16 * (k * kThreads + lane);
                if (byte < at.bytes) *(Vec16*)(packed + byte) = ahead[k];
            }
            if (p + 1 < count) fetch(p + 1);
            sync();  // the buffer written next was read before this barrier
            if (kRows<T> * lane < at.octets) codec.template decode<false>(packed, valid, kRows<T> * lane, 0, total);
        }
        if (count & 1) sync();  // the next tile starts with the buffer that was read last
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

    DirectCodec(Setting with, int64_t numel, int tile)
        : codec(with), numel(numel), tile(tile), whole(codec.template own<int64_t>(numel)) {}

    // The smallest tile of whole units that leaves `enough` tiles or fewer; 0: none fits, or a block exceeds a warp.
    static int tile_of(int64_t numel, int64_t unit, int64_t block, int64_t enough) {
        int tile = 0;
        for (int most = kLeastTile; most <= kTileValues<T> && (!tile || ceil_div(numel, tile) > enough); most *= 2)
            tile = (int)(most / unit * unit);
        return block > 8 * kWarp ? 0 : tile;
    }

    int encode_bytes() const { return codec.scratch_bytes(); }
    int decode_bytes() const { return 0; }
    FC_DEVICE void resize(const DirectCodec& other) { numel = other.numel, whole = other.whole; }
    FC_INLINE int64_t tiles() const { return (numel + tile - 1) / tile; }
    FC_DEVICE int values(int64_t t) const {
        const int64_t left = numel - t * tile;
        return left < tile ? (int)left : tile;
    }

    // `residual`, of the slice, if Tile::kKeepsResiduals: see rotated.h.
    FC_DEVICE void encode_tile(int64_t t, const Octet<T> (&octets)[kRows<T>], uint8_t* payload, Word* residual) const {
        const int64_t first = t * tile;
        const auto place = codec.part(whole, first / 8);
        if constexpr (Tile::kKeepsResiduals)
            codec.template encode_to<false>(octets, values(t), shared_memory(), payload, place, residual + first);
        else codec.template encode_to<false>(octets, values(t), shared_memory(), payload, place);
    }
    FC_DEVICE void zero_gaps(uint8_t* payload) const { codec.zero_gaps(whole, numel, payload); }

    FC_DEVICE void sum_tile(int64_t t, const Payloads& payloads, int64_t offset, int count,
                            float (&x)[kRows<T>][8]) const {
        const int64_t octets = codec.octets(numel), first = t * (tile / 8);
        if (first + kRows<T> * (thread() & ~(kWarp - 1)) >= octets) return;
        const int64_t octet = first + first_octet<T>();
        sum(payloads, offset, count, octet < octets ? octet : 0, x);  // a lane behind the end decodes for nobody
    }

private:
    // Of the octets from `octet` on; payloads lie `offset` bytes behind their addresses. Whole warps.
    FC_DEVICE void sum(const Payloads& payloads, int64_t offset, int count, int64_t octet,
                       float (&x)[kRows<T>][8]) const {
        uint32_t huge = 0, shrunk = 0;
        if (count == 1) {
            huge = codec.template decode_from<true>(payloads.at[0] + offset, whole, octet, 0, x);
            return codec.template finish<true>(x, huge);
        }
        do {
            shrunk = huge;
            clear(x);
            for (int p = 0; p < count; p++)
                huge |= codec.template decode_from<false>(payloads.at[p] + offset, whole, octet, shrunk, x);
        } while (shrunk != huge);
        codec.template finish<false>(x, shrunk);
    }
};

// ---- kernels ---------------------------------------------------------------------------------------------------

// A codec of tensors for the slices of one: for whole ones, and for the last that is not empty.
template <class Codec> struct SlicedCodec {
    Codec whole, last;
    Cut cut;
    int tiles_each;  // tiles of a whole slice

    SlicedCodec(const Codec& whole, const Codec& last, const Cut& cut)
        : whole(whole), last(last), cut(cut), tiles_each((int)whole.tiles()) {}

    FC_INLINE int64_t tiles() const { return (int64_t)tiles_each * cut.count; }  // those of empty slices included
    // A copy, of which only sizes are chosen: what the codec is stays in constant memory. A reference to one of two
    // took 8 instructions a value more.
    FC_DEVICE Codec of(int64_t size) const {
        Codec found = whole;
        if (size < cut.length) found.resize(last);
        return found;
    }

    // visit(codec, slice, t) for every tile of this thread block. Divisions of 64 bits would take 3 instructions a value.
    template <class Visit> FC_DEVICE void each_tile(Visit visit) const {
        int slice = 0;
        for (int t = (int)block_index();; t += (int)block_count()) {
            for (; t >= tiles_each && slice < cut.count; slice++) t -= tiles_each;
            if (slice >= cut.count) return;
            const int64_t size = cut.size(slice);
            if ((int64_t)t * whole.tile < size) visit(of(size), (int64_t)slice, (int64_t)t);
        }
    }
};

template <class Codec, class T>
FC_DEVICE void encode_slices(const SlicedCodec<Codec>& codec, const typename T::Word* x, uint8_t* payloads,
                             typename T::Word* residual, int64_t residual_numel) {
    codec.each_tile([&](const Codec& of, int64_t slice, int64_t t) {
        Octet<T> octets[kRows<T>];
        load<T>(x + slice * codec.cut.length + t * of.tile, of.values(t), octets);
        uint8_t* payload = payloads + slice * codec.cut.stride;
        of.encode_tile(t, octets, payload, residual ? residual + slice * residual_numel : nullptr);
        if (t == 0 && thread() == 0) of.zero_gaps(payload);
    });
}

template <class Codec, class T>
FC_DEVICE void decode_slices(const SlicedCodec<Codec>& codec, const Payloads& payloads, int count,
                             typename T::Word* out) {
    codec.each_tile([&](const Codec& of, int64_t slice, int64_t t) {
        auto* to = out + slice * codec.cut.length + t * of.tile;
        float x[kRows<T>][8];
        Octet<T> octets[kRows<T>];
        of.sum_tile(t, payloads, slice * codec.cut.stride, count, x);
        narrow<T>(x, octets);
        store<T>(to, of.values(t), octets);
    });
}

// Sums payloads of one slice into `out`, and encodes what `out` then holds. Both codecs have the same tiles.
template <class From, class Gather, class T>
FC_DEVICE void reduce(const From& from, const Gather& gather, const Payloads& payloads, int count,
                      typename T::Word* out, uint8_t* payload, typename T::Word* residual) {
    for (int64_t t = block_index(); t < from.tiles(); t += block_count()) {
        const int valid = from.values(t);
        Octet<T> octets[kRows<T>];
        float x[kRows<T>][8];
        from.sum_tile(t, payloads, 0, count, x);
        narrow<T>(x, octets);
        store<T>(out + t * from.tile, valid, octets);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++)
            repeat_last<T>(octets[row], valid - 8 * (first_octet<T>() + row));
        sync();  // all have decoded: what encoding needs takes the place of payloads
        gather.encode_tile(t, octets, payload, residual);
        if (t == 0 && thread() == 0) gather.zero_gaps(payload);
        sync();
    }
}

}  // namespace flashcomm::FLASHCOMM_ISA
