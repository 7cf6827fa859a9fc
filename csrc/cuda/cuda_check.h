// CUDA's return codes as exceptions that say what was being done.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace flashcomm {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // the error is reported here; the next call starts clean
    throw std::runtime_error(std::string("flash-comm: ") + what + " on CUDA failed: " + cudaGetErrorString(error) +
                             " (" + cudaGetErrorName(error) + ")");
}

}  // namespace flashcomm
