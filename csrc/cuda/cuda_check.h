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

// Makes a device current until the end of the scope.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the current device");
        if (device != before_) check(cudaSetDevice(device), "choosing the device");
        changed_ = device != before_;
    }
    ~OnDevice() {
        if (changed_) (void)cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace flashcomm
