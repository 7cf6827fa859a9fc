// A GPU of a few multiprocessors on one thread of the host, as far as cuda_runtime.h declares it.
//
// Work of a stream runs in order and streams side by side: the worker gives a step to every block that is resident, in
// turn, and starts further blocks as others end. Launches return at once. Memory of the device is shared memory, so that
// its IPC handles mean something to other processes, each of which is a GPU user of its own that polls the same bytes.
// What it does not do as a GPU does: time, memory order, and two processes never wait for each other's turn.
#include "cuda_runtime.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fibers.h"

namespace {

constexpr int kMultiprocessors = 10, kBlocksPerMultiprocessor = 2;
constexpr size_t kResident = kMultiprocessors * kBlocksPerMultiprocessor;  // thread blocks at once
constexpr size_t kDeviceBytes = size_t(1) << 30;

using Clock = std::chrono::steady_clock;
uint64_t now() { return (uint64_t)Clock::now().time_since_epoch().count(); }

// What a stream holds: a kernel, or something that is done in one go. `ready`: whether it may begin.
struct Work {
    std::function<void()> body;
    int64_t blocks = 0;  // of the grid; 0: no kernel
    int threads = 0;
    std::function<bool()> ready;
};

struct Running {
    Work work;
    int64_t begun = 0;
    std::deque<fibers::Block> resident;
};

}  // namespace

struct Graph {
    std::vector<Work> work;
    unsigned long long number = 0;  // of the capture that made it
};
struct Stream {
    std::deque<Work> queue;
    std::unique_ptr<Running> running;
    Graph* capture = nullptr;
};
struct Event {
    uint64_t recorded = 0, at = 0;  // how often; when the last was reached
    unsigned long long capture = 0;  // the number of that in which it was recorded last; 0: outside of any
    std::atomic<uint64_t> reached{0};
};

