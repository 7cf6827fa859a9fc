// The compiled codec's own threads, which share one tensor, for the thread sanitizer.
#include <cstdio>
#include <vector>

#include "api.h"

#if defined(__x86_64__)  // only the baseline is compiled here, and only it is used
namespace flashcomm::avx2 { extern const Kernels kernels[kFormats]; const Kernels kernels[kFormats] = {}; }
namespace flashcomm::avx512 { extern const Kernels kernels[kFormats]; const Kernels kernels[kFormats] = {}; }
namespace flashcomm::avx512bf16 { extern const Kernels kernels[kFormats]; const Kernels kernels[kFormats] = {}; }
#endif

using namespace flashcomm;

int main() {
    use_isa("baseline");
    const int64_t numel = (3 << 18) + 77;  // so many that three threads are worth it
    const Spec spec{kUniformFormat, 4, 64, numel};
    const Slices whole{kUniformFormat, 4, 64, numel, numel, numel, 1, 2 * numel};
    std::vector<float> x(numel), out(numel);
    for (int64_t i = 0; i < numel; i++) x[i] = (float)(i % 1000) / 7;
    std::vector<uint8_t> one(2 * numel), three(2 * numel);
    encode_slices(x.data(), nullptr, kFloat32, whole, one.data(), 1);
    encode_slices(x.data(), nullptr, kFloat32, whole, three.data(), 3);
    if (one != three) return std::fprintf(stderr, "three threads encode other bytes than one\n"), 1;
    const uint8_t* payloads[] = {one.data(), three.data()};
    reduce_slices(payloads, 2, spec, out.data(), kFloat32, nullptr, nullptr, nullptr, 3);
    decode_slices(one.data(), whole, out.data(), kFloat32, 3);
    std::printf("%lld values\n", (long long)numel);
}
