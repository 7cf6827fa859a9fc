// The codec on CUDA as api.h offers it: which part (instances.h) serves a call.
#include <algorithm>
#include <stdexcept>

#include "api.h"
#include "cuda/codec_part.h"
#include "cuda/instances.h"

namespace flashcomm {

using namespace FLASHCOMM_ISA;

namespace {

template <class Visit> void with_codec_part(int format, int dtype, Visit visit) {
    with_part(format, dtype, [&](auto type, auto is_uniform) {
        visit(Is<CodecPart<typename decltype(type)::type, is_uniform.value>>{});
    });
}

// A row must end where blocks do; rotated ones where a thread's octets do as well.
bool rows_are_whole(const Spec& spec) {
    const Rows rows(spec.numel, spec.width, spec.block);
    return rows.is_flat() && (spec.format != kRotatedFormat || rows.count <= 1 || rows.width % kThreadsValues == 0);
}

Slices one_slice(const Spec& spec) {
    return {spec.format, spec.bits, spec.block, spec.width, spec.numel, spec.numel, 1, 0};
}

}  // namespace

bool has_codec_cuda(int dtype, const Spec& spec) {
    bool found = false;
    with_codec_part(spec.format, dtype, [&](auto part) { found = decltype(part)::type::has(spec); });
    return found && rows_are_whole(spec);
}

void encode_slices_cuda(const void* x, void* residual, int dtype, const Slices& slices, uint8_t* payloads,
                        void* stream) {
    if (slices.numel == 0) return;
    with_codec_part(slices.format, dtype,
                    [&](auto part) { decltype(part)::type::encode(x, residual, slices, payloads, stream); });
}

void decode_slices_cuda(const uint8_t* payloads, const Slices& slices, void* x, int dtype, void* stream) {
    if (slices.numel == 0) return;
    with_codec_part(slices.format, dtype,
                    [&](auto part) { decltype(part)::type::decode({{payloads}}, 1, slices, x, stream); });
}

void reduce_slices_cuda(const uint8_t* const* payloads, int count, const Spec& from, void* out, int dtype,
                        const Spec* gather, uint8_t* payload, void* residual, void* stream) {
    if (from.numel == 0) return;
    if (count > kMaxPayloads) throw std::runtime_error("flash-comm: reduce_slices on CUDA takes at most 64 payloads.");
    Payloads all{};
    std::copy_n(payloads, count, all.at);
    bool done = false;
    with_codec_part(from.format, dtype, [&](auto part) {
        using Part = typename decltype(part)::type;
        done = gather && Part::reduce(all, count, from, out, *gather, payload, residual, stream);
        if (!done) Part::decode(all, count, one_slice(from), out, stream);
    });
    if (gather && !done) encode_slices_cuda(out, residual, dtype, one_slice(*gather), payload, stream);
}

}  // namespace flashcomm
