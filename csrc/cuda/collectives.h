// Quantized all-reduce, reduce-scatter and all-gather in one kernel: what a thread block does.
//
// The idea
// --------
// A tile is encoded in registers and shared memory and its payload pushed straight into the inboxes of other ranks; a
// flag follows; the reader decodes from its own inbox. Nothing is staged in between, and the four collectives are one
// program with steps left out:
//
//                       push                    await     then
//     two-step          scatter   reduce leg    reduce    sum, encode, share   gather leg    await, decode
//     one-step          share     reduce leg    reduce    sum
//     reduce-scatter    scatter   reduce leg    reduce    sum
//     all-gather        share     gather leg    gather    decode
//
//     scatter    every rank's slice of x, encoded, to that rank's inbox
//     share      the same payload to every rank's inbox, this rank's own included
//     sum        float32, in rank order, this rank's part through the codec like all others: all ranks end with the
//                same bits, and they are the bits of flashcomm_megatron/collectives.py over any process group
//
// Reading and writing x and out by the same block at the same tile makes in-place safe: a tile is written in the round
// in which it was read, behind a barrier. Flags, rounds and buffers: protocol.h. Who does which tile: shape.h.
//
// Several ranks may run in one launch on one GPU (`ranks`), each with its own inbox, control words and blocks; they
// exchange through the same inboxes and flags as ranks of different processes do.
//
// Waiting ends at a deadline: the block writes which flag was missing into its control words and leaves, and so does
// every block of every later call. The last block of such a call to end fills the whole output with NaN, so that a
// replayed graph, which no host code watches, cannot pass partial sums on; the host raises at its next call.
// Everything a call needs is in its argument or in device memory, so calls can be captured into CUDA graphs.
#pragma once

#include <type_traits>

#include "cuda/protocol.h"
#include "cuda/shape.h"
#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

// How a thread that waits for a flag polls, in nanoseconds: often at first; later so rarely that 66 blocks of a GPU
// read 1.4 GB/s of flags from host memory (64 bytes every 3 us each), a twentieth of a PCIe link.
constexpr uint64_t kSoon = 20'000;
constexpr uint32_t kShortRest = 40, kLongRest = 2'000;

struct Call {
    Collective kind;
    Shape shape;
    int world, first, ranks;  // of the group; the first of this launch and how many run in it
    Setting reduce, gather;
    int64_t region;
    uint64_t deadline;         // nanoseconds a block waits for a flag
    const void* x[kMaxWorld];  // of the ranks of this launch
    void* out[kMaxWorld];
    Control* control[kMaxWorld];
    uint8_t* own[kMaxWorld];            // what they send themselves
    void* residuals[kLegs][kMaxWorld];  // of each leg, where the codec keeps residuals
    uint8_t* inbox[kMaxWorld];          // of every rank of the group, as this device addresses them
    // Tests alone set these: a rank that reads its inbox late, and the protocol without its second buffer.
    int stalled_rank;
    uint64_t stall;
    bool single_buffer;
};

