// The codec on CUDA for one part (instances.h), all slices of a tensor in one launch: tiles (codec_kernels.h) where
// blocks make whole tiles; of uniform blocks the others too, codec.h one block or octet a thread.
#include "cuda/codec_part.h"

#include <algorithm>

#include "cuda/instances.h"
#include "cuda/launch.h"
#include "cuda/rowed_codec.h"

namespace flashcomm {

using namespace FLASHCOMM_ISA;

namespace {

constexpr int64_t kManyBlocks = 4096;  // of a grid; more only adds launches of blocks
constexpr int64_t kEnoughTiles = 512;  // to occupy a device: smaller tensors are cut into smaller tiles

// 2 blocks a multiprocessor: left to itself the compiler spills, on sm_120, to fit a third.
template <class Codec, class T>
__global__ void __launch_bounds__(kThreads, 2)
    encode_kernel(const __grid_constant__ SlicedCodec<Codec> codec, const typename T::Word* x, uint8_t* payloads,
                  typename T::Word* residual, int64_t residual_numel) {
    encode_slices<Codec, T>(codec, x, payloads, residual, residual_numel);
}

template <class Codec, class T>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const __grid_constant__ SlicedCodec<Codec> codec, const __grid_constant__ Payloads payloads,
                  int count, typename T::Word* out) {
    decode_slices<Codec, T>(codec, payloads, count, out);
}

// ---- uniform blocks that make no whole tiles -------------------------------------------------------------------

struct SlicedLayout {
    Layout whole, last;
    Cut cut;

