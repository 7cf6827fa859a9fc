// What the extension offers, seen from outside: the codec on any CPU with any number of threads, and on CUDA.
#pragma once

#include <stdint.h>

namespace flashcomm {

constexpr int kInterface = 9;  // raise it when Python calls or expects something else; codec/native.py checks

enum Dtype { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Of flashcomm_megatron.codec; the bits of Rotated are counted in halves.
enum Format { kUniformFormat = 0, kRotatedFormat = 1, kSpikeFormat = 2, kFormats = 3 };

// A codec, and a tensor of `numel` values in rows of `width`; 0, or not less than numel: in one row.
struct Spec {
    int format, bits;
    int64_t block, numel, width = 0;
};

// A codec, and a tensor cut into `count` slices: slice i holds the values [i * length, min((i + 1) * length, numel)), of
// whole rows, or of a tensor of one row. Its payload lies at i * stride bytes.
struct Slices {
    int format, bits;
    int64_t block, width, numel, length, count, stride;
};

// Encodes every slice of x. `residual` (x's dtype, those of all slices one behind the other, or null; Rotated only):
// encode x + residual; the residual is replaced by the new rounding error.
void encode_slices(const void* x, void* residual, int dtype, const Slices&, uint8_t* payloads, int threads);

// Writes the float32 sum, in the order given, of decoded payloads into `out`. With `gather`, whose numel and width are
// those of `from`, the sum as `out` holds it is encoded into `payload`, with its `residual`.
void reduce_slices(const uint8_t* const* payloads, int count, const Spec& from, void* out, int dtype,
                   const Spec* gather, uint8_t* payload, void* residual, int threads);

// Decodes every slice's payload into its place in x.
void decode_slices(const uint8_t* payloads, const Slices&, void* x, int dtype, int threads);

// On the current device, in stream order; std::runtime_error names what CUDA reports. Only in builds with nvcc. Each is
// one launch; reduce_slices_cuda is two where there is no kernel for the pair of codecs.
bool has_codec_cuda(int dtype, const Spec&);  // whatever its numel
void encode_slices_cuda(const void* x, void* residual, int dtype, const Slices&, uint8_t* payloads, void* stream);
void reduce_slices_cuda(const uint8_t* const* payloads, int count, const Spec& from, void* out, int dtype,
                        const Spec* gather, uint8_t* payload, void* residual, void* stream);
void decode_slices_cuda(const uint8_t* payloads, const Slices&, void* x, int dtype, void* stream);

// The instruction sets this machine can run, best first; nullptr behind the last. The best is used unless told.
const char* isa_name(int i);
const char* isa_in_use();
bool use_isa(const char* name);  // false: not among them

// What one instruction set offers for one format: the units first .. last - 1 of a tensor, which are blocks, or
// super-blocks where blocks share something.
struct Kernels {
    void (*encode)(const void* x, void* residual, int dtype, const Spec&, uint8_t* payload, int64_t first,
                   int64_t last);
    void (*decode_sum)(const uint8_t* const* payloads, int count, const Spec&, void* out, int dtype, int64_t first,
                       int64_t last);
};

}  // namespace flashcomm
