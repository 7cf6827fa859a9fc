// Launching a kernel with its arguments checked against its parameters, and CUDA's answer as an exception.
#pragma once

#include <utility>

#include "cuda/cuda_check.h"

namespace flashcomm {

struct Grid {
    int64_t blocks;
    int threads, shared_bytes;
    void* stream;
};

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned)grid.blocks), config.blockDim = dim3((unsigned)grid.threads);
    config.dynamicSmemBytes = (size_t)grid.shared_bytes, config.stream = (cudaStream_t)grid.stream;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace flashcomm
