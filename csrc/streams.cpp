// The protocol of streams.h: moving bytes, sleeping, and noticing that nobody will come.
#include "streams.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#endif

namespace flashcomm {

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kPiece = 128 << 10;  // bytes after which the reader hears of them, so that both ends copy at once
constexpr auto kPatience = std::chrono::milliseconds(50);  // before asking whether the user is still there
constexpr auto kSpin = std::chrono::microseconds(40);
constexpr long kNap = 20'000'000;  // nanoseconds between two looks at the peers' health

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

void wait_for_change(std::atomic<uint32_t>& word, uint32_t seen) {
    timespec nap{0, kNap};
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &nap, nullptr, 0);
#else
    nap.tv_nsec = kNap / 200;
    if (word.load() == seen) nanosleep(&nap, nullptr);
#endif
}

void wake(std::atomic<uint32_t>& word) {
    word.fetch_add(1);
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
#endif
}

bool is_locked(int descriptor) {  // by another process
    struct flock query = {};
    query.l_type = F_WRLCK;
    query.l_whence = SEEK_SET;
    query.l_len = 1;
    return fcntl(descriptor, F_GETLK, &query) != 0 || query.l_type != F_UNLCK;
}

struct Groups {  // all that this process has streams of
    std::mutex mutex;
    std::vector<Streams*> all;
};

Groups& groups() {
    static Groups* const groups = new Groups;  // outlives whatever the interpreter destroys last
    return *groups;
}

struct Span {
    uint8_t* start;
    uint64_t bytes;
};

// What is still to be moved of a message, in one piece: of its frame, then of its data.
template <class Message> Span rest(const Message& message, Frame& frame) {
    if (message.done < sizeof(Frame)) return {(uint8_t*)&frame + message.done, sizeof(Frame) - message.done};
    const uint64_t done = message.done - sizeof(Frame);
    return {message.data + done, message.frame.bytes - done};
}

template <class Message> bool finished(const Message& message) {
    return message.done == sizeof(Frame) + message.frame.bytes;
}

// Bytes of a span that can be copied at once: what the ring holds or has room for, up to its end.
uint64_t piece(uint64_t span, uint64_t ring, uint64_t position, uint64_t capacity) {
    return std::min({span, ring, capacity - position % capacity, kPiece});
}

}  // namespace

uint64_t Streams::segment_bytes(int world, uint64_t capacity) {
    return sizeof(SegmentHeader) + world * (sizeof(Ring) + capacity);
}

Streams::Streams(int rank, std::vector<std::uintptr_t> segments, std::vector<int> locks, uint64_t capacity)
    : capacity_(capacity), mine_((SegmentHeader*)segments[rank]), peers_(segments.size()) {
    const int world = (int)segments.size();
    const auto here = world - std::count(segments.begin(), segments.end(), 0);
    crowded_ = here > (long)std::thread::hardware_concurrency();
    const auto ring = [&](int owner, int reader) {
        return (Ring*)(segments[owner] + sizeof(SegmentHeader)) + reader;
    };
    const auto data = [&](int owner, int reader) {
        return (uint8_t*)(ring(owner, world)) + reader * capacity;
    };
    for (int r = 0; r < world; r++) {
        if (r == rank || !segments[r]) continue;
        Peer& peer = peers_[r];
        peer.header = (SegmentHeader*)segments[r];
        peer.lock = locks[r];
        peer.out = ring(rank, r), peer.out_data = data(rank, r);
        peer.in = ring(r, rank), peer.in_data = data(r, rank);
    }
    const std::lock_guard<std::mutex> guard(groups().mutex);
    groups().all.push_back(this);
}

Streams::~Streams() {
    const std::lock_guard<std::mutex> guard(groups().mutex);
    auto& all = groups().all;
    all.erase(std::find(all.begin(), all.end(), this));
}

Streams::Handle Streams::start(const std::vector<Posting>& sends, const std::vector<Posting>& receives,
                               const std::string& what) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto handle = std::make_shared<Exchange>();
    const auto post = [&](std::deque<Message>& queue, const Posting& posting) {
        if (!posting.bytes) return;
        Message message{{posting.bytes, {}}, {}, (uint8_t*)posting.address, 0, handle};
        std::strncpy(message.frame.what, what.c_str(), sizeof message.frame.what - 1);
        queue.push_back(std::move(message));
        handle->open++;
    };
    for (size_t r = 0; r < peers_.size(); r++) {
        if (!peers_[r].header) continue;
        post(peers_[r].sends, sends[r]);
        post(peers_[r].receives, receives[r]);
    }
    if (first_.failure == Failure::none) progress();
    return handle;
}

