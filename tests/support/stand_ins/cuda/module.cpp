// The CUDA half of flashcomm_megatron._C, built on the stand-in; and "cuda" as a kind of device torch may be told of.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>

#include "cuda_runtime.h"

void bind_cuda(pybind11::module_& m);  // csrc/bindings_cuda.cpp

namespace {

// What torch asks of a kind of device before it looks at who computes.
struct Guard : c10::impl::DeviceGuardImplInterface {
    static c10::Device of(int index) { return {c10::DeviceType::CUDA, (c10::DeviceIndex)index}; }
    c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
    c10::Device getDevice() const override {
        int index = 0;
        cudaGetDevice(&index);
        return of(index);
    }
    void setDevice(c10::Device device) const override { cudaSetDevice(device.index()); }
    void uncheckedSetDevice(c10::Device device) const noexcept override { cudaSetDevice(device.index()); }
    c10::Device exchangeDevice(c10::Device device) const override {
        const c10::Device before = getDevice();
        return setDevice(device), before;
    }
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override {
        int count = 0;
        cudaGetDeviceCount(&count);
        return (c10::DeviceIndex)count;
    }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

PYBIND11_MODULE(cuda_half, m) { bind_cuda(m); }
