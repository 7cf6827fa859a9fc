// The protocol of streams.h: queues of messages, sleeping, and noticing that nobody will come.
#include "cpu/streams.h"

#include <algorithm>
#include <cstring>
#include <thread>

namespace flashcomm {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPatience = std::chrono::milliseconds(50);  // before asking whether the user is still there
constexpr auto kSpin = std::chrono::microseconds(40);

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
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

}  // namespace

Streams::Streams(int rank, const std::vector<End>& ends, uint64_t capacity)
    : mine_((SegmentHeader*)ends[rank].segment), spins_(ends.size() <= std::thread::hardware_concurrency()),
      peers_(ends.size()) {
    const int world = (int)ends.size();
    for (int r = 0; r < world; r++) {
        if (r == rank) continue;
        peers_[r].rings = std::make_unique<Rings>(rank, r, world, (uint8_t*)ends[rank].segment,
                                                  (uint8_t*)ends[r].segment, ends[r].lock, capacity);
    }
    const std::lock_guard<std::mutex> guard(groups().mutex);
    groups().all.push_back(this);
}

Streams::~Streams() {
    const std::lock_guard<std::mutex> guard(groups().mutex);
    auto& all = groups().all;
    all.erase(std::find(all.begin(), all.end(), this));
}

Streams::Handle Streams::start(const std::vector<Posting>& sends, const std::vector<Posting>& receives, uint64_t number,
                               const std::string& what) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto handle = std::make_shared<Exchange>();
    const auto post = [&](std::deque<Message>& queue, const Posting& posting) {
        if (!posting.bytes) return;
        Message message{{posting.bytes, number, {}}, {}, (uint8_t*)posting.address, 0, handle};
        std::strncpy(message.frame.what, what.c_str(), sizeof message.frame.what - 1);
        queue.push_back(std::move(message));
        handle->open++;
    };
    for (size_t r = 0; r < peers_.size(); r++) {
        if (!peers_[r].rings) continue;
        post(peers_[r].sends, sends[r]);
        post(peers_[r].receives, receives[r]);
    }
    if (first_.failure == Failure::none) progress();
    return handle;
}

Outcome Streams::wait(const Handle& handle, double seconds, bool (*interrupted)(), double patience) {
    const std::lock_guard<std::mutex> guard(mutex_);
    moved_ = Clock::now();
    while (is_open(handle)) {
        if (progress()) continue;
        const auto idle = Clock::now() - moved_;
        if (idle < kSpin && spins_) {
            pause();
            continue;
        }
        if (progress_of_other_groups()) {
            moved_ = Clock::now();
            continue;
        }
        check_peers();
        if (idle > kPatience && interrupted && interrupted()) return {Failure::interrupted, -1, ""};
        if (idle > std::chrono::duration<double>(seconds)) fail(Failure::deadline, slow());
        if (is_open(handle) && idle > std::chrono::duration<double>(patience)) return {Failure::impatient, slow(), ""};
        if (is_open(handle)) sleep();
    }
    return handle->open ? first_ : Outcome{};
}

bool Streams::progress() {
    bool moved = false;
    for (int r = 0; r < (int)peers_.size(); r++) {
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
        const Span span = rest(message, message.frame);
        const bool is_frame = message.done < sizeof(Frame);
        const uint64_t bytes = peer.rings->write(span.start, span.bytes, is_frame);
        if (!bytes) break;
        message.done += bytes;
        moved = true;
        if (!finished(message)) continue;
        message.owner->open--;
        peer.sends.pop_front();
    }
    return moved;
}

bool Streams::pull(Peer& peer, int rank) {
    bool moved = false;
    while (!peer.receives.empty() && first_.failure == Failure::none) {
        Message& message = peer.receives.front();
        const Span span = rest(message, message.arrived);
        const uint64_t bytes = peer.rings->read(span.start, span.bytes);
        if (!bytes) break;
        message.done += bytes;
        moved = true;
        if (message.done == sizeof(Frame) && std::memcmp(&message.arrived, &message.frame, sizeof(Frame))) {
            const Frame& theirs = message.arrived;
            fail(Failure::mismatch, rank,
                 "#" + std::to_string(theirs.number) + "/" +
                     std::string(theirs.what, strnlen(theirs.what, sizeof theirs.what)));
        } else if (finished(message)) {
            message.owner->open--;
            peer.receives.pop_front();
        }
    }
    return moved;
}

void Streams::fail(Failure failure, int peer, std::string theirs) {
    if (first_.failure != Failure::none) return;
    first_ = {failure, peer, std::move(theirs)};
    for (Peer& each : peers_)
        if (each.rings) each.rings->give_up();
}

// Called when nothing moves: whoever this rank waits for may have given up or be gone. What they wrote before is read.
void Streams::check_peers() {
    for (int r = 0; r < (int)peers_.size(); r++) {
        if (!peers_[r].waits()) continue;
        const Failure found = peers_[r].rings->state();
        if (found != Failure::none && !progress()) fail(found, r);
    }
}

// A rank that is waited for.
int Streams::slow() const {
    const auto sends_nothing = [](const Peer& peer) { return !peer.receives.empty(); };
    const auto takes_nothing = [](const Peer& peer) { return !peer.sends.empty(); };
    auto slow = std::find_if(peers_.begin(), peers_.end(), sends_nothing);
    if (slow == peers_.end()) slow = std::find_if(peers_.begin(), peers_.end(), takes_nothing);
    return (int)(slow - peers_.begin());
}

void Streams::sleep() {
    const uint32_t seen = mine_->doorbell.load();
    mine_->asleep.store(1);
    if (!progress() && first_.failure == Failure::none) wait_for_change(mine_->doorbell, seen);
    mine_->asleep.store(0);
}

}  // namespace flashcomm
