// The flags of the fused collectives (collectives.h): who waits for whom, how it polls, and what happens at the deadline.
#pragma once

namespace flashcomm::FLASHCOMM_ISA {

// How a thread that waits for a flag polls, in nanoseconds: often at first; later so rarely that 66 blocks of a GPU
// read 1.4 GB/s of flags from host memory (64 bytes every 3 us each), a twentieth of a PCIe link.
constexpr uint64_t kSoon = 20'000;
constexpr uint32_t kShortRest = 40, kLongRest = 2'000;

// All threads are through with the phase: what they pushed is announced, sources of which nothing was read have come
// too, and the next phase begins. False: there is none, or a flag did not come.
template <class Reduce, class Gather, class T>
FC_DEVICE bool Worker<Reduce, Gather, T>::conclude() {
    const int peer = thread();
    const bool announces = peer < call.world && pushes;
    uint64_t* flag = (uint64_t*)(call.inbox[announces ? peer : rank] + Inbox::flag(rank, block));
    const Exchange exchange = leaving;
    const bool has_all = phase == kSend || peer >= call.world || has_come(peer) || spin(peer);
    if (!sync_and(has_all && !is_missing)) return false;
    // every thread has pushed: the release covers it
    if (announces && peer != rank) store_release(flag, exchange);
    if (announces && peer == rank) seen[rank] = exchange;
    if (peer == kThreads - 1) proceed();  // beside the fences of those that announce
    sync();
    return turn <= call.shape.rounds;
}

// The functions below are of the thread whose number is the source.
template <class Reduce, class Gather, class T>
FC_DEVICE bool Worker<Reduce, Gather, T>::poll(int source) {
    const Exchange flag = load_relaxed((const uint64_t*)(call.inbox[rank] + Inbox::flag(source, block)));
    if (!reached(flag, arriving)) return false;
    fence_acquire();
    seen[source] = flag;
    return true;
}

// Looks once at the flags that have not come: one read of a line. True in the threads that do.
template <class Reduce, class Gather, class T>
FC_DEVICE bool Worker<Reduce, Gather, T>::look() {
    const int source = thread();
    if (source >= call.world) return false;
    if (!has_come(source)) poll(source);
    return true;
}

template <class Reduce, class Gather, class T>
FC_DEVICE void Worker<Reduce, Gather, T>::await(int source) {
    if (look() && thread() == source && !has_come(source) && !spin(source)) is_missing = true;
    if (call.stall && call.stalled_rank == rank) wait_until(nanoseconds() + call.stall);
    sync();
}

// All blocks of a rank leave together, when one has waited too long. False: this one must.
template <class Reduce, class Gather, class T>
FC_DEVICE bool Worker<Reduce, Gather, T>::spin(int source) {
    if (is_missing) return false;
    const uint64_t start = nanoseconds();
    while (!poll(source)) {
        const uint64_t waited = nanoseconds() - start;
        if (waited >= call.deadline) return overdue(source);
        if (waited >= kSoon && load_relaxed(&control->error)) return false;
        rest(waited < kSoon ? kShortRest : kLongRest);
    }
    return true;
}

template <class Reduce, class Gather, class T>
FC_DEVICE bool Worker<Reduce, Gather, T>::overdue(int source) const {
    const uint64_t error = Overdue{is_sum() ? kReduceLeg : kGatherLeg, source, block, arriving}.packed();
    if (swap_if(&control->error, 0, error) == 0) store_release(control->host_error, error);
    return false;
}

// The last block of this rank to end hands the epoch to the next call.
template <class Reduce, class Gather, class T>
FC_DEVICE void Worker<Reduce, Gather, T>::end() const {
    sync();
    const bool is_last = thread() == 0 && count_up(&control->ended) + 1 == (uint32_t)call.shape.blocks;
    if (is_last) {
        control->ended = 0;
        control->epoch += call.shape.rounds * legs(call.kind);
    }
    if (!sync_and(thread() != 0 || (is_last && load_relaxed(&control->error)))) return;
    const int64_t values = call.kind == kReduceScatter ? call.shape.size(rank) : call.shape.numel;
    for (int64_t i = thread(); i < values; i += kThreads) out(0)[i] = (Word)T::kNan;
}

}  // namespace flashcomm::FLASHCOMM_ISA
