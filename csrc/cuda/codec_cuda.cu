// The codecs on CUDA: tiles (codec_kernels.h) where blocks make whole tiles; of uniform blocks the others too, codec.h one
// block or octet a thread.
#include "cuda/codec_kernels.h"

#include <algorithm>

#include "api.h"
#include "cuda/instances.h"
#include "cuda/launch.h"

namespace flashcomm {
namespace {

using namespace FLASHCOMM_ISA;

constexpr int64_t kManyBlocks = 4096;  // of a grid; more only adds launches of blocks
constexpr int64_t kEnoughTiles = 512;  // to occupy a device: smaller tensors are cut into smaller tiles

template <int kBits, class T>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(const __grid_constant__ TensorCodec<kBits, T> codec, const typename T::Word* x, uint8_t* payload) {
    codec.encode(x, payload);
}

// 2: left to itself the compiler spills, on sm_120, to fit a third.
template <int kBits, class T>
__global__ void __launch_bounds__(kThreads, 2)
    decode_sum_kernel(const __grid_constant__ TensorCodec<kBits, T> codec, const __grid_constant__ Payloads payloads,
                      int count, typename T::Word* out) {
    codec.decode_sum(payloads, count, out);
}

template <class Tile, class T>
__global__ void __launch_bounds__(kThreads, 2)
    direct_encode_kernel(const __grid_constant__ DirectCodec<Tile, T> codec, const typename T::Word* x,
                         uint8_t* payload, typename T::Word* residual) {
    codec.encode(x, payload, residual);
}

template <class Tile, class T>
__global__ void __launch_bounds__(kThreads, 2)
    direct_decode_sum_kernel(const __grid_constant__ DirectCodec<Tile, T> codec,
                             const __grid_constant__ Payloads payloads, int count, typename T::Word* out) {
    codec.decode_sum(payloads, count, out);
}

FC_DEVICE int64_t thread_index() { return block_index() * kThreads + thread(); }

template <class T> __global__ void scalar_encode_kernel(const typename T::Word* x, Layout at, uint8_t* payload) {
    const int64_t index = thread_index();
    if (index < at.blocks) encode_block<T>(x, at, index, payload);
    if (index == 0) at.zero_gaps(payload);
}

template <class T>
__global__ void scalar_decode_sum_kernel(const __grid_constant__ Payloads payloads, int count, Layout at,
                                         typename T::Word* out) {
    const int64_t octet = thread_index();
    if (octet < at.octets) decode_octet<T>(payloads.at, count, at, octet, out);
}

Grid a_thread_each(int64_t things, void* stream) { return {ceil_div(things, kThreads), kThreads, 0, stream}; }
Grid a_block_each(int64_t tiles, int shared_bytes, void* stream) {
    return {std::min(tiles, kManyBlocks), kThreads, shared_bytes, stream};
}

template <class T> void encode_launch(const void* from, const Spec& spec, uint8_t* payload, void* stream) {
    const auto* x = (const typename T::Word*)from;
    const int tile = tensor_tile<T>(spec.numel, spec.block, kEnoughTiles);
    const Layout at(spec.numel, spec.bits, spec.block);
    if (tile == 0)
        return launch("encode", scalar_encode_kernel<T>, a_thread_each(at.blocks, stream), x, at, payload);
    with_bits(spec.bits, [&](auto bits) {
        const TensorCodec<bits.value, T> codec(spec.numel, spec.block, tile);
        launch("encode", encode_kernel<bits.value, T>, a_block_each(codec.tiles(), codec.encode_bytes(), stream), codec,
               x, payload);
    });
}

template <class T>
void decode_sum_launch(const Payloads& payloads, int count, const Spec& spec, void* to, void* stream) {
    auto* out = (typename T::Word*)to;
    const int tile = tensor_tile<T>(spec.numel, spec.block, kEnoughTiles);
    const Layout at(spec.numel, spec.bits, spec.block);
    if (tile == 0)
        return launch("decode_sum", scalar_decode_sum_kernel<T>, a_thread_each(at.octets, stream), payloads, count, at,
                      out);
    with_bits(spec.bits, [&](auto bits) {
        const TensorCodec<bits.value, T> codec(spec.numel, spec.block, tile);
        launch("decode_sum", decode_sum_kernel<bits.value, T>,
               a_block_each(codec.tiles(), codec.decode_bytes(), stream), codec, payloads, count, out);
    });
}

// launch(codec) for a format that is coded without a stop; false: it is another, or no whole unit fits a tile.
template <class Launch> bool direct(const Spec& spec, int dtype, bool with_residuals, Launch launch) {
    const Setting with = {spec.format, spec.bits, (int)spec.block};
    bool found = false;
    with_direct(spec.format, dtype, with_residuals, [&](auto tile, auto type) {
        using T = typename decltype(type)::type;
        const DirectCodec<typename decltype(tile)::type, T> codec(with, spec.numel, kEnoughTiles);
        found = codec.tile != 0;
        if (found) launch(codec, type);
    });
    return found;
}

template <class Tile, class T>
void encode_launch(const DirectCodec<Tile, T>& codec, const void* x, uint8_t* payload, void* residual, void* stream) {
    launch("encode", direct_encode_kernel<Tile, T>, a_block_each(codec.tiles(), codec.codec.scratch_bytes(), stream),
           codec, (const typename T::Word*)x, payload, (typename T::Word*)residual);
}

template <class Tile, class T>
void decode_sum_launch(const DirectCodec<Tile, T>& codec, const Payloads& payloads, int count, void* out,
                       void* stream) {
    launch("decode_sum", direct_decode_sum_kernel<Tile, T>, a_thread_each(codec.codec.octets(codec.numel), stream),
           codec, payloads, count, (typename T::Word*)out);
}

}  // namespace

bool has_codec_cuda(int dtype, const Spec& spec) {
    return spec.format == kUniformFormat || direct(spec, dtype, false, [](const auto&, auto) {});
}

void encode_cuda(const void* x, void* residual, int dtype, const Spec& spec, uint8_t* payload, void* stream) {
    if (spec.numel == 0) return;
    direct(spec, dtype, residual, [&](const auto& codec, auto) { encode_launch(codec, x, payload, residual, stream); });
    if (spec.format == kUniformFormat) with_dtype(dtype, [&](auto type) {
        encode_launch<typename decltype(type)::type>(x, spec, payload, stream);
    });
}

void decode_sum_cuda(const uint8_t* const* payloads, int count, const Spec& spec, void* out, int dtype, void* stream) {
    if (spec.numel == 0) return;
    if (count > kMaxPayloads) throw std::runtime_error("flash-comm: decode_sum on CUDA takes at most 64 payloads.");
    Payloads all{};
    std::copy_n(payloads, count, all.at);
    direct(spec, dtype, false, [&](const auto& codec, auto) {
        decode_sum_launch(codec, all, count, out, stream);
    });
    if (spec.format == kUniformFormat) with_dtype(dtype, [&](auto type) {
        decode_sum_launch<typename decltype(type)::type>(all, count, spec, out, stream);
    });
}

}  // namespace flashcomm