namespace {

struct Mapping {
    size_t bytes;
    int descriptor;  // of memory of our own; -1: opened from another process
};
struct Exported {  // what an IPC handle holds
    int process, descriptor;
    size_t bytes;
};
struct Pinned {
    void* mapped;
    size_t bytes;
};

// All state of the process; never destroyed, since tensors may outlive what is static.
struct Device {
    std::mutex lock;
    std::condition_variable to_do, done;
    bool has_worker = false;
    Stream legacy;  // stream 0
    std::vector<std::unique_ptr<Stream>> streams;
    std::atomic<int> captures{0};
    unsigned long long capture_number = 0;
    std::map<void*, Mapping> memory;
    std::map<void*, Pinned> pinned;
    std::map<void*, size_t> host;
    std::map<std::string, cudaError_t> faults;
};
Device& device = *new Device;
thread_local cudaError_t last = cudaSuccess;
thread_local int current = 0;

cudaError_t answer(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}

int device_count() {
    const char* wanted = std::getenv("FLASHCOMM_STAND_IN_GPUS");
    return wanted ? std::atoi(wanted) : 1;
}

// Whether the process that asked first was this one's parent: a GPU does not survive a fork.
bool is_forked() {
    static const int first = getpid();
    return first != getpid();
}

Stream& stream_of(cudaStream_t stream) { return stream ? *stream : device.legacy; }

template <class Visit> void each_stream(Visit visit) {
    visit(device.legacy);
    for (auto& stream : device.streams) visit(*stream);
}
bool idle(const Stream& stream) { return stream.queue.empty() && !stream.running; }
bool all_idle() {
    bool idle_so_far = true;
    each_stream([&](Stream& stream) { idle_so_far &= idle(stream); });
    return idle_so_far;
}

// ---- the worker --------------------------------------------------------------------------------------------------

// Begins what streams have next. Kernels stay with their stream until their last block ends.
std::vector<Running*> begin(std::vector<Stream*>& at_once) {
    std::vector<Running*> running;
    each_stream([&](Stream& stream) {
        if (!stream.running && !stream.queue.empty()) {
            const auto& ready = stream.queue.front().ready;
            if (ready && !ready()) return;
            stream.running = std::make_unique<Running>();
            stream.running->work = std::move(stream.queue.front());
            stream.queue.pop_front();
        }
        if (!stream.running) return;
        if (stream.running->work.blocks) running.push_back(stream.running.get());
        else at_once.push_back(&stream);
    });
    return running;
}

// A step of every resident block, after filling what room there is. False: all polled in vain.
bool advance(const std::vector<Running*>& running) {
    size_t resident = 0;
    bool found = false;
    for (Running* kernel : running) resident += kernel->resident.size();
    for (Running* kernel : running) {
        const Work& work = kernel->work;
        for (; resident < kResident && kernel->begun < work.blocks; resident++)
            kernel->resident.emplace_back(work.body, kernel->begun++, work.blocks, work.threads);
        for (fibers::Block& block : kernel->resident) found |= block.step();
        while (!kernel->resident.empty() && kernel->resident.front().ended()) kernel->resident.pop_front(), found = true;
    }
    return found;
}

void work() {
    std::unique_lock<std::mutex> guard(device.lock);
    for (int vain = 0;;) {
        std::vector<Stream*> at_once;
        const std::vector<Running*> running = begin(at_once);
        if (running.empty() && at_once.empty() && all_idle()) {
            device.to_do.wait(guard);
            continue;
        }
        guard.unlock();
        bool found = advance(running);
        for (Stream* stream : at_once) stream->running->work.body(), found = true;
        if (!found && ++vain > 10) std::this_thread::sleep_for(std::chrono::microseconds(vain > 100 ? 500 : 20));
        if (found) vain = 0;
        guard.lock();
        each_stream([&](Stream& stream) {
            if (!stream.running) return;
            const Running& each = *stream.running;
            const bool over = each.work.blocks ? each.begun == each.work.blocks && each.resident.empty()
                                               : std::count(at_once.begin(), at_once.end(), &stream) > 0;
            if (over) stream.running.reset();
        });
        device.done.notify_all();
    }
}

// Puts work into a stream, or into the graph that it is captured into.
cudaError_t enqueue(cudaStream_t stream, Work what) {
    if (is_forked()) return answer(cudaErrorInitializationError);
    const std::lock_guard<std::mutex> guard(device.lock);
    if (Graph* graph = stream_of(stream).capture) {
        graph->work.push_back(std::move(what));
        return cudaSuccess;
    }
    stream_of(stream).queue.push_back(std::move(what));
    if (!device.has_worker) std::thread(work).detach();
    device.has_worker = true;
    device.to_do.notify_all();
    return cudaSuccess;
}

template <class Holds> cudaError_t wait_until(Holds holds) {
    std::unique_lock<std::mutex> guard(device.lock);
    if (device.captures) return answer(cudaErrorStreamCaptureUnsupported);
    device.done.wait(guard, holds);
    return cudaSuccess;
}

cudaError_t fault(const char* function) {
    const std::lock_guard<std::mutex> guard(device.lock);
    const auto found = device.faults.find(function);
    return found == device.faults.end() ? cudaSuccess : found->second;
}
#define MAY_FAIL() \
    if (const cudaError_t error = fault(__func__); error != cudaSuccess) return answer(error)
#define NOT_IN_CAPTURE() \
    if (device.captures) return answer(cudaErrorStreamCaptureUnsupported)

void* map(int descriptor, size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    return found == MAP_FAILED ? nullptr : found;
}

size_t used() {
    size_t bytes = 0;
    for (const auto& [address, each] : device.memory) bytes += each.bytes;
    for (const auto& [address, each] : device.pinned) bytes += each.bytes;
    return bytes;
}

// The allocation that holds an address, as CUDA finds it.
std::map<void*, Mapping>::iterator holding(const void* address) {
    auto found = device.memory.upper_bound((void*)address);
    if (found == device.memory.begin()) return device.memory.end();
    --found;
    return (const char*)address < (char*)found->first + found->second.bytes ? found : device.memory.end();
}

}  // namespace

// ---- kernels -----------------------------------------------------------------------------------------------------

namespace stand_in {

cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    if (!grid.x || !block.x || block.x * block.y * block.z > 1024) return answer(cudaErrorInvalidConfiguration);
    if (config.dynamicSmemBytes > fibers::kSharedBytes || grid.y != 1 || grid.z != 1)
        return answer(cudaErrorInvalidValue);
    fibers::nanoseconds = now;
    return enqueue(config.stream, {std::move(kernel), grid.x, (int)block.x, {}});
}

cudaError_t occupancy(int* blocks, int, size_t shared_bytes) {
    *blocks = shared_bytes > fibers::kSharedBytes ? 0 : kBlocksPerMultiprocessor;
    return cudaSuccess;
}

void stand_in_fault(const char* function, cudaError_t error) {
    const std::lock_guard<std::mutex> guard(device.lock);
    device.faults[function] = error;
}

}  // namespace stand_in

