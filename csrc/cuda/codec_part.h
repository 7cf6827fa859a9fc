// The codec's kernels and their launches, compiled in parts (instances.h).
#pragma once

#include "api.h"
#include "cuda/codec_kernels.h"

namespace flashcomm {

template <class T, bool kUniform> struct CodecPart {
    using Payloads = FLASHCOMM_ISA::Payloads;

    static bool has(const Spec& spec);
    static void encode(const void* x, void* residual, const Slices& slices, uint8_t* payloads, void* stream);
    // One payload of each slice, or, of a tensor in one slice, the sum of `count`.
    static void decode(const Payloads& payloads, int count, const Slices& slices, void* x, void* stream);
    // False: no kernel for this pair of codecs; decode() and encode() do the same in two launches.
    static bool reduce(const Payloads& payloads, int count, const Spec& from, void* out, const Spec& gather,
                       uint8_t* payload, void* residual, void* stream);
};

}  // namespace flashcomm
