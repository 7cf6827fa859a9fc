// The kernels that tests/gpu/test_sass.py interprets, of one number type (-DTYPE=BFloat16), and, compiled for the host,
// their parameters as the host code makes them: the machine code and the bytes it is given come from the same structs.
//
// nvcc: -DCODECS=2 all codecs, 1 those of flash-v1's 4 bits and of auto; -DLEGS=rotated the collectives with such legs.
#include "cuda/codec_kernels.h"
#include "cuda/collectives.h"
#include "cuda/instances.h"
#include "cuda/rowed_codec.h"

#include <stddef.h>
#include <string.h>

#include <algorithm>

using namespace flashcomm;
using namespace flashcomm::FLASHCOMM_ISA;

template <class Codec, class Word> struct Encode {
    SlicedCodec<Codec> codec;
    const Word* x;
    uint8_t* payload;
    Word* residual;
    int64_t residual_numel;
};
template <class Codec, class Word> struct Decode {
    SlicedCodec<Codec> codec;
    Payloads payloads;
    int count;
    Word* out;
};
template <int kBits, class T> using Uniform = TensorCodec<UniformTile<kBits, T>, T>;
template <class T> using Rotated = TensorCodec<RotatedTile<T>, T>;
template <class T> using Rowed = RowedCodec<RotatedTile<T>, T>;
template <class T> using Carrying = TensorCodec<RotatedTile<T, true>, T>;
template <class T> using Spike = TensorCodec<SpikeTile<T>, T>;

#if defined(__CUDACC__)

using T = TYPE;
using Word = T::Word;

#define ENCODE(name, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                         \
        encode_##name(const __grid_constant__ Encode<__VA_ARGS__, Word> call) {                       \
        encode_slices<__VA_ARGS__, T>(call.codec, call.x, call.payload, call.residual, call.residual_numel); \
    }
#define DECODE(name, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                                         \
        decode_##name(const __grid_constant__ Decode<__VA_ARGS__, Word> call) {                       \
        decode_slices<__VA_ARGS__, T>(call.codec, call.payloads, call.count, call.out);               \
    }

#if defined(CODECS)
#define UNIFORM(bits) ENCODE(uniform##bits, Uniform<bits, T>) DECODE(uniform##bits, Uniform<bits, T>)
#if CODECS == 1  // flash-v1 and auto alone
UNIFORM(4)
#else
UNIFORM(4) UNIFORM(8)
ENCODE(carrying, Carrying<T>)
ENCODE(spike, Spike<T>)
DECODE(spike, Spike<T>)
ENCODE(rowed, Rowed<T>)
DECODE(rowed, Rowed<T>)
#endif
ENCODE(rotated, Rotated<T>)
DECODE(rotated, Rotated<T>)
#endif

#if defined(LEGS)
namespace legs {
using uniform4 = UniformTile<4, T>;
using rotated = RotatedTile<T>;
using carrying = RotatedTile<T, true>;
using spike = SpikeTile<T>;
using exact = ExactTile<T>;
}  // namespace legs
extern "C" __global__ void __launch_bounds__(kThreads, 2) collective_legs(const __grid_constant__ Call call) {
    Worker<legs::LEGS, legs::LEGS, T>::hire(call).run();
}
#endif

#else

namespace {

struct Launch {  // as kernels.py reads it
    int blocks, shared, bytes;
    uint8_t parameters[2048];
};

template <class Parameters> void fill(Launch* launch, const Parameters& parameters, int64_t blocks, int shared) {
    static_assert(sizeof parameters <= sizeof launch->parameters);
    launch->blocks = (int)blocks, launch->shared = shared, launch->bytes = (int)sizeof parameters;
    memcpy(launch->parameters, (const void*)&parameters, sizeof parameters);
}

// visit(sliced codec of a tensor in one slice, number type); `enough`: tiles beyond which tiles become larger; `width`:
// of rows that end inside a super-block, else 0
template <class Visit>
bool with_codec(const Setting& with, int dtype, bool carries, int64_t numel, int64_t width, int64_t enough,
                Visit visit) {
    bool found = false;
    with_dtype(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (width) {
            const int64_t unit = RotatedTile<T>(with).unit(), padded = ceil_div(width, unit) * unit;
            const int tile = TensorCodec<RotatedTile<T>, T>::tile_of(with, numel / width * padded, 1, enough);
            const Rowed<T> of(with, numel, width, padded, tile);
            found = true;
            return visit(SlicedCodec<Rowed<T>>{of, of, {numel, numel, 0, 1}}, type);
        }
        const auto make = [&](auto codec) {
            using Codec = TensorCodec<typename decltype(codec)::type, T>;
            const int tile = Codec::tile_of(with, numel, 1, enough);
            found = tile != 0;
            if (!found) return;
            const Codec of(with, numel, tile);
            visit(SlicedCodec<Codec>{of, of, {numel, numel, 0, 1}}, type);
        };
        if (with.format == kUniformFormat) with_tile<T, true>(with, carries, make);
        else with_tile<T, false>(with, carries, make);
    });
    return found;
}

}  // namespace

