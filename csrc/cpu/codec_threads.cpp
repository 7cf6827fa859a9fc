// Chooses the instruction set once and shares large tensors among threads. Compiled for the oldest machine.
#include "api.h"

#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace flashcomm {

namespace baseline { extern const Kernels kernels[kFormats]; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels[kFormats]; }
namespace avx512 { extern const Kernels kernels[kFormats]; }
namespace avx512bf16 { extern const Kernels kernels[kFormats]; }
#endif

namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
};

std::vector<Isa> find_isas() {
    std::vector<Isa> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512bf16")) found.push_back({"avx512bf16", avx512bf16::kernels});
    if (wide) found.push_back({"avx512", avx512::kernels});
    if (fma) found.push_back({"avx2", avx2::kernels});
#endif
    found.push_back({"baseline", baseline::kernels});
    return found;
}

const std::vector<Isa> isas = find_isas();
size_t in_use = 0;

constexpr int64_t kShare = 1 << 18;  // values that are worth a thread: it takes longer to code them than to start it
constexpr int64_t kGrain = 64;       // blocks; shares end on whole strips and cache lines

// run(first, last) over all blocks, in at most `threads` threads including this one.
template <class Run> void share(const Spec& spec, int threads, Run run) {
    const int64_t blocks = (spec.numel + spec.block - 1) / spec.block, worthwhile = spec.numel / kShare;
    const int64_t shares = worthwhile < threads ? (worthwhile > 1 ? worthwhile : 1) : (threads > 1 ? threads : 1);
    const int64_t size = ((blocks + shares - 1) / shares + kGrain - 1) / kGrain * kGrain;
    std::vector<std::thread> others;
    int64_t first = 0;
    try {
        for (; first + size < blocks; first += size) others.emplace_back(run, first, first + size);
    } catch (const std::system_error&) {  // no more threads to be had: the rest is done here
    }
    if (first < blocks) run(first, blocks);
    for (std::thread& other : others) other.join();
}

}  // namespace

void encode(const void* x, void* memory, int dtype, const Spec& spec, uint8_t* payload, int threads) {
    const Kernels& kernels = isas[in_use].kernels[spec.format];
    share(spec, threads, [=](int64_t first, int64_t last) {
        kernels.encode(x, memory, dtype, spec, payload, first, last);
    });
}

void decode_sum(const uint8_t* const* payloads, int count, const Spec& spec, void* out, int dtype, int threads) {
    const Kernels& kernels = isas[in_use].kernels[spec.format];
    share(spec, threads, [=](int64_t first, int64_t last) {
        kernels.decode_sum(payloads, count, spec, out, dtype, first, last);
    });
}

const char* isa_name(int i) { return i < (int)isas.size() ? isas[i].name : nullptr; }

const char* isa_in_use() { return isas[in_use].name; }

bool use_isa(const char* name) {
    for (size_t i = 0; i < isas.size(); i++)
        if (!std::strcmp(name, isas[i].name)) return in_use = i, true;
    return false;
}

}  // namespace flashcomm
