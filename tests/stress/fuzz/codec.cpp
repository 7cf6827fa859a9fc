// Fuzz target: the compiled codec of one instruction set, every format, on any rows, values and payload.
//
// Every buffer is a heap block of exactly the bytes it should have, so the address sanitizer sees the first byte too far.
// An input is a shape, then bytes that serve first as values to encode and then as a payload that no encoder made.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "api.h"
#include "format/codec.h"
#include "format/rotated.h"
#include "format/spike.h"

namespace flashcomm::FLASHCOMM_ISA {
extern const Kernels kernels[kFormats];
}

namespace {

using namespace flashcomm;
using namespace flashcomm::FLASHCOMM_ISA;

struct Block {  // exactly `size` bytes, filled with `data` over and over
    std::unique_ptr<uint8_t, void (*)(void*)> bytes;
    size_t size;
    Block(size_t size, const uint8_t* data, size_t count)
        : bytes((uint8_t*)std::malloc(size ? size : 1), std::free), size(size) {
        for (size_t i = 0; i < size; i++) bytes.get()[i] = count ? data[i % count] : 0;
    }
    uint8_t* get() const { return bytes.get(); }
};

struct Input {
    const uint8_t* data;
    size_t size;
    unsigned next() { return size ? (size--, *data++) : 0; }
};

struct Sizes {
    int64_t bytes, units;  // of the payload; what a kernel counts: blocks, or super-blocks
};

Sizes sizes_of(const Spec& spec) {
    if (spec.format == kRotatedFormat) {
        const RotatedLayout at(spec.numel, spec.bits, spec.block, spec.width);
        return {at.bytes, at.super_blocks};
    }
    if (spec.format == kSpikeFormat) {
        const SpikeLayout at(spec.numel, spec.bits, spec.block, spec.width);
        return {at.bytes, at.blocks};
    }
    const Layout at(spec.numel, spec.bits, spec.block, spec.width);
    return {at.bytes, at.blocks};
}

Spec spec_of(Input& input) {
    const int format = input.next() % kFormats;
    const int bits = format == kRotatedFormat ? 4 + input.next() % 13 : 2 + input.next() % 7;
    const unsigned choice = input.next();
    int64_t block = choice & 1 ? 32 << (choice >> 1) % 3 : 8 * (1 + (choice >> 1) % 40);
    if (format == kRotatedFormat) block = 16 << choice % 7;
    if (format == kSpikeFormat) block = 8 * (1 + choice % 32);
    const int64_t width = 1 + (input.next() | input.next() << 8) % 9000;
    const int64_t rows = width < 1000 ? 1 + input.next() % 9 : 1;
    return {format, bits, block, rows * width, width};
}

bool is_nan(const uint8_t* values, int dtype, int64_t i) {
    uint32_t word = 0;
    std::memcpy(&word, values + i * (dtype == kFloat32 ? 4 : 2), dtype == kFloat32 ? 4 : 2);
    const uint32_t infinity[] = {0x7F800000, 0x7C00, 0x7F80}, magnitude[] = {0x7FFFFFFF, 0x7FFF, 0x7FFF};
    return (word & magnitude[dtype]) > infinity[dtype];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input{data, size};
    const Spec spec = spec_of(input);
    const int dtype = input.next() % 3, count = 1 + input.next() % 3;
    const bool with_residual = spec.format == kRotatedFormat && input.next() & 1;
    const auto [wire, units] = sizes_of(spec);
    const size_t bytes = spec.numel * (dtype == kFloat32 ? 4 : 2);

    const Block values(bytes, input.data, input.size);
    const size_t kept = with_residual ? residual_numel(spec.numel, spec.width, spec.block) * bytes / spec.numel : 0;
    Block x(bytes, input.data, input.size), residual(kept, nullptr, 0), out(bytes, nullptr, 0);
    Block payload(wire, nullptr, 0), again(wire, nullptr, 0), hostile(wire, input.data, input.size);
    const Kernels& codec = kernels[spec.format];
    codec.encode(x.get(), with_residual ? residual.get() : nullptr, dtype, spec, payload.get(), 0, units);
    if (!with_residual) {
        codec.encode(x.get(), nullptr, dtype, spec, again.get(), 0, units);
        if (std::memcmp(payload.get(), again.get(), wire)) std::abort();  // same input, same bits
    }
    const uint8_t* payloads[] = {payload.get(), hostile.get(), hostile.get()};
    codec.decode_sum(payloads, 1, spec, out.get(), dtype, 0, units);
    for (int64_t i = 0; i < spec.numel; i++)
        if (is_nan(values.get(), dtype, i) && !is_nan(out.get(), dtype, i)) std::abort();  // a NaN survives
    codec.decode_sum(payloads, count, spec, out.get(), dtype, 0, units);
    codec.decode_sum(payloads + 1, 1, spec, out.get(), dtype, 0, units);
    return 0;
}
