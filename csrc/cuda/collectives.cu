// Workspaces: memory and launches of the fused collectives. Kernels: collective_part.cu; the idea: collectives.h.
#include "cuda/collective_part.h"

#include <map>
#include <mutex>

#include "cuda/instances.h"
#include "cuda/launch.h"
#include "cuda/workspace.h"

namespace flashcomm {

using namespace FLASHCOMM_ISA;

namespace {

// Workspaces whose grids are resident on a device together, so that they may wait for their peers in any order: each
// launches a fourth of the blocks that the device holds (66 on an H100, 54 on an A100).
constexpr int kWorkspacesAtOnce = 4;

Setting setting(const flashcomm::Leg& leg) { return {leg.format, leg.bits, leg.block}; }

Kernel kernel_for(const Request& request, const Capacity& capacity) {
    Kernel kernel;
    with_part(request.reduce.format, request.dtype, [&](auto type, auto is_uniform) {
        using Part = CollectivePart<typename decltype(type)::type, is_uniform.value>;
        kernel = Part::kernel(request, setting(request.reduce), setting(request.gather), capacity);
    });
    if (!kernel.function || kernel.shape.tile == 0)
        throw std::runtime_error("flash-comm: no fused kernel for legs of " + std::to_string(request.reduce.bits) +
                                 " and " + std::to_string(request.gather.bits) + " bits in such blocks.");
    return kernel;
}

// Blocks that wait for each other must all be resident; asked once for each kernel and device.
void check_resident(const Kernel& kernel, int device, int blocks) {
    static std::mutex lock;
    static std::map<std::pair<int, const void*>, int> most;
    const std::lock_guard<std::mutex> guard(lock);
    int& resident = most[{device, (const void*)kernel.function}];
    if (resident == 0) {
        int each = 0, multiprocessors = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, kThreads, 48 * 1024),
              "asking for occupancy");
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
              "asking for the device");
        resident = each * multiprocessors;
    }
    if (blocks > resident)
        throw std::runtime_error("flash-comm: " + std::to_string(blocks) +
                                 " thread blocks that wait for each other, but only " + std::to_string(resident) +
                                 " fit on the device at once.");
}

// The number of the capture that a stream is part of; 0: none.
uint64_t capture_of(void* stream) {
    cudaStreamCaptureStatus status;
    unsigned long long number = 0;
    check(cudaStreamGetCaptureInfo((cudaStream_t)stream, &status, &number), "asking for a capture");
    return status == cudaStreamCaptureStatusActive ? number : 0;
}

Capacity capacity_of(int world, int blocks, int64_t region) { return {world, blocks, region}; }

}  // namespace

bool has_collective(const flashcomm::Leg& reduce, const flashcomm::Leg& gather, int dtype, bool with_residuals) {
    return serves(setting(reduce), setting(gather), dtype, with_residuals);
}

int64_t inbox_bytes(int world, int64_t region) { return Inbox{world, region}.bytes(); }
int64_t slot_bytes() { return kSlotBytes; }

