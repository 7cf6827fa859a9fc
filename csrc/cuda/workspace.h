// What the fused collectives offer to Python: memory that ranks can share, and a workspace that launches on it.
//
// The memory of a workspace is allocated here and not by torch: its caching allocator hands out parts of segments,
// whose IPC handles would name the whole segment, and under expandable segments there are none.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace flashcomm {

// Every function throws std::runtime_error with what CUDA reports. Addresses are of the device.
int device_blocks(int device);  // thread blocks that one workspace may launch
std::string device_uuid(int device);
uintptr_t device_allocate(int device, int64_t bytes);  // zeroed, and the device has seen it
void device_free(int device, uintptr_t address);
std::string ipc_handle(int device, uintptr_t address);
uintptr_t ipc_open(int device, const std::string& handle);
void ipc_close(int device, uintptr_t address);
uintptr_t host_register(int device, uintptr_t address, int64_t bytes);  // host memory as the device addresses it
void host_unregister(uintptr_t address);

int64_t inbox_bytes(int world, int64_t region);
int64_t slot_bytes();

struct Leg {
    int format, bits, block;  // as in Spec of api.h
};

bool has_collective(const Leg& reduce, const Leg& gather, int dtype, bool with_residuals);  // see Request::residuals

// One call. Addresses are those of this launch's ranks.
struct Request {
    int kind;  // Collective of shape.h
    Leg reduce, gather;
    int dtype;
    int64_t numel, slice;  // values of the whole, of a rank's slice (shape.h)
    std::vector<uintptr_t> x, out;
    std::vector<uintptr_t> residuals;  // of the reduce leg, then of the gather leg; or none
    uintptr_t stream;
    double deadline;  // seconds
    int stalled_rank = 0;
    double stall = 0;  // seconds
    bool single_buffer = false;
};

// The ranks first .. first + ranks - 1 of a group of `world`, whose inboxes are addressed by `inboxes`; the control
// words of these ranks, and what they send themselves, belong to it.
//
// Calls may come on any stream: each waits, by an event, for the call before it. Workspaces of one device may be
// launched in different orders by different ranks, on different streams: up to four of them are resident together.
class Workspace {
public:
    Workspace(int device, int world, int first, int ranks, int blocks, int64_t region, std::vector<uintptr_t> inboxes);
    ~Workspace();
    Workspace(const Workspace&) = delete;

    void launch(const Request& request);
    std::vector<int64_t> shape(const Request& request) const;  // rounds, tile, blocks, depth, stride
    // {leg, missing rank, block, round} of the first flag that did not come in time, or nothing. Waits for no device.
    std::vector<int64_t> error() const;
    void preset(uint64_t epoch);  // as if so many rounds had passed: own epoch and own inbox's flags
    void close();

private:
    void allocate();
    void release();

    int device_, world_, first_, ranks_, blocks_;
    int64_t region_;
    std::vector<uintptr_t> inboxes_;
    void* controls_ = nullptr;
    uint8_t* own_ = nullptr;
    uint64_t* host_errors_ = nullptr;

    void take_turn(void* stream);
    void end_turn(void* stream);
    void *launched_ = nullptr, *captured_ = nullptr;        // events behind the last eager and the last captured call
    void *launched_on_ = nullptr, *captured_on_ = nullptr;  // their streams
    uint64_t capture_ = 0;                                  // the capture that the last call was part of; 0: none
    bool has_launched_ = false;
};

}  // namespace flashcomm
