// The kernels of the fused collectives, one for each pair of legs and number type, compiled in parts (instances.h).
#pragma once

#include "cuda/collectives.h"
#include "cuda/workspace.h"

namespace flashcomm {

constexpr int kBlocksPerMultiprocessor = 2;  // resident at once: bounds the registers, and with them the grid

// What one request needs of the kernel that serves it.
struct Kernel {
    void (*function)(FLASHCOMM_ISA::Call) = nullptr;  // null: there is none
    FLASHCOMM_ISA::Shape shape{};
    int shared_bytes = 0;
};

template <class T, bool kUniform> struct CollectivePart {
    static Kernel kernel(const Request& request, const FLASHCOMM_ISA::Setting& reduce,
                         const FLASHCOMM_ISA::Setting& gather, const FLASHCOMM_ISA::Capacity& capacity);
};

}  // namespace flashcomm
