// Chooses the instruction set once, cuts tensors and slices into chunks and shares these among threads. Compiled for the
// oldest machine.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "api.h"
#include "format/rotated.h"

namespace flashcomm {

namespace baseline {
extern const Kernels kernels[kFormats];
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels[kFormats];
}
namespace avx512 {
extern const Kernels kernels[kFormats];
}
namespace avx512bf16 {
extern const Kernels kernels[kFormats];
}
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

// ---- chunks ----------------------------------------------------------------------------------------------------

constexpr int64_t kShare = 1 << 18;  // values that are worth a thread: it takes longer to code them than to start it
constexpr int64_t kChunk =
    1 << 15;                    // values coded at a time by reduce_slices, which reads them twice: cache holds them
constexpr int64_t kGrain = 64;  // blocks; chunks end on whole strips and cache lines

bool shares_tops(const Spec& spec) { return spec.format == kRotatedFormat; }

// A tensor in units: blocks, or super-blocks where blocks share a top.
baseline::Rows units_of(const Spec& spec) {
    return {spec.numel, spec.width, shares_tops(spec) ? baseline::kSuperBlock * spec.block : spec.block};
}

int64_t common_multiple(int64_t a, int64_t b) { return a / std::gcd(a, b) * b; }

// Values of a chunk: rows as they are, 16 or more, or, of a tensor of one row, whole units of both codecs.
int64_t chunk_of(const Spec& spec, const Spec* other) {
    const baseline::Rows rows(spec.numel, spec.width, spec.block);
    const int64_t least = rows.count > 1
                              ? 16 * rows.width
                              : common_multiple(kGrain * spec.block, kGrain * (other ? other->block : spec.block));
    return (kChunk + least - 1) / least * least;
}

// The units before value `end`, where a chunk or the tensor ends.
int64_t units_before(const Spec& spec, int64_t end) {
    const baseline::Rows units = units_of(spec);
    return units.count > 1 ? end / units.width * units.blocks : (end + units.block - 1) / units.block;
}

// run(first, last) over chunks 0 .. chunks - 1, in at most `threads` threads including this one.
template <class Run> void share(int64_t values, int64_t chunks, int threads, Run run) {
    const int64_t most = std::min<int64_t>(threads, chunks),
                  shares = std::max<int64_t>(1, std::min(most, values / kShare));
    std::vector<std::thread> others;
    int64_t next = 1;
    try {
        for (; next < shares; next++) others.emplace_back(run, next * chunks / shares, (next + 1) * chunks / shares);
    } catch (const std::system_error&) {  // no more threads to be had: the rest is done here
    }
    run(0, chunks / shares);
    if (next < shares) run(next * chunks / shares, chunks);
    for (std::thread& other : others) other.join();
}

// ---- slices ----------------------------------------------------------------------------------------------------

Spec spec_of(const Slices& slices, int64_t slice) {
    const int64_t left = slices.numel - slice * slices.length,
                  numel = std::max<int64_t>(0, std::min(left, slices.length));
    return {slices.format, slices.bits, slices.block, numel, slices.width};
}

// code(slice, its spec, first unit, last unit) over all units of all slices.
template <class Code> void each_slice(const Slices& slices, int threads, Code code) {
    const int64_t chunk = chunk_of(spec_of(slices, 0), nullptr), each = (slices.length + chunk - 1) / chunk;
    share(slices.numel, slices.count * each, threads, [=, &slices](int64_t chunks_first, int64_t chunks_last) {
        for (int64_t at = chunks_first; at < chunks_last;) {
            const int64_t slice = at / each, end = std::min(chunks_last, (slice + 1) * each);
            const Spec spec = spec_of(slices, slice);
            const auto unit = [&](int64_t c) { return units_before(spec, std::min(c * chunk, spec.numel)); };
            const int64_t first = unit(at - slice * each), last = unit(end - slice * each);
            if (first < last) code(slice, spec, first, last);
            at = end;
        }
    });
}

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

uint8_t* moved(const void* from, int64_t bytes) { return from ? (uint8_t*)from + bytes : nullptr; }

}  // namespace

void encode_slices(const void* x, void* residual, int dtype, const Slices& slices, uint8_t* payloads, int threads) {
    const Kernels& kernels = isas[in_use].kernels[slices.format];
    const int64_t bytes = bytes_of(dtype);
    const int64_t residuals = baseline::residual_numel(slices.length, slices.width, slices.block);
    each_slice(slices, threads, [=, &slices](int64_t slice, const Spec& spec, int64_t first, int64_t last) {
        kernels.encode(moved(x, slice * slices.length * bytes), moved(residual, slice * residuals * bytes), dtype, spec,
                       payloads + slice * slices.stride, first, last);
    });
}

void decode_slices(const uint8_t* payloads, const Slices& slices, void* x, int dtype, int threads) {
    const Kernels& kernels = isas[in_use].kernels[slices.format];
    each_slice(slices, threads, [=, &slices](int64_t slice, const Spec& spec, int64_t first, int64_t last) {
        const uint8_t* payload = payloads + slice * slices.stride;
        kernels.decode_sum(&payload, 1, spec, moved(x, slice * slices.length * bytes_of(dtype)), dtype, first, last);
    });
}

void reduce_slices(const uint8_t* const* payloads, int count, const Spec& from, void* out, int dtype,
                   const Spec* gather, uint8_t* payload, void* residual, int threads) {
    const Isa& isa = isas[in_use];
    const int64_t chunk = chunk_of(from, gather), chunks = (from.numel + chunk - 1) / chunk;
    share(from.numel, chunks, threads, [=, &from](int64_t first, int64_t last) {
        const int64_t step = gather ? 1 : last - first;  // at once, if nothing is read again
        for (int64_t c = first; c < last; c += step) {
            const int64_t begin = c * chunk, end = std::min(begin + step * chunk, from.numel);
            isa.kernels[from.format].decode_sum(payloads, count, from, out, dtype, units_before(from, begin),
                                                units_before(from, end));
            if (gather)
                isa.kernels[gather->format].encode(out, residual, dtype, *gather, payload, units_before(*gather, begin),
                                                   units_before(*gather, end));
        }
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
