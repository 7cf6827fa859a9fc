// Memory that several processes and GPUs can reach: device allocations shared by CUDA IPC, mapped host memory.
#include <cstring>

#include "cuda/cuda_check.h"
#include "cuda/workspace.h"

namespace flashcomm {

std::string device_uuid(int device) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "asking for the device");
    return std::string(properties.uuid.bytes, sizeof properties.uuid.bytes);
}

// A peer may write as soon as it has the address, so the zeros must be there first.
uintptr_t device_allocate(int device, int64_t bytes) {
    const OnDevice on(device);
    void* address = nullptr;
    check(cudaMalloc(&address, bytes), "allocating an inbox");
    check(cudaMemset(address, 0, bytes), "clearing an inbox");
    check(cudaDeviceSynchronize(), "clearing an inbox");
    return (uintptr_t)address;
}

void device_free(int device, uintptr_t address) {
    const OnDevice on(device);
    check(cudaFree((void*)address), "freeing an inbox");
}

std::string ipc_handle(int device, uintptr_t address) {
    const OnDevice on(device);
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, (void*)address), "exporting an inbox");
    return std::string((const char*)&handle, sizeof handle);
}

uintptr_t ipc_open(int device, const std::string& bytes) {
    const OnDevice on(device);
    cudaIpcMemHandle_t handle;
    if (bytes.size() != sizeof handle) throw std::runtime_error("flash-comm: an IPC handle has 64 bytes.");
    std::memcpy(&handle, bytes.data(), sizeof handle);
    void* address = nullptr;
    check(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess), "opening a peer's inbox");
    return (uintptr_t)address;
}

void ipc_close(int device, uintptr_t address) {
    const OnDevice on(device);
    check(cudaIpcCloseMemHandle((void*)address), "closing a peer's inbox");
}

uintptr_t host_register(int device, uintptr_t address, int64_t bytes) {
    const OnDevice on(device);
    const unsigned flags = cudaHostRegisterMapped | cudaHostRegisterPortable;
    check(cudaHostRegister((void*)address, bytes, flags), "pinning host memory");
    void* mapped = nullptr;
    check(cudaHostGetDevicePointer(&mapped, (void*)address, 0), "mapping host memory");
    return (uintptr_t)mapped;
}

void host_unregister(uintptr_t address) { check(cudaHostUnregister((void*)address), "unpinning host memory"); }

}  // namespace flashcomm
