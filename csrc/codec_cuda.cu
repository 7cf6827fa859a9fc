// The codec on CUDA: codec.h, one thread for each block to encode and for each octet to decode.
#include "api.h"

#include "codec.h"

#include <stdexcept>
#include <string>

namespace flashcomm {
namespace {

using namespace FLASHCOMM_ISA;

constexpr int kThreads = 256;
constexpr int kMaxPayloads = 64;

struct Payloads {
    const uint8_t* at[kMaxPayloads];
};

__device__ int64_t thread_index() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }

template <class T> __global__ void encode_kernel(const typename T::Word* x, Layout at, uint8_t* payload) {
    const int64_t index = thread_index();
    if (index < at.blocks) encode_block<T>(x, at, index, payload);
    if (index == 0) at.zero_gaps(payload);
}

template <class T>
__global__ void decode_sum_kernel(Payloads payloads, int count, Layout at, typename T::Word* out) {
    const int64_t octet = thread_index();
    if (octet < at.octets) decode_octet<T>(payloads.at, count, at, octet, out);
}

unsigned grid(int64_t threads) { return (unsigned)((threads + kThreads - 1) / kThreads); }

void check(const char* what) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("flash-comm: ") + what + " on CUDA failed: " + cudaGetErrorString(error) +
                                 " (" + cudaGetErrorName(error) + ")");
}

template <class T> void encode_launch(const void* x, const Layout& at, uint8_t* payload, void* stream) {
    encode_kernel<T><<<grid(at.blocks), kThreads, 0, (cudaStream_t)stream>>>((const typename T::Word*)x, at, payload);
}

template <class T>
void decode_sum_launch(const Payloads& payloads, int count, const Layout& at, void* out, void* stream) {
    decode_sum_kernel<T><<<grid(at.octets), kThreads, 0, (cudaStream_t)stream>>>(payloads, count, at,
                                                                               (typename T::Word*)out);
}

}  // namespace

void encode_cuda(const void* x, int dtype, const Spec& spec, uint8_t* payload, void* stream) {
    const Layout at(spec.numel, spec.bits, spec.block);
    if (at.numel == 0) return;
    if (dtype == kFloat32) encode_launch<Float32>(x, at, payload, stream);
    if (dtype == kFloat16) encode_launch<Float16>(x, at, payload, stream);
    if (dtype == kBFloat16) encode_launch<BFloat16>(x, at, payload, stream);
    check("encode");
}

void decode_sum_cuda(const uint8_t* const* payloads, int count, const Spec& spec, void* out, int dtype, void* stream) {
    const Layout at(spec.numel, spec.bits, spec.block);
    if (at.numel == 0) return;
    if (count > kMaxPayloads) throw std::runtime_error("flash-comm: decode_sum on CUDA takes at most 64 payloads.");
    Payloads all{};
    for (int p = 0; p < count; p++) all.at[p] = payloads[p];
    if (dtype == kFloat32) decode_sum_launch<Float32>(all, count, at, out, stream);
    if (dtype == kFloat16) decode_sum_launch<Float16>(all, count, at, out, stream);
    if (dtype == kBFloat16) decode_sum_launch<BFloat16>(all, count, at, out, stream);
    check("decode_sum");
}

}  // namespace flashcomm