int device_blocks(int device) {
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking for the device");
    const int blocks = multiprocessors * kBlocksPerMultiprocessor / kWorkspacesAtOnce;
    return blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

Workspace::Workspace(int device, int world, int first, int ranks, int blocks, int64_t region,
                     std::vector<uintptr_t> inboxes)
    : device_(device), world_(world), first_(first), ranks_(ranks), blocks_(blocks), region_(region),
      inboxes_(std::move(inboxes)) {
    if (world < 2 || world > kMaxWorld || (int)inboxes_.size() != world || blocks < 1 || blocks > kMaxBlocks ||
        region < blocks * kSlotBytes)
        throw std::runtime_error(
            "flash-comm: a workspace has 2 to 8 ranks, an inbox for each, and a slot for each block.");
    try {
        allocate();
    } catch (...) {
        release();
        throw;
    }
}

void Workspace::allocate() {
    const OnDevice on(device_);
    check(cudaEventCreateWithFlags((cudaEvent_t*)&launched_, cudaEventDisableTiming), "making an event");
    check(cudaEventCreateWithFlags((cudaEvent_t*)&captured_, cudaEventDisableTiming), "making an event");
    check(cudaMalloc(&controls_, sizeof(Control) * ranks_), "allocating control words");
    check(cudaMalloc((void**)&own_, Inbox{world_, region_}.own_bytes() * ranks_), "allocating own slots");
    check(cudaHostAlloc((void**)&host_errors_, sizeof(uint64_t) * ranks_, cudaHostAllocMapped | cudaHostAllocPortable),
          "allocating error words");
    void* seen_by_device = nullptr;
    check(cudaHostGetDevicePointer(&seen_by_device, host_errors_, 0), "mapping error words");
    std::vector<Control> controls(ranks_);
    for (int i = 0; i < ranks_; i++) {
        host_errors_[i] = 0;
        controls[i] = {0, 0, (uint64_t*)seen_by_device + i, 0};
    }
    check(cudaMemcpy(controls_, controls.data(), sizeof(Control) * ranks_, cudaMemcpyHostToDevice),
          "writing control words");
    check(cudaDeviceSynchronize(), "writing control words");
}

Workspace::~Workspace() {
    try {
        close();
    } catch (const std::exception&) {  // the device is gone, and the memory with it
    }
}

void Workspace::close() {
    if (!controls_) return;
    const OnDevice on(device_);
    const cudaError_t waited = cudaDeviceSynchronize();
    release();
    check(waited, "waiting for the last collective");
}

void Workspace::release() {
    cudaFree(controls_);
    cudaFree(own_);
    if (host_errors_) cudaFreeHost(host_errors_);
    for (void** event : {&launched_, &captured_}) {
        if (*event) cudaEventDestroy((cudaEvent_t)*event);
        *event = nullptr;
    }
    controls_ = nullptr, own_ = nullptr, host_errors_ = nullptr;
}

void Workspace::launch(const Request& request) {
    if (!controls_) throw std::runtime_error("flash-comm: the workspace is closed.");
    const OnDevice on(device_);
    const Kernel kernel = kernel_for(request, capacity_of(world_, blocks_, region_));
    check_resident(kernel, device_, kernel.shape.blocks * ranks_);
    Call call{};
    call.kind = (Collective)request.kind, call.shape = kernel.shape;
    call.world = world_, call.first = first_, call.ranks = ranks_;
    call.reduce = setting(request.reduce), call.gather = setting(request.gather);
    call.region = region_, call.deadline = (uint64_t)(request.deadline * 1e9);
    call.stalled_rank = request.stalled_rank, call.stall = (uint64_t)(request.stall * 1e9);
    call.single_buffer = request.single_buffer;
    for (int i = 0; i < ranks_; i++) {
        call.x[i] = (const void*)request.x.at(i);
        call.out[i] = (void*)request.out.at(i);
        for (int leg = 0; leg < kLegs && !request.residuals.empty(); leg++)
            call.residuals[leg][i] = (void*)request.residuals.at(leg * ranks_ + i);
        call.control[i] = (Control*)controls_ + i;
        call.own[i] = own_ + i * Inbox{world_, region_}.own_bytes();
    }
    for (int rank = 0; rank < world_; rank++) call.inbox[rank] = (uint8_t*)inboxes_[rank];
    const Grid grid = {kernel.shape.blocks * ranks_, kThreads, kernel.shared_bytes, (void*)request.stream};
    take_turn((void*)request.stream);
    flashcomm::launch("launching a collective", kernel.function, grid, call);
    end_turn((void*)request.stream);
}

// Kernels of one workspace must not overlap, whichever streams they are launched on: each waits for the event behind
// the last one. In a capture the events are the graph's own edges. Who replays a graph orders it with other calls.
void Workspace::take_turn(void* stream) {
    const uint64_t capture = capture_of(stream);
    if (stream == (capture ? captured_on_ : launched_on_) && capture == capture_) return;
    if (capture && capture == capture_)
        check(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)captured_, 0), "joining streams of a capture");
    if (!capture && has_launched_)
        check(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)launched_, 0), "waiting for another stream");
}

void Workspace::end_turn(void* stream) {
    capture_ = capture_of(stream);
    (capture_ ? captured_on_ : launched_on_) = stream;
    has_launched_ |= !capture_;
    check(cudaEventRecord((cudaEvent_t)(capture_ ? captured_ : launched_), (cudaStream_t)stream), "recording an event");
}

std::vector<int64_t> Workspace::shape(const Request& request) const {
    const Shape shape = kernel_for(request, capacity_of(world_, blocks_, region_)).shape;
    return {shape.rounds, shape.tile, shape.blocks, shape.depth, shape.stride};
}

std::vector<int64_t> Workspace::error() const {
    for (int i = 0; host_errors_ && i < ranks_; i++) {
        const uint64_t word = ((const volatile uint64_t*)host_errors_)[i];
        if (!word) continue;
        const Overdue overdue = Overdue::of(word);
        return {overdue.leg, overdue.rank, overdue.block, (int64_t)overdue.exchange};
    }
    return {};
}

void Workspace::preset(uint64_t epoch) {
    const OnDevice on(device_);
    const std::vector<uint64_t> flags(Inbox::kFlagBytes / sizeof(uint64_t), epoch);
    for (int i = 0; i < ranks_; i++) {
        void* inbox = (void*)inboxes_[first_ + i];
        check(cudaMemcpy((Control*)controls_ + i, &epoch, sizeof epoch, cudaMemcpyHostToDevice), "presetting an epoch");
        check(cudaMemcpy(inbox, flags.data(), Inbox::kFlagBytes, cudaMemcpyDefault), "presetting flags");
    }
    check(cudaDeviceSynchronize(), "presetting the epoch");
}

}  // namespace flashcomm