// ---- devices and errors ------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count();
    return is_forked() ? answer(cudaErrorInitializationError) : cudaSuccess;
}
cudaError_t cudaGetDevice(int* found) {
    *found = current;
    return is_forked() ? answer(cudaErrorInitializationError) : cudaSuccess;
}
cudaError_t cudaSetDevice(int wanted) {
    if (is_forked()) return answer(cudaErrorInitializationError);
    if (wanted < 0 || wanted >= device_count()) return answer(cudaErrorInvalidDevice);
    return current = wanted, cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int which) {
    std::snprintf(properties->uuid.bytes, sizeof properties->uuid.bytes, "stand-in GPU %d", which);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    MAY_FAIL();
    return *value = kMultiprocessors, cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return wait_until(all_idle); }
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
    static const std::map<int, const char*> names = {
        {0, "cudaSuccess"},
        {1, "cudaErrorInvalidValue"},
        {2, "cudaErrorMemoryAllocation"},
        {3, "cudaErrorInitializationError"},
        {9, "cudaErrorInvalidConfiguration"},
        {101, "cudaErrorInvalidDevice"},
        {201, "cudaErrorDeviceUninitialized"},
        {217, "cudaErrorPeerAccessUnsupported"},
        {400, "cudaErrorInvalidResourceHandle"},
        {600, "cudaErrorNotReady"},
        {712, "cudaErrorHostMemoryAlreadyRegistered"},
        {713, "cudaErrorHostMemoryNotRegistered"},
        {900, "cudaErrorStreamCaptureUnsupported"},
    };
    const auto found = names.find(error);
    return found == names.end() ? "cudaErrorUnknown" : found->second;
}
const char* cudaGetErrorString(cudaError_t) { return "as the stand-in for CUDA's runtime says"; }

// ---- memory ------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** address, size_t bytes) {
    MAY_FAIL();
    NOT_IN_CAPTURE();
    const std::lock_guard<std::mutex> guard(device.lock);
    if (used() + bytes > kDeviceBytes) return answer(cudaErrorMemoryAllocation);
    const int descriptor = memfd_create("stand-in-device-memory", MFD_CLOEXEC);
    if (descriptor < 0 || ftruncate(descriptor, bytes) || !(*address = map(descriptor, bytes)))
        return answer(cudaErrorMemoryAllocation);
    std::memset(*address, 0xCB, bytes);  // a GPU promises no zeros
    device.memory[*address] = {bytes, descriptor};
    return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
    if (!address) return cudaSuccess;
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> guard(device.lock);
    const auto found = device.memory.find(address);
    if (found == device.memory.end() || found->second.descriptor < 0) return answer(cudaErrorInvalidValue);
    munmap(address, found->second.bytes);
    close(found->second.descriptor);
    device.memory.erase(found);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    const std::lock_guard<std::mutex> guard(device.lock);
    *total = kDeviceBytes, *free = kDeviceBytes - used();
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    if (const cudaError_t error = cudaStreamSynchronize(nullptr); error != cudaSuccess) return error;
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
    {
        const std::lock_guard<std::mutex> guard(device.lock);
        const auto found = holding(address);
        if (found == device.memory.end()) return answer(cudaErrorInvalidValue);
    }
    return enqueue(nullptr, {[=] { std::memset(address, value, bytes); }, 0, 0, {}});
}

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
    MAY_FAIL();
    NOT_IN_CAPTURE();
    *address = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    const std::lock_guard<std::mutex> guard(device.lock);
    device.host[*address] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* address) {
    const std::lock_guard<std::mutex> guard(device.lock);
    if (!device.host.erase(address)) return answer(cudaErrorInvalidValue);
    std::free(address);
    return cudaSuccess;
}

