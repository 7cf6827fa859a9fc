// Moving bytes through shared memory, sleeping, and seeing that a process has ended: ring.h.
#include "cpu/ring.h"

#include <fcntl.h>
#include <time.h>

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashcomm {

namespace {

constexpr uint64_t kPiece = 128 << 10;  // bytes after which the reader hears of them, so that both ends copy at once
constexpr long kNap = 20'000'000;       // nanoseconds between two looks at the peers' health

void wake(std::atomic<uint32_t>& doorbell) {
    doorbell.fetch_add(1);
#if defined(__linux__)
    syscall(SYS_futex, &doorbell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
#endif
}

bool is_locked(int descriptor) {  // by another process
    struct flock query = {};
    query.l_type = F_WRLCK;
    query.l_whence = SEEK_SET;
    query.l_len = 1;
    return fcntl(descriptor, F_GETLK, &query) != 0 || query.l_type != F_UNLCK;
}

Ring* ring_of(uint8_t* segment, int reader) { return (Ring*)(segment + sizeof(SegmentHeader)) + reader; }

uint8_t* data_of(uint8_t* segment, int reader, int world, uint64_t capacity) {
    return (uint8_t*)ring_of(segment, world) + reader * capacity;
}

// Bytes that can be copied at once: what the ring holds or has room for, up to its end.
uint64_t piece(uint64_t wanted, uint64_t there, uint64_t position, uint64_t capacity) {
    return std::min({wanted, there, capacity - position % capacity, kPiece});
}

}  // namespace

uint64_t segment_bytes(int world, uint64_t capacity) {
    return sizeof(SegmentHeader) + world * (sizeof(Ring) + capacity);
}

void wait_for_change(std::atomic<uint32_t>& doorbell, uint32_t seen) {
    timespec nap{0, kNap};
#if defined(__linux__)
    syscall(SYS_futex, &doorbell, FUTEX_WAIT, seen, &nap, nullptr, 0);
#else
    nap.tv_nsec = kNap / 200;
    if (doorbell.load() == seen) nanosleep(&nap, nullptr);
#endif
}

Rings::Rings(int rank, int peer, int world, uint8_t* mine, uint8_t* theirs, int lock, uint64_t capacity)
    : capacity_(capacity), lock_(lock), mine_((SegmentHeader*)mine), theirs_((SegmentHeader*)theirs),
      out_(ring_of(mine, peer)), in_(ring_of(theirs, rank)), out_data_(data_of(mine, peer, world, capacity)),
      in_data_(data_of(theirs, rank, world, capacity)) {}

uint64_t Rings::write(const uint8_t* from, uint64_t bytes, bool more) {
    const uint64_t written = out_->written.value.load(std::memory_order_relaxed);
    const uint64_t room = capacity_ - (written - out_->taken.value.load());
    const uint64_t moved = piece(bytes, room, written, capacity_);
    if (!moved) return 0;
    std::memcpy(out_data_ + written % capacity_, from, moved);
    out_->written.value.store(written + moved);
    if (!more) ring();
    return moved;
}

uint64_t Rings::read(uint8_t* to, uint64_t bytes) {
    const uint64_t taken = in_->taken.value.load(std::memory_order_relaxed);
    const uint64_t held = in_->written.value.load() - taken;
    const uint64_t moved = piece(bytes, held, taken, capacity_);
    if (!moved) return 0;
    std::memcpy(to, in_data_ + taken % capacity_, moved);
    in_->taken.value.store(taken + moved);
    ring();
    return moved;
}

Failure Rings::state() const {
    if (lock_ >= 0 && !is_locked(lock_)) return Failure::died;
    return theirs_->failed.load() ? Failure::gave_up : Failure::none;
}

void Rings::give_up() {
    mine_->failed.store(1);
    ring();
}

void Rings::ring() {
    if (theirs_->asleep.load()) wake(theirs_->doorbell);
}

}  // namespace flashcomm
