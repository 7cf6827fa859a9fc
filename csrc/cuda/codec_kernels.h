// The codec over whole tensors on CUDA, in one launch whatever the number of slices.
//
// A tensor is cut into slices, each with a payload of its own (Cut), and slices into tiles (tile.h): a thread block
// takes tiles of any slice in turn, and writes and reads them where the payload of the slice has them.
//
// Kernels: encode_slices, decode_slices (or the sum of many payloads of one tensor), and reduce, which decodes, sums,
// rounds and encodes a slice without leaving the registers.
#pragma once

#include "api.h"
#include "cuda/rotated_tile.h"
#include "cuda/shape.h"
#include "cuda/tile.h"
#include "cuda/uniform_tile.h"

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
    FC_INLINE int short_slice() const { return (int)(numel / length); }
    FC_INLINE int64_t short_size() const { return size(short_slice()); }
    FC_INLINE int filled() const { return (int)((numel + length - 1) / length); }  // slices that are not empty
};

// The values of a thread in a tile: those of its octets in x[first .. first + values), as if the tile began at `first`.
struct Extent {
    int64_t first;
    int values;
};

// The sum of a thread's octets, from `octet` of `place` on; payloads lie `offset` bytes behind their addresses. Whole
// warps.
template <class T, class Tile, class Place>
FC_DEVICE void sum_octets(const Tile& codec, const Payloads& payloads, int64_t offset, int count, const Place& place,
                          int octet, float (&x)[kRows<T>][8]) {
    codec.with_blocks([&](const auto& blocks) {
        uint32_t huge = 0, shrunk = 0;
        if (count == 1) {
            huge = blocks.template decode_from<true>(payloads.at[0] + offset, place, octet, 0, x);
            return blocks.template finish<true>(x, huge);
        }
        do {
            shrunk = huge;
            clear(x);
            for (int p = 0; p < count; p++)
                huge |= blocks.template decode_from<false>(payloads.at[p] + offset, place, octet, shrunk, x);
        } while (shrunk != huge);
        blocks.template finish<false>(x, shrunk);
        Bounds<T> bounds;
        for (int p = 0; kIsHalf<T> && p < count; p++) bounds.add(blocks, payloads.at[p] + offset, place, octet);
        bounds.apply(x);
    });
}

// A tensor's codec, made of that of tiles. Tiles are written and read where the payload of the tensor has them
// (Tile::part), without a stop in shared memory: neighbouring threads have neighbouring bytes of every plane, so that
// whole sectors are moved.
template <class Tile, class T> struct TensorCodec {
    using Word = typename T::Word;

    Tile codec;
    int tile, blocks;  // values and blocks of a tile
    int64_t numel;
    int tiles, rest;  // of the tensor; values of its last tile
    typename Tile::template Place<int64_t> whole;

    TensorCodec(Setting with, int64_t numel, int tile)
        : codec(with), tile(tile), blocks(tile / codec.block()), numel(numel), tiles((int)ceil_div(numel, tile)),
          rest((int)(numel - (int64_t)(tiles - 1) * tile)), whole(codec.template own<int64_t>(numel)) {}

    // The smallest tile of whole units, also of another codec's, and of whole threads' values, that leaves `enough`
    // tiles or fewer; 0: none fits.
    static int tile_of(Setting with, int64_t numel, int64_t other_unit, int64_t enough) {
        const int64_t unit = common_multiple(common_multiple(Tile(with).unit(), other_unit), 8 * kRows<T>);
        int tile = 0;
        for (int most = kLeastTile; most <= kTileValues<T> && (!tile || ceil_div(numel, tile) > enough); most *= 2)
            tile = (int)(most / unit * unit);
        return with.block > Tile::kLargestBlock ? 0 : tile;
    }

    // The same codec, of another tensor.
    FC_DEVICE void resize(const TensorCodec& other) {
        numel = other.numel, tiles = other.tiles, rest = other.rest, whole = other.whole;
    }
    FC_DEVICE int values(int t) const { return t + 1 < tiles ? tile : rest; }
    FC_DEVICE Extent extent(int t) const { return {product(t, tile), values(t)}; }
    FC_DEVICE typename Tile::template Place<int64_t> place(int t) const {
        return codec.part(whole, product(t, tile / 8), product(t, blocks));
    }

    // `residual`, of the slice, if Tile::kKeepsResiduals: see rotated.h.
    FC_DEVICE void encode_tile(int t, const Octet<T> (&octets)[kRows<T>], uint8_t* payload, Word* residual) const {
        codec.with_blocks([&](const auto& blocks) {
            blocks.template encode_to<false>(octets, values(t), shared_memory(), payload, place(t),
                                             Tile::kKeepsResiduals ? residual + product(t, tile) : nullptr);
        });
    }
    FC_DEVICE void zero_gaps(uint8_t* payload) const { codec.zero_gaps(whole, numel, payload); }

    FC_DEVICE void sum_tile(int t, const Payloads& payloads, int64_t offset, int count, float (&x)[kRows<T>][8]) const {
        const int octets = codec.octets(values(t)), octet = first_octet<T>();
        if (kRows<T> * (thread() & ~(kWarp - 1)) >= octets) return;
        // a lane behind the end: for nobody
        sum_octets<T>(codec, payloads, offset, count, place(t), octet < octets ? octet : 0, x);
    }
};