// The device sees registered memory at another address, as some do.
cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
    MAY_FAIL();
    const std::lock_guard<std::mutex> guard(device.lock);
    if (device.pinned.count(address)) return answer(cudaErrorHostMemoryAlreadyRegistered);
    const size_t pages = (bytes + 4095) / 4096 * 4096;
    void* mapped = mremap(address, 0, pages, MREMAP_MAYMOVE);  // of shared memory: a second mapping
    if (mapped == MAP_FAILED) return answer(cudaErrorInvalidValue);
    device.pinned[address] = {mapped, pages};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> guard(device.lock);
    const auto found = device.pinned.find(address);
    if (found == device.pinned.end()) return answer(cudaErrorHostMemoryNotRegistered);
    munmap(found->second.mapped, found->second.bytes);
    device.pinned.erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** mapped, void* address, unsigned) {
    const std::lock_guard<std::mutex> guard(device.lock);
    const auto found = device.pinned.find(address);
    if (found != device.pinned.end()) return *mapped = found->second.mapped, cudaSuccess;
    if (device.host.count(address)) return *mapped = address, cudaSuccess;
    return answer(cudaErrorInvalidValue);
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* address) {
    MAY_FAIL();
    const std::lock_guard<std::mutex> guard(device.lock);
    const auto found = holding(address);
    if (found == device.memory.end() || found->second.descriptor < 0) return answer(cudaErrorInvalidValue);
    const Exported exported = {(int)getpid(), found->second.descriptor, found->second.bytes};
    std::memset(handle, 0, sizeof *handle);
    std::memcpy(handle, &exported, sizeof exported);
    return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** address, cudaIpcMemHandle_t handle, unsigned) {
    const cudaError_t wrong = fault(__func__);
    if (wrong != cudaSuccess && wrong != cudaErrorNotReady) return answer(wrong);
    Exported exported;
    std::memcpy(&exported, &handle, sizeof exported);
    if (exported.process == (int)getpid()) return answer(cudaErrorDeviceUninitialized);  // as CUDA says it
    const std::string path = "/proc/" + std::to_string(exported.process) + "/fd/" + std::to_string(exported.descriptor);
    const int descriptor = wrong == cudaErrorNotReady ? memfd_create("nobody's", MFD_CLOEXEC)
                                                      : open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (descriptor < 0) return answer(cudaErrorInvalidResourceHandle);
    if (wrong == cudaErrorNotReady && ftruncate(descriptor, exported.bytes)) return answer(cudaErrorInvalidValue);
    *address = map(descriptor, exported.bytes);
    close(descriptor);
    if (!*address) return answer(cudaErrorInvalidResourceHandle);
    const std::lock_guard<std::mutex> guard(device.lock);
    device.memory[*address] = {exported.bytes, -1};
    return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void* address) {
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> guard(device.lock);
    const auto found = device.memory.find(address);
    if (found == device.memory.end() || found->second.descriptor >= 0) return answer(cudaErrorInvalidValue);
    munmap(address, found->second.bytes);
    device.memory.erase(found);
    return cudaSuccess;
}

// ---- streams, events, graphs -------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    const std::lock_guard<std::mutex> guard(device.lock);
    *stream = device.streams.emplace_back(std::make_unique<Stream>()).get();
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return wait_until([&] { return idle(stream_of(stream)); });
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    const std::lock_guard<std::mutex> guard(device.lock);
    return idle(stream_of(stream)) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const uint64_t wanted = event->recorded;
    {  // what waits for an event of a capture joins it; a graph of the stand-in runs in the order in which it was made
        const std::lock_guard<std::mutex> guard(device.lock);
        if (event->capture) {
            Graph* graph = nullptr;
            each_stream([&](Stream& each) {
                if (each.capture && each.capture->number == event->capture) graph = each.capture;
            });
            if (!stream || !graph) return answer(cudaErrorStreamCaptureUnsupported);
            return stream->capture = graph, cudaSuccess;
        }
        if (stream_of(stream).capture) return answer(cudaErrorStreamCaptureUnsupported);  // of eager work, in a capture
    }
    return enqueue(stream, {[] {}, 0, 0, [=] { return event->reached >= wanted; }});
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void*), void* argument) {
    return enqueue(stream, {[=] { function(argument); }, 0, 0, {}});
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new Event, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // work that is queued may still name it
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    {
        const std::lock_guard<std::mutex> guard(device.lock);
        const Graph* graph = stream_of(stream).capture;
        event->capture = graph ? graph->number : 0;
        if (graph) return cudaSuccess;
    }
    const uint64_t turn = ++event->recorded;
    return enqueue(stream, {[=] { event->at = now(), event->reached = turn; }, 0, 0, {}});
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    const std::lock_guard<std::mutex> guard(device.lock);
    return event->reached == event->recorded ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return wait_until([&] { return event->reached == event->recorded; });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    if (!start->recorded || !end->recorded) return answer(cudaErrorInvalidResourceHandle);
    if (cudaEventQuery(start) != cudaSuccess || cudaEventQuery(end) != cudaSuccess) return answer(cudaErrorNotReady);
    *milliseconds = (float)((double)(int64_t)(end->at - start->at) * 1e-6);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    const std::lock_guard<std::mutex> guard(device.lock);
    if (!stream || stream->capture) return answer(cudaErrorStreamCaptureUnsupported);
    stream->capture = new Graph;
    stream->capture->number = ++device.capture_number;
    device.captures++;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    const std::lock_guard<std::mutex> guard(device.lock);
    *status = stream_of(stream).capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number) {
    const std::lock_guard<std::mutex> guard(device.lock);
    const Graph* graph = stream_of(stream).capture;
    *status = graph ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    *number = graph ? graph->number : 0;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const std::lock_guard<std::mutex> guard(device.lock);
    if (!stream || !stream->capture) return answer(cudaErrorInvalidValue);
    *graph = stream->capture;
    each_stream([&](Stream& each) {
        if (each.capture == *graph) each.capture = nullptr;
    });
    device.captures--;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraph_t graph, cudaStream_t stream) {
    for (const Work& each : graph->work)
        if (const cudaError_t error = enqueue(stream, each); error != cudaSuccess) return error;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