    FC_INLINE const Layout& of(int64_t slice) const { return slice == cut.short_slice() ? last : whole; }
};

[[maybe_unused]] FC_DEVICE int64_t thread_index() { return block_index() * kThreads + thread(); }

template <class T>
__global__ void scalar_encode_kernel(const typename T::Word* x, const __grid_constant__ SlicedLayout at,
                                     uint8_t* payloads) {
    const int64_t slice = thread_index() / at.whole.blocks, index = thread_index() - slice * at.whole.blocks;
    if (slice >= at.cut.count || index * at.whole.block >= at.cut.size(slice)) return;
    const Layout& layout = at.of(slice);
    uint8_t* payload = payloads + slice * at.cut.stride;
    encode_block<T>(x + slice * at.cut.length, layout, index, payload);
    if (index == 0) layout.zero_gaps(payload);
}

template <class T>
__global__ void scalar_decode_kernel(const __grid_constant__ Payloads payloads, int count,
                                     const __grid_constant__ SlicedLayout at, typename T::Word* out) {
    const int64_t slice = thread_index() / at.whole.octets, octet = thread_index() - slice * at.whole.octets;
    if (slice >= at.cut.count || 8 * octet >= at.cut.size(slice)) return;
    decode_octet<T>(payloads.at, count, at.of(slice), octet, out + slice * at.cut.length, slice * at.cut.stride);
}

template <class From, class Gather, class T>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(const __grid_constant__ From from, const __grid_constant__ Gather gather,
                  const __grid_constant__ Payloads payloads, int count, typename T::Word* out, uint8_t* payload,
                  typename T::Word* residual) {
    reduce<From, Gather, T>(from, gather, payloads, count, out, payload, residual);
}

// ---- which codec, how large a grid -----------------------------------------------------------------------------

Grid a_thread_each(int64_t things, void* stream) { return {ceil_div(things, kThreads), kThreads, 0, stream}; }
Grid a_block_each(int64_t tiles, int shared_bytes, void* stream) {
    return {std::min(tiles, kManyBlocks), kThreads, shared_bytes, stream};
}

Setting setting(const Spec& spec) { return {spec.format, spec.bits, (int)spec.block}; }
Setting setting(const Slices& slices) { return {slices.format, slices.bits, (int)slices.block}; }
Cut cut_of(const Slices& slices) { return {slices.numel, slices.length, slices.stride, (int)slices.count}; }

// The sizes of whole slices and of the last; where all are whole, the last is not used.
int64_t whole_size(const Cut& cut) { return std::min(cut.length, cut.numel); }
int64_t last_size(const Cut& cut) { return cut.short_size() ? cut.short_size() : whole_size(cut); }

// Values of a tile of whole units, also of another codec's; 0: none. `numel`: as tiles count them.
template <class T, bool kUniform> int tile_of(const Setting& with, int64_t numel, int64_t other_unit = 1) {
    int tile = 0;
    with_tile<T, kUniform>(with, false, [&](auto codec) {
        tile = TensorCodec<typename decltype(codec)::type, T>::tile_of(with, numel, other_unit, kEnoughTiles);
    });
    return tile;
}

template <class T, bool kUniform> int64_t unit_of(const Setting& with) {
    int64_t unit = 1;
    with_tile<T, kUniform>(with, false, [&](auto codec) { unit = typename decltype(codec)::type(with).unit(); });
    return unit;
}

// Rows of a tensor as tiles count them (rowed_codec.h); padded 0: as one row.
struct Counted {
    int64_t padded, numel;
};
template <class T, bool kUniform> Counted counted(const Spec& of, int64_t other_unit = 1) {
    const Rows rows(of.numel, of.width, of.block);
    if (of.format != kRotatedFormat || rows.is_flat(kSuperBlock)) return {0, of.numel};
    const int64_t unit = common_multiple(unit_of<T, kUniform>(setting(of)), other_unit);
    const int64_t padded = ceil_div(rows.width, unit) * unit;
    return {padded, rows.count * padded};
}
Spec spec_of(const Slices& slices) {
    return {slices.format, slices.bits, slices.block, whole_size(cut_of(slices)), slices.width};
}

// Values of a tile of slices, 0: none; and `padded` as above.
struct Tiles {
    int tile;
    int64_t padded;
};
template <class T, bool kUniform> Tiles tiles_of(const Slices& slices) {
    const int64_t padded = counted<T, kUniform>(spec_of(slices)).padded;
    const int64_t numel = padded ? slices.numel / slices.width * padded : slices.numel;
    return {tile_of<T, kUniform>(setting(slices), numel), padded};
}

// visit(sliced codec) where blocks make whole tiles.
template <class T, bool kUniform, class Visit>
void with_sliced(const Slices& slices, bool with_residuals, const Tiles& tiles, Visit visit) {
    const Cut cut = cut_of(slices);
    const Setting with = setting(slices);
    const int tile = tiles.tile;
    const int64_t padded = tiles.padded;
    with_tile<T, kUniform>(with, with_residuals, [&](auto codec) {
        using Tile = typename decltype(codec)::type;
        if constexpr (Tile::kRotates)
            if (padded) {
                using Codec = RowedCodec<Tile, T>;
                return visit(SlicedCodec<Codec>{Codec(with, whole_size(cut), slices.width, padded, tile),
                                                Codec(with, last_size(cut), slices.width, padded, tile), cut});
            }
        using Codec = TensorCodec<Tile, T>;
        visit(SlicedCodec<Codec>{Codec(with, whole_size(cut), tile), Codec(with, last_size(cut), tile), cut});
    });
}

SlicedLayout layout_of(const Slices& slices) {
    const Cut cut = cut_of(slices);
    return {Layout(whole_size(cut), slices.bits, slices.block), Layout(last_size(cut), slices.bits, slices.block), cut};
}

// Numbers of the residual of a whole slice.
int64_t residual_numel(const Slices& slices) {
    return slices.format == kRotatedFormat ? FLASHCOMM_ISA::residual_numel(slices.length, slices.width, slices.block)
                                           : 0;
}

}  // namespace

template <class T, bool kUniform> bool CodecPart<T, kUniform>::has(const Spec& spec) {
    const Counted rows = counted<T, kUniform>(spec);
    const bool fits = !rows.padded || RowedCodec<RotatedTile<T>, T>::fits(spec.numel, rows.numel);
    return kUniform || (fits && tile_of<T, kUniform>(setting(spec), rows.numel) != 0);
}