Outcome Streams::wait(const Handle& handle, double seconds, bool (*interrupted)()) {
    const std::lock_guard<std::mutex> guard(mutex_);
    moved_ = Clock::now();
    while (is_open(handle)) {
        if (progress()) continue;
        const auto idle = Clock::now() - moved_;
        if (idle < kSpin && !crowded_) {
            pause();
            continue;
        }
        if (progress_of_other_groups()) {
            moved_ = Clock::now();
            continue;
        }
        check_peers();
        if (idle > kPatience && interrupted && interrupted()) return {Failure::interrupted, -1, ""};
        if (idle > std::chrono::duration<double>(seconds)) give_up();
        if (is_open(handle)) sleep();
    }
    return handle->open ? first_ : Outcome{};
}

bool Streams::progress() {
    bool moved = false;
    for (int r = 0; r < (int)peers_.size(); r++) {
        if (!peers_[r].header) continue;
        moved |= push(peers_[r]);
        moved |= pull(peers_[r], r);
    }
    if (moved) moved_ = Clock::now();
    return moved;
}

// Whom this rank waits for may be waiting for it in another group. A thread that is inside that group does it itself.
bool Streams::progress_of_other_groups() {
    bool moved = false;
    const std::lock_guard<std::mutex> guard(groups().mutex);
    for (Streams* other : groups().all) {
        if (other == this) continue;
        const std::unique_lock<std::mutex> free(other->mutex_, std::try_to_lock);
        if (free && other->first_.failure == Failure::none) moved |= other->progress();
    }
    return moved;
}

bool Streams::push(Peer& peer) {
    bool moved = false;
    while (!peer.sends.empty()) {
        Message& message = peer.sends.front();
        const uint64_t written = peer.out->written.value.load(std::memory_order_relaxed);
        const uint64_t room = capacity_ - (written - peer.out->taken.value.load());
        const Span span = rest(message, message.frame);
        const uint64_t bytes = piece(span.bytes, room, written, capacity_);
        if (!bytes) break;
        std::memcpy(peer.out_data + written % capacity_, span.start, bytes);
        peer.out->written.value.store(written + bytes);
        message.done += bytes;
        moved = true;
        if (!finished(message) && message.done == sizeof(Frame)) continue;  // the data follow: one ring for both
        ring(peer);
        if (finished(message)) {
            message.owner->open--;
            peer.sends.pop_front();
        }
    }
    return moved;
}

bool Streams::pull(Peer& peer, int rank) {
    bool moved = false;
    while (!peer.receives.empty() && first_.failure == Failure::none) {
        Message& message = peer.receives.front();
        const uint64_t taken = peer.in->taken.value.load(std::memory_order_relaxed);
        const uint64_t held = peer.in->written.value.load() - taken;
        const Span span = rest(message, message.arrived);
        const uint64_t bytes = piece(span.bytes, held, taken, capacity_);
        if (!bytes) break;
        std::memcpy(span.start, peer.in_data + taken % capacity_, bytes);
        peer.in->taken.value.store(taken + bytes);
        message.done += bytes;
        moved = true;
        ring(peer);
        if (message.done == sizeof(Frame) && std::memcmp(&message.arrived, &message.frame, sizeof(Frame))) {
            fail(Failure::mismatch, rank, std::string(message.arrived.what, strnlen(message.arrived.what, 55)));
        } else if (finished(message)) {
            message.owner->open--;
            peer.receives.pop_front();
        }
    }
    return moved;
}

void Streams::ring(Peer& peer) {
    if (peer.header->asleep.load()) wake(peer.header->doorbell);
}

void Streams::fail(Failure failure, int peer, std::string theirs) {
    if (first_.failure != Failure::none) return;
    first_ = {failure, peer, std::move(theirs)};
    mine_->failed.store(1);
    for (Peer& each : peers_)
        if (each.header) ring(each);
}

// Called when nothing moves: whoever this rank waits for may have given up or be gone. What they wrote before is read.
void Streams::check_peers() {
    for (int r = 0; r < (int)peers_.size(); r++) {
        Peer& peer = peers_[r];
        if (!peer.header || (peer.receives.empty() && peer.sends.empty())) continue;
        const bool gave_up = peer.header->failed.load(), died = peer.lock >= 0 && !is_locked(peer.lock);
        if ((gave_up || died) && !progress()) fail(died ? Failure::died : Failure::gave_up, r);
    }
}

void Streams::give_up() {
    const auto sends_nothing = [](const Peer& peer) { return !peer.receives.empty(); };
    const auto takes_nothing = [](const Peer& peer) { return !peer.sends.empty(); };
    auto slow = std::find_if(peers_.begin(), peers_.end(), sends_nothing);
    if (slow == peers_.end()) slow = std::find_if(peers_.begin(), peers_.end(), takes_nothing);
    fail(Failure::deadline, (int)(slow - peers_.begin()));
}

void Streams::sleep() {
    const uint32_t seen = mine_->doorbell.load();
    mine_->asleep.store(1);
    if (!progress() && first_.failure == Failure::none) wait_for_change(mine_->doorbell, seen);
    mine_->asleep.store(0);
}

}  // namespace flashcomm
