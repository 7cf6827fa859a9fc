// The part of CUDA's runtime that csrc/ and torch.cuda's stand-in use, with kernels that run on the host: runtime.cpp.
//
// Names, arguments and errors are CUDA's; a host compiler takes the place of nvcc, so kernels are ordinary functions.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

#define CUDA_API extern "C" __attribute__((visibility("default")))

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInitializationError = 3,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorDeviceUninitialized = 201,
    cudaErrorPeerAccessUnsupported = 217,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorHostMemoryAlreadyRegistered = 712,
    cudaErrorHostMemoryNotRegistered = 713,
    cudaErrorStreamCaptureUnsupported = 900,
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef struct Stream* cudaStream_t;
typedef struct Event* cudaEvent_t;
typedef struct Graph* cudaGraph_t;

// ---- devices and errors ------------------------------------------------------------------------------------------

struct cudaDeviceProp {
    struct {
        char bytes[16];
    } uuid;
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

CUDA_API cudaError_t cudaGetDeviceCount(int* count);
CUDA_API cudaError_t cudaGetDevice(int* device);
CUDA_API cudaError_t cudaSetDevice(int device);
CUDA_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
CUDA_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
CUDA_API cudaError_t cudaDeviceSynchronize();
CUDA_API cudaError_t cudaGetLastError();
CUDA_API const char* cudaGetErrorName(cudaError_t error);
CUDA_API const char* cudaGetErrorString(cudaError_t error);

// ---- memory ------------------------------------------------------------------------------------------------------

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDefault = 4 };
enum : unsigned { cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
enum : unsigned { cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2, cudaIpcMemLazyEnablePeerAccess = 1 };
struct cudaIpcMemHandle_t {
    char reserved[64];
};

CUDA_API cudaError_t cudaMalloc(void** address, size_t bytes);
CUDA_API cudaError_t cudaFree(void* address);
CUDA_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
CUDA_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
CUDA_API cudaError_t cudaMemset(void* address, int value, size_t bytes);
CUDA_API cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned flags);
CUDA_API cudaError_t cudaFreeHost(void* address);
CUDA_API cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned flags);
CUDA_API cudaError_t cudaHostUnregister(void* address);
CUDA_API cudaError_t cudaHostGetDevicePointer(void** mapped, void* address, unsigned flags);
CUDA_API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address);
CUDA_API cudaError_t cudaIpcOpenMemHandle(void** address, cudaIpcMemHandle_t handle, unsigned flags);
CUDA_API cudaError_t cudaIpcCloseMemHandle(void* address);

// ---- streams, events, graphs -------------------------------------------------------------------------------------

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0 };
enum : unsigned { cudaEventDisableTiming = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

CUDA_API cudaError_t cudaStreamCreate(cudaStream_t* stream);
CUDA_API cudaError_t cudaStreamSynchronize(cudaStream_t stream);
CUDA_API cudaError_t cudaStreamQuery(cudaStream_t stream);
CUDA_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
CUDA_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void*), void* argument);
CUDA_API cudaError_t cudaEventCreate(cudaEvent_t* event);
CUDA_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
CUDA_API cudaError_t cudaEventDestroy(cudaEvent_t event);
CUDA_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
CUDA_API cudaError_t cudaEventQuery(cudaEvent_t event);
CUDA_API cudaError_t cudaEventSynchronize(cudaEvent_t event);
CUDA_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);
CUDA_API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
CUDA_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
CUDA_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                              unsigned long long* number);
CUDA_API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
CUDA_API cudaError_t cudaGraphLaunch(cudaGraph_t graph, cudaStream_t stream);  // no second form to be launched
CUDA_API cudaError_t cudaGraphDestroy(cudaGraph_t graph);

// ---- kernels -----------------------------------------------------------------------------------------------------

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace stand_in {
cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> kernel);
cudaError_t occupancy(int* blocks, int threads, size_t shared_bytes);

// Tests alone: from now on the function of that name answers with `error`, or, by cudaSuccess, does as it should. Of
// cudaIpcOpenMemHandle and cudaErrorNotReady: memory is mapped, but not the peer's.
CUDA_API void stand_in_fault(const char* function, cudaError_t error);
}  // namespace stand_in

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
    std::tuple<std::decay_t<Parameters>...> arguments(std::forward<Arguments>(given)...);
    return stand_in::launch(*config, [kernel, arguments] { std::apply(kernel, arguments); });
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t shared_bytes) {
    return stand_in::occupancy(blocks, threads, shared_bytes);
}