// ---- kernels ---------------------------------------------------------------------------------------------------

// A codec of tensors for the slices of one: for whole ones, and for the last that is not empty.
template <class Codec> struct SlicedCodec {
    Codec whole, last;
    Cut cut;
    int filled, short_slice;

    SlicedCodec(const Codec& whole, const Codec& last, const Cut& cut)
        : whole(whole), last(last), cut(cut), filled(cut.filled()), short_slice(cut.short_slice()) {}

    int64_t tiles() const { return (int64_t)whole.tiles * filled; }  // or fewer
    // visit(codec, slice, its first value, where its payload begins, t) for every slice: its tiles from t on, in steps of
    // the grid, are this thread block's; visit() takes t beyond them.
    template <class Visit> FC_DEVICE void each_slice(Visit visit) const {
        int t = (int)block_index();
        int64_t first = 0, payload = 0;
        Codec codec = whole;  // a copy, of which only sizes change: what the codec is stays in constant memory
        for (int slice = 0; slice < filled; slice++, first += cut.length, payload += cut.stride) {
            if (slice == short_slice) codec.resize(last);
            visit(codec, slice, first, payload, t);
            t -= codec.tiles;
        }
    }
};

template <class Codec, class T>
FC_DEVICE void encode_slices(const SlicedCodec<Codec>& codec, const typename T::Word* x, uint8_t* payloads,
                             typename T::Word* residual, int64_t residual_numel) {
    codec.each_slice([&](const Codec& of, int slice, int64_t first, int64_t payload, int& t) {
        if (t == 0 && thread() == 0) of.zero_gaps(payloads + payload);
        auto* lost = residual ? residual + slice * residual_numel : nullptr;
        for (; t < of.tiles; t += (int)block_count()) {
            Octet<T> octets[kRows<T>];
            const Extent at = of.extent(t);
            load<T>(x + first + at.first, at.values, octets);
            of.encode_tile(t, octets, payloads + payload, lost);
        }
    });
}

template <class Codec, class T>
FC_DEVICE void decode_slices(const SlicedCodec<Codec>& codec, const Payloads& payloads, int count,
                             typename T::Word* out) {
    codec.each_slice([&](const Codec& of, int, int64_t first, int64_t payload, int& t) {
        for (; t < of.tiles; t += (int)block_count()) {
            float x[kRows<T>][8];
            Octet<T> octets[kRows<T>];
            of.sum_tile(t, payloads, payload, count, x);
            narrow<T>(x, octets);
            const Extent at = of.extent(t);
            store<T>(out + first + at.first, at.values, octets);
        }
    });
}

// Sums payloads of one slice into `out`, and encodes what `out` then holds. Both codecs have the same tiles.
template <class From, class Gather, class T>
FC_DEVICE void reduce(const From& from, const Gather& gather, const Payloads& payloads, int count,
                      typename T::Word* out, uint8_t* payload, typename T::Word* residual) {
    for (int t = (int)block_index(); t < from.tiles; t += (int)block_count()) {
        const Extent at = from.extent(t);
        Octet<T> octets[kRows<T>];
        float x[kRows<T>][8];
        from.sum_tile(t, payloads, 0, count, x);
        narrow<T>(x, octets);
        store<T>(out + at.first, at.values, octets);
        FC_UNROLL for (int row = 0; row < kRows<T>; row++)
            repeat_last<T>(octets[row], at.values - 8 * (first_octet<T>() + row));
        sync();  // all have decoded: what encoding needs takes the place of payloads
        gather.encode_tile(t, octets, payload, residual);
        if (t == 0 && thread() == 0) gather.zero_gaps(payload);
        sync();
    }
}

}  // namespace flashcomm::FLASHCOMM_ISA
