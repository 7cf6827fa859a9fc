// Fuzz target: the compiled codec of one instruction set, both formats, on any shape, values and payload.
//
// Every buffer is a heap block of exactly the bytes it should have, so the address sanitizer sees the first byte too far.
// An input is a shape, then bytes that serve first as values to encode and then as a payload that no encoder made.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "api.h"
#include "format/codec.h"
#include "format/rotated.h"

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

int64_t wire_bytes(const Spec& spec) {
    if (spec.format == 0) return Layout(spec.numel, spec.bits, spec.block).bytes;
    return RotatedLayout(spec.numel, spec.bits, spec.block).bytes;
}

Spec spec_of(Input& input) {
    const int format = input.next() & 1;
    const int bits = format ? 4 + input.next() % 13 : 2 + input.next() % 7;
    const unsigned width = input.next();
    const int64_t block = format ? 16 << width % 7 : width & 1 ? 32 << (width >> 1) % 3 : 8 * (1 + (width >> 1) % 40);
    const int64_t numel = 1 + (input.next() | input.next() << 8) % 9000;
    return {format, bits, block, numel};
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
    const bool remembers = spec.format && input.next() & 1;
    const int64_t blocks = (spec.numel + spec.block - 1) / spec.block;
    const size_t bytes = spec.numel * (dtype == kFloat32 ? 4 : 2), wire = wire_bytes(spec);

    const Block values(bytes, input.data, input.size);
    const size_t numbers = remembers ? memory_numel(blocks, spec.block) * bytes / spec.numel : 0;
    Block x(bytes, input.data, input.size), memory(numbers, nullptr, 0), out(bytes, nullptr, 0);
    Block payload(wire, nullptr, 0), again(wire, nullptr, 0), hostile(wire, input.data, input.size);
    const Kernels& codec = kernels[spec.format];
    codec.encode(x.get(), remembers ? memory.get() : nullptr, dtype, spec, payload.get(), 0, blocks);
    if (!remembers) {
        codec.encode(x.get(), nullptr, dtype, spec, again.get(), 0, blocks);
        if (std::memcmp(payload.get(), again.get(), wire)) std::abort();  // same input, same bits
    }
    const uint8_t* payloads[] = {payload.get(), hostile.get(), hostile.get()};
    codec.decode_sum(payloads, 1, spec, out.get(), dtype, 0, blocks);
    for (int64_t i = 0; i < spec.numel; i++)
        if (is_nan(values.get(), dtype, i) && !is_nan(out.get(), dtype, i)) std::abort();  // a NaN survives
    codec.decode_sum(payloads, count, spec, out.get(), dtype, 0, blocks);
    codec.decode_sum(payloads + 1, 1, spec, out.get(), dtype, 0, blocks);
    return 0;
}