// One thread block at work. The object lies in shared memory, so that what it knows is read again behind each barrier:
// kept in registers from the start, it displaced the sums.
template <class Reduce, class Gather, class T> struct alignas(16) Worker {
    using Word = typename T::Word;

    Call call;
    Reduce reduce;
    Gather gather;
    int local, rank, block, half, phase;  // half: of the inboxes, in this round
    Control* control;
    Round round, last;
    int64_t first;  // this block's first tile of the round, in every slice

    // Shared memory: this object, a payload on its way out, then what encoding needs or two payloads on their way in.
    static FC_INLINE int max2(int a, int b) { return a > b ? a : b; }
    static FC_INLINE int shared_bytes(const Shape& shape, const Setting& reduce, const Setting& gather) {
        const int scratch = max2(Reduce(reduce).scratch_bytes(), Gather(gather).scratch_bytes());
        return (int)sizeof(Worker) + shape.stride + max2(scratch, 2 * shape.stride);
    }
    static Shape shape(Collective kind, int64_t numel, int64_t slice, const Capacity& at, const Setting& reduce,
                       const Setting& gather) {
        const Reduce first(reduce);
        const Gather second(gather);
        return shape_of(kind, numel, slice, at, first.unit(), second.unit(), kTileValues<T>,
                        [&](int values) { return max2(first.bytes(values), second.bytes(values)); });
    }
    FC_DEVICE uint8_t* payload() const { return shared_memory() + sizeof(Worker); }
    FC_DEVICE uint8_t* scratch() const { return payload() + call.shape.stride; }
    FC_DEVICE uint8_t* incoming(int turn) const { return scratch() + (turn & 1) * call.shape.stride; }

    static FC_DEVICE Worker& hire(const Call& call) {
        Worker& worker = *(Worker*)shared_memory();
        static_assert(sizeof(Call) % 8 == 0, "copied by words");
        for (int i = thread(); 8 * i < (int)sizeof(Call); i += kThreads)
            ((uint64_t*)&worker.call)[i] = ((const uint64_t*)&call)[i];
        if (thread() == 0) worker.settle((int)(block_index() % call.ranks), (int)(block_index() / call.ranks), call);
        sync();
        return worker;
    }

    FC_DEVICE void run() {
        bool more = sync_and(control->error == 0);
        while (more) {
            more = one_round() && round != last;
            sync();  // all have decoded and read `round`
            if (thread() == 0) begin(round + 1), first += (int64_t)call.shape.depth * call.shape.blocks;
            sync();
        }
        end();
    }

private:
    FC_DEVICE void settle(int rank_here, int block_here, const Call& from) {
        local = rank_here, rank = from.first + rank_here, block = block_here;
        reduce = Reduce(from.reduce), gather = Gather(from.gather);
        control = from.control[rank_here], first = block_here;
        last = control->epoch + from.shape.rounds;
        begin(control->epoch + 1);
    }
    FC_DEVICE void begin(Round next) { round = next, half = call.single_buffer ? 0 : parity(next), phase = 1; }

    FC_DEVICE const Word* x(int slice) const { return (const Word*)call.x[local] + call.shape.start(slice); }
    FC_DEVICE Word* out(int slice) const { return (Word*)call.out[local] + call.shape.start(slice); }
    // The residual of a leg of a slice from value `at` on.
    template <class Codec> FC_DEVICE Word* residual(const Codec& codec, Leg leg, int slice, int64_t at) const {
        if constexpr (Codec::kKeepsResiduals)
            return (Word*)call.residuals[leg][local] + slice * codec.residual_numel(call.shape.slice) + at;
        else return nullptr;
    }
    FC_DEVICE int64_t tile(int d) const { return first + (int64_t)d * call.shape.blocks; }

    // ---- a round, phase by phase ---------------------------------------------------------------------------------

    // False: a flag did not come.
    FC_DEVICE bool one_round() {
        // phase 1: x is encoded and pushed; phase 2, unless it is all-gather: the sum of what came is, or is stored
        while (phase <= (reduces(call.kind) ? 2 : 1)) {
            send();
            if (is_sum() && !gathers(call.kind)) return true;
            // raise the flags, wait for all ranks' payloads
            announce(leg());
            if (!await(leg())) return false;
            if (thread() == 0) phase++;
            sync();
        }
        // phase 3 (two-step, all-gather): decode them into the output
        decode();
        return true;
    }

    FC_DEVICE bool is_sum() const { return phase == 2; }
    FC_DEVICE Leg leg() const { return phase == 1 && reduces(call.kind) ? kReduceLeg : kGatherLeg; }

    // ---- phases 1 and 2: encode and push -------------------------------------------------------------------------

    // Tiles of x, or of the sum of what all ranks sent. Scattering, every rank's slice goes to that rank; else all of
    // it (in one-step) or this rank's slice to every rank. A sum that no leg carries on is stored.
    FC_DEVICE void send() {
        const bool scatter = !is_sum() && scatters(call.kind);
        for (int d = 0; d < call.shape.depth; d++)
            for (int distance = 1; distance <= (scatter ? call.world : 1); distance++) {
                const int peer = (rank + distance) % call.world;  // no two ranks start with the same one
                const int slice = scatter ? peer : 0, owner = call.kind == kOneStep || scatter ? slice : rank;
                const int64_t at = tile(d) * call.shape.tile;
                const int values = call.shape.values(call.shape.size(owner), tile(d));
                if (values == 0) continue;
                Octet<T> octets[kRows<T>];
                if (is_sum()) sum(d, values, octets);
                else load<T>(x(slice) + at, values, octets);
                if (is_sum() && !gathers(call.kind)) {
                    store<T>(out(0) + at, values, octets);
                    continue;
                }
                const int bytes = encode(octets, values, slice, at);
                if (scatter) push(peer, leg(), d, bytes);
                else push_all(leg(), d, bytes);
            }
    }

    // Of a tile that starts at value `at` of a slice; returns the payload's bytes.
    FC_DEVICE int encode(const Octet<T> (&octets)[kRows<T>], int values, int slice, int64_t at) {
        int bytes = 0;
        sync();  // what encoding needs may take the place of payloads that have been decoded
        const auto with = [&](const auto& codec) {
            codec.with_blocks([&](auto blocks) {
                blocks.template encode_to<true>(octets, values, scratch(), payload(), blocks.own(values),
                                                residual(codec, leg(), slice, at));
            });
            bytes = codec.bytes(values);
        };
        if constexpr (std::is_same_v<Reduce, Gather>) with(leg() == kReduceLeg ? reduce : gather);
        else if (leg() == kReduceLeg) with(reduce);
        else with(gather);
        return bytes;
    }

    // What all ranks sent of a tile, in rank order, as values.
    FC_DEVICE void sum(int d, int values, Octet<T> (&octets)[kRows<T>]) {
        reduce.with_blocks([&](auto blocks) {
            float total[kRows<T>][8];
            uint32_t huge = 0, shrunk;  // a bit for each row
            const int first = first_octet<T>(), octet = first < reduce.octets(values) ? first : 0;
            Bounds<T> bounds;
            do {
                shrunk = huge;
                clear(total);
                bounds = {};
                receive<false>(
                    blocks, kReduceLeg, d, [&](int) { return values; }, shrunk, total,
                    [&](int source, uint32_t more) {
                        huge |= more;
                        bounds.add(blocks, incoming(d * call.world + source), blocks.own(values), octet);
                    });
            } while (Reduce::kRotates && !sync_and(huge == shrunk));
            blocks.template finish<false>(total, shrunk);
            bounds.apply(total);
            narrow<T>(total, octets);
        });
        const int left = values - 8 * first_octet<T>();
        FC_UNROLL for (int row = 0; row < kRows<T>; row++) repeat_last<T>(octets[row], left - 8 * row);
    }

    // ---- phase 3: decode -------------------------------------------------------------------------------------------

    FC_DEVICE void decode() {
        gather.with_blocks([&](auto blocks) {
            for (int d = 0; d < call.shape.depth; d++) {
                const int64_t t = tile(d);
                auto values_of = [&](int source) { return call.shape.values(call.shape.size(source), t); };
                float x[kRows<T>][8];
                receive<true>(blocks, kGatherLeg, d, values_of, 0, x, [&](int source, uint32_t huge) {
                    Octet<T> octets[kRows<T>];
                    blocks.template finish<true>(x, huge);
                    narrow<T>(x, octets);
                    store<T>(out(source) + t * call.shape.tile, values_of(source), octets);
                });
            }
        });
    }

    // ---- inboxes ---------------------------------------------------------------------------------------------

    FC_DEVICE uint8_t* slot(int owner, Leg leg, int source, int d) const {
        const Inbox at{call.world, call.region};
        uint8_t* slots = owner == source ? call.own[local] + at.own_slots(half, leg)
                                         : call.inbox[owner] + at.slots(half, leg, source);
        return slots + ((int64_t)d * call.shape.blocks + block) * call.shape.stride;
    }

    FC_DEVICE void push(int peer, Leg leg, int d, int bytes) const {
        Vec16* to = (Vec16*)slot(peer, leg, rank, d);
        for (int i = thread(); 16 * i < bytes; i += kThreads) to[i] = ((const Vec16*)payload())[i];
    }
    FC_DEVICE void push_all(Leg leg, int d, int bytes) const {
        for (int distance = 1; distance <= call.world; distance++) push((rank + distance) % call.world, leg, d, bytes);
    }

    // The payloads of one tile from every rank, in rank order, one read ahead, decoded to x (not kAlone: added): after
    // each use(source, huge), whole warps together. values_of(source): of the tile; shrunk, huge: a bit for each row.
    template <bool kAlone, class Codec, class Values, class Use>
    FC_DEVICE void receive(const Codec& codec, Leg leg, int d, Values values_of, uint32_t shrunk,
                           float (&x)[kRows<T>][8], Use use) {
        constexpr int kAll = (Codec::kMaxBytes + 16 * kThreads - 1) / (16 * kThreads);
        constexpr int kAhead = kAll < Codec::kMostAhead ? kAll : Codec::kMostAhead;
        Vec16 ahead[kAhead ? kAhead : 1];
        const int lane = thread();
        auto fetch = [&](int source) {
            const int bytes = codec.bytes(values_of(source));
            const Vec16* from = (const Vec16*)slot(rank, leg, source, d);
            FC_UNROLL for (int k = 0; k < kAhead; k++) {
                const int word = k * kThreads + lane;
                if (16 * word < bytes) ahead[k] = load_fresh(from + word);
            }
        };
        fetch(0);
        for (int source = 0; source < call.world; source++) {
            const int values = values_of(source), octets = codec.octets(values), bytes = codec.bytes(values);
            Vec16* to = (Vec16*)incoming(d * call.world + source);
            FC_UNROLL for (int k = 0; k < kAhead; k++) {
                const int word = k * kThreads + lane;
                if (16 * word < bytes) to[word] = ahead[k];
            }
            for (int k = kAhead; k < kAll; k++) {
                const int word = k * kThreads + lane;
                if (16 * word < bytes) to[word] = load_fresh((const Vec16*)slot(rank, leg, source, d) + word);
            }
            if (source + 1 < call.world) fetch(source + 1);
            sync();  // and the other buffer has been decoded
            const int octet = kRows<T> * lane;
            if ((Codec::kRotates ? kRows<T> * (lane & ~(kWarp - 1)) : octet) >= octets) continue;
            // A lane behind the end decodes something, for nobody.
            const int first = octet < octets ? octet : 0;
            use(source, codec.template decode_from<kAlone>((const uint8_t*)to, codec.own(values), first, shrunk, x));
        }
    }

    // ---- flags -----------------------------------------------------------------------------------------------

    FC_DEVICE void announce(Leg leg) const {
        sync();  // every thread has pushed: the release below covers it
        if (thread() < call.world)
            store_release((uint64_t*)(call.inbox[thread()] + Inbox::flag(leg, rank, block)), round);
    }

    FC_DEVICE bool await(Leg leg) const {
        bool came = true;
        if (thread() < call.world) {
            const uint64_t* flag = (const uint64_t*)(call.inbox[rank] + Inbox::flag(leg, thread(), block));
            came = reached(load_relaxed(flag), round) || spin(flag, leg);
            fence_acquire();
        }
        if (call.stall && call.stalled_rank == rank) wait_until(nanoseconds() + call.stall);
        return sync_and(came);
    }

    FC_DEVICE bool spin(const uint64_t* flag, Leg leg) const {
        const uint64_t start = nanoseconds();
        while (!reached(load_relaxed(flag), round)) {
            const uint64_t waited = nanoseconds() - start;
            if (waited >= call.deadline) return overdue(leg);
            rest(waited < kSoon ? kShortRest : kLongRest);
        }
        return true;
    }

    FC_DEVICE bool overdue(Leg leg) const {
        const uint64_t error = Overdue{leg, thread(), block, round}.packed();
        if (swap_if(&control->error, 0, error) == 0) store_release(control->host_error, error);
        return false;
    }

    static FC_DEVICE void wait_until(uint64_t time) {
        while (nanoseconds() < time) continue;
    }

    // The last block of this rank to end hands the epoch to the next call.
    FC_DEVICE void end() const {
        sync();
        const bool is_last = thread() == 0 && count_up(&control->ended) + 1 == (uint32_t)call.shape.blocks;
        if (is_last) {
            control->ended = 0;
            control->epoch += call.shape.rounds;
        }
        if (!sync_and(thread() != 0 || (is_last && load_relaxed(&control->error)))) return;
        const int64_t values = call.kind == kReduceScatter ? call.shape.size(rank) : call.shape.numel;
        for (int64_t i = thread(); i < values; i += kThreads) out(0)[i] = (Word)T::kNan;
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