extern "C" {

bool encode_launch(const Setting* with, int dtype, int64_t numel, int64_t width, int64_t enough, int64_t most_blocks, uint64_t x,
                   uint64_t payload, uint64_t residual, Launch* launch) {
    return with_codec(*with, dtype, residual, numel, width, enough, [&](const auto& codec, auto type) {
        using Word = typename decltype(type)::type::Word;
        using Codec = std::decay_t<decltype(codec.whole)>;
        const Encode<Codec, Word> call = {codec, (Word*)x, (uint8_t*)payload, (Word*)residual, 0};
        fill(launch, call, std::min(codec.tiles(), most_blocks), codec.whole.codec.scratch_bytes());
    });
}

bool decode_launch(const Setting* with, int dtype, int64_t numel, int64_t width, int64_t enough, int64_t most_blocks,
                   const uint64_t* payloads, int count, uint64_t out, Launch* launch) {
    return with_codec(*with, dtype, false, numel, width, enough, [&](const auto& codec, auto type) {
        using Word = typename decltype(type)::type::Word;
        using Codec = std::decay_t<decltype(codec.whole)>;
        Decode<Codec, Word> call = {codec, {}, count, (Word*)out};
        memcpy((void*)&call.payloads, payloads, 8 * count);
        fill(launch, call, std::min(codec.tiles(), most_blocks), 0);
    });
}

// One collective of `world` ranks in one launch: addresses of x, out, control words, own slots and inboxes by rank.
struct Group {
    int world, blocks;
    int64_t region;
    uint64_t x[kMaxWorld], out[kMaxWorld], control[kMaxWorld], own[kMaxWorld], inbox[kMaxWorld];
};

bool collective_launch(const Group* group, int kind, const Setting* reduce, const Setting* gather, int dtype,
                       int64_t numel, int64_t slice, Launch* launch) {
    bool found = false;
    with_legs(*reduce, *gather, dtype, false, [&](auto first, auto second, auto type) {
        using W = Worker<typename decltype(first)::type, typename decltype(second)::type, typename decltype(type)::type>;
        Call call{};
        const Capacity capacity = {group->world, group->blocks, group->region};
        call.kind = (Collective)kind, call.shape = W::shape(call.kind, numel, slice, capacity, *reduce, *gather);
        call.world = call.ranks = group->world, call.reduce = *reduce, call.gather = *gather;
        call.region = group->region, call.deadline = 1000000000000;
        memcpy((void*)call.x, group->x, sizeof call.x), memcpy((void*)call.out, group->out, sizeof call.out);
        memcpy((void*)call.control, group->control, sizeof call.control), memcpy((void*)call.own, group->own, sizeof call.own);
        memcpy((void*)call.inbox, group->inbox, sizeof call.inbox);
        found = call.shape.tile != 0;
        if (found) fill(launch, call, call.shape.blocks * group->world, W::shared_bytes(call.shape, *reduce, *gather));
    });
    return found;
}

// Bytes of an inbox, of own slots and of control words, and where in these the host's error word has its address.
void sizes(int world, int64_t region, int64_t* found) {
    const Inbox inbox{world, region};
    found[0] = inbox.bytes(), found[1] = inbox.own_bytes(), found[2] = sizeof(Control);
    found[3] = offsetof(Control, host_error), found[4] = kSlotBytes;
}
}

#endif