template <class T, bool kUniform>
void CodecPart<T, kUniform>::encode(const void* from, void* residual, const Slices& slices, uint8_t* payloads,
                                    void* stream) {
    const auto* x = (const typename T::Word*)from;
    const Tiles tiles = tiles_of<T, kUniform>(slices);
    if (tiles.tile)
        with_sliced<T, kUniform>(slices, residual, tiles, [&](const auto& codec) {
            using Codec = std::decay_t<decltype(codec.whole)>;
            const Grid grid = a_block_each(codec.tiles(), codec.whole.codec.scratch_bytes(), stream);
            launch("encode", encode_kernel<Codec, T>, grid, codec, x, payloads, (typename T::Word*)residual,
                   residual_numel(slices));
        });
    else if constexpr (kUniform) {
        const SlicedLayout at = layout_of(slices);
        launch("encode", scalar_encode_kernel<T>, a_thread_each(at.whole.blocks * slices.count, stream), x, at,
               payloads);
    }
}

template <class T, bool kUniform>
void CodecPart<T, kUniform>::decode(const Payloads& payloads, int count, const Slices& slices, void* to, void* stream) {
    auto* x = (typename T::Word*)to;
    const Tiles tiles = tiles_of<T, kUniform>(slices);
    if (tiles.tile)
        with_sliced<T, kUniform>(slices, false, tiles, [&](const auto& codec) {
            using Codec = std::decay_t<decltype(codec.whole)>;
            if constexpr (!decltype(codec.whole.codec)::kKeepsResiduals) {  // they decode as those without
                const Grid grid = a_block_each(codec.tiles(), 0, stream);
                launch("decode", decode_kernel<Codec, T>, grid, codec, payloads, count, x);
            }
        });
    else if constexpr (kUniform) {
        const SlicedLayout at = layout_of(slices);
        launch("decode", scalar_decode_kernel<T>, a_thread_each(at.whole.octets * slices.count, stream), payloads,
               count, at, x);
    }
}

template <class T, bool kUniform>
bool CodecPart<T, kUniform>::reduce(const Payloads& payloads, int count, const Spec& from, void* out,
                                    const Spec& gather, uint8_t* payload, void* residual, void* stream) {
    const Setting first = setting(from), second = setting(gather);
    if (first.bits == kExactBits || first.format != second.format) return false;
    Counted rows = counted<T, kUniform>(from, unit_of<T, kUniform>(second));
    const Counted others = counted<T, kUniform>(gather, unit_of<T, kUniform>(first));
    if (others.padded) rows = others;  // where one leg's super-blocks are cut short, both count rows alike
    const int tile = tile_of<T, kUniform>(first, rows.numel, unit_of<T, kUniform>(second));
    if (tile == 0) return false;
    return with_legs_of<T, kUniform>(first, second, residual, [&](auto one, auto other) {
        using One = typename decltype(one)::type;
        using Other = typename decltype(other)::type;
        const auto run = [&](const auto& decodes, const auto& encodes) {
            using From = std::decay_t<decltype(decodes)>;
            using Gather = std::decay_t<decltype(encodes)>;
            launch("reduce", reduce_kernel<From, Gather, T>,
                   a_block_each(decodes.tiles, encodes.codec.scratch_bytes(), stream), decodes, encodes, payloads,
                   count, (typename T::Word*)out, payload, (typename T::Word*)residual);
        };
        if constexpr (One::kRotates)
            if (rows.padded)
                return run(RowedCodec<One, T>(first, from.numel, from.width, rows.padded, tile),
                           RowedCodec<Other, T>(second, from.numel, from.width, rows.padded, tile));
        if constexpr (!std::is_same_v<One, ExactTile<T>>)
            run(TensorCodec<One, T>(first, from.numel, tile), TensorCodec<Other, T>(second, from.numel, tile));
    });
}

template struct CodecPart<FLASHCOMM_PART_TYPE, FLASHCOMM_PART_UNIFORM>;

}  // namespace flashcomm
