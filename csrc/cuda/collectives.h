// Quantized all-reduce, reduce-scatter and all-gather in one kernel: what a thread block does.
//
// The idea
// --------
// A tile is encoded in registers and shared memory and its payload pushed straight into the inboxes of other ranks; a
// flag follows; the reader decodes from its own inbox. Nothing is staged in between, and the four collectives are one
// program with steps left out:
//
//                       send                    then, as each source's flag comes
//     two-step          scatter   reduce leg    sum, encode, share   gather leg    decode
//     one-step          share     reduce leg    sum
//     reduce-scatter    scatter   reduce leg    sum
//     all-gather        share     gather leg    decode
//
//     scatter    every rank's slice of x, encoded, to that rank's inbox
//     share      the same payload to every rank's inbox, this rank's own included
//     sum        float32, in rank order, this rank's part through the codec like all others: all ranks end with the
//                same bits, and they are the bits of flashcomm_megatron/collectives.py over any process group
//
// A block waits for a rank just before it reads its first payload, so that one payload is decoded while others arrive;
// and it sends the next round before it waits for the last leg of this one. Reading and writing x and out by the same
// block at the same tile makes in-place safe: a tile is written behind a barrier after it was read. Flags, rounds and
// regions: protocol.h. Who does which tile: shape.h.
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

struct Call {
    Collective kind;
    Shape shape;
    int world, first, ranks;  // of the group; the first of this launch and how many run in it
    Setting reduce, gather;
    int64_t region;
    uint64_t deadline;         // nanoseconds a block waits for one flag
    const void* x[kMaxWorld];  // of the ranks of this launch
    void* out[kMaxWorld];
    Control* control[kMaxWorld];
    uint8_t* own[kMaxWorld];            // what they send themselves
    void* residuals[kLegs][kMaxWorld];  // of each leg, where the codec keeps residuals
    uint8_t* inbox[kMaxWorld];          // of every rank of the group, as this device addresses them
    // Tests alone set these: a rank that reads its inbox late, and the protocol with one region in place of its ring.
    int stalled_rank;
    uint64_t stall;
    bool single_buffer;
};

// What a block does with a round. It takes turns t = 0, 1, ... until all rounds are through, and goes through these:
//     two-step                  sum of round t, send round t + 1, decode round t
//     one-step, reduce-scatter  send round t + 1, sum of round t
//     all-gather                send round t + 1, decode round t
enum Phase : int { kSum = 0, kSend = 1, kDecode = 2 };

// One thread block at work. The object lies in shared memory, so that what it knows is read again behind each barrier:
// kept in registers from the start, it displaced the sums.
template <class Reduce, class Gather, class T> struct alignas(16) Worker {
    using Word = typename T::Word;

    Call call;
    Reduce reduce;
    Gather gather;
    int local, rank, block;
    Control* control;
    Exchange epoch;            // before this call
    int64_t sizes[kMaxWorld];  // values of every rank's slice
    int64_t hop;               // values from one tile of this block to the next
    int64_t slot_hop;          // bytes from one slot of this block to the next
    int64_t turn;

    // Of the phase, set by begin().
    Phase phase;
    int targets;                 // what a tile of x is cut into: a slice for every rank, or 1
    int pushes;                  // whether anything is pushed
    Leg leg;                     // on which it is
    int64_t first;               // this block's first value of the round, in every slice
    Exchange arriving, leaving;  // what is read, what is pushed
    // The slots of this block in the regions of these exchanges: own ones, and where those of others begin.
    uint8_t *own_from, *own_to, *others_from;
    int64_t others_to;  // in any inbox

    int is_missing;            // a flag did not come: this block pushes nothing any more and leaves
    int is_here[2];            // whether the payload to be decoded next had come, in turns
    Exchange seen[kMaxWorld];  // in every source's flag; the thread of that number alone uses it

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
        const int local = (int)(block_index() % call.ranks), source = thread();
        if (source < kMaxWorld)
            worker.seen[source] = call.control[local]->epoch, worker.sizes[source] = call.shape.size(source);
        if (source == kThreads - 1) worker.settle(local, (int)(block_index() / call.ranks), call);
        sync();
        return worker;
    }

    FC_DEVICE void run() {
        bool more = sync_and(control->error == 0);
        while (more) {
            if (phase == kDecode) decode();
            else send();
            more = conclude();
        }
        end();
    }

private:
    FC_DEVICE void settle(int rank_here, int block_here, const Call& of) {
        local = rank_here, rank = of.first + rank_here, block = block_here;
        reduce = Reduce(of.reduce), gather = Gather(of.gather);
        control = of.control[rank_here], epoch = control->epoch;
        hop = (int64_t)of.shape.blocks * of.shape.tile, slot_hop = (int64_t)of.shape.blocks * of.shape.stride;
        turn = 0, phase = kSend, is_missing = false;
        begin(of);
    }

    // The phase that follows: rounds are 1 ... rounds, so turn 0 sends alone and the last turn sends nothing.
    FC_DEVICE void proceed() {
        const bool is_two_step = call.kind == kTwoStep;
        const Phase last = gathers(call.kind) ? kDecode : kSum, start = is_two_step ? kSum : kSend;
        do {
            if (is_two_step) phase = phase == kSum ? kSend : phase == kSend ? kDecode : kSum;
            else phase = phase == kSend ? last : kSend;
            if (phase == start) turn++;
        } while (phase == kSend ? turn == call.shape.rounds : turn == 0);
        begin(call);
    }
    FC_DEVICE void begin(const Call& of) {
        const bool is_send = phase == kSend;
        targets = is_send && scatters(of.kind) ? of.world : 1;
        pushes = is_send || (is_sum() && gathers(of.kind)), leg = is_send && reduces(of.kind) ? kReduceLeg : kGatherLeg;
        const int64_t before = turn - (is_send ? 0 : 1);  // rounds before the phase's
        first = before * of.shape.depth * hop + (int64_t)block * of.shape.tile;
        arriving = leaving = epoch + before * legs(of.kind) + 1;
        if (phase == kDecode) arriving += legs(of.kind) - 1;
        if (is_sum()) leaving++;
        const Inbox inbox{of.world, of.region};
        const int filled = of.single_buffer ? 0 : region_of(arriving),
                  filling = of.single_buffer ? 0 : region_of(leaving);
        const int64_t slot = (int64_t)block * of.shape.stride;
        own_from = of.own[local] + inbox.own_slots(filled) + slot,
        own_to = of.own[local] + inbox.own_slots(filling) + slot;
        others_from = of.inbox[rank] + inbox.slots(filled, 0) + slot, others_to = inbox.slots(filling, rank) + slot;
    }

    FC_DEVICE const Word* x(int slice) const { return (const Word*)call.x[local] + call.shape.start(slice); }
    FC_DEVICE Word* out(int slice) const { return (Word*)call.out[local] + call.shape.start(slice); }
    // The residual of a leg of a slice from value `at` on.
    template <class Codec> FC_DEVICE Word* residual(const Codec& codec, Leg leg, int slice, int64_t at) const {
        if constexpr (Codec::kKeepsResiduals)
            return (Word*)call.residuals[leg][local] + slice * codec.residual_numel(call.shape.slice) + at;
        else return nullptr;
    }
    FC_DEVICE int64_t start(int d) const { return first + d * hop; }  // of a tile in a slice
    // Values of it, of a slice of `size`; 0: there is no such tile.
    FC_DEVICE int values_of(int64_t size, int d) const {
        const int64_t left = size - start(d);
        return left >= call.shape.tile ? call.shape.tile : left < 0 ? 0 : (int)left;
    }

    FC_DEVICE bool is_sum() const { return phase == kSum; }
    FC_DEVICE bool is_scatter() const { return targets > 1; }
    FC_DEVICE int peer(int distance) const {  // no two ranks start with the same one
        return rank + distance < call.world ? rank + distance : rank + distance - call.world;
    }

    // ---- send, sum: encode and push ------------------------------------------------------------------------------

    // A tile and, scattering, at what distance the rank is that it goes to: in one number, as registers are few.
    struct Job {
        int number = 1;
        FC_DEVICE int d() const { return number >> 4; }
        FC_DEVICE int distance() const { return number & 15; }
        FC_DEVICE void follow(int targets) { number = distance() < targets ? number + 1 : (number | 15) + 2; }
    };
    static_assert(kMaxWorld < 16, "distances of a job");

    // Tiles of x, or of the sum of what all ranks sent. Scattering, every rank's slice goes to that rank; else all of
    // it (in one-step) or this rank's slice to every rank. A sum that no leg carries on is stored. What is known of a
    // job is asked again behind the sum and the encoding, which need the registers.
    FC_DEVICE void send() {
        for (Job job; job.d() < call.shape.depth; job.follow(targets)) {
            const int values = this->values(job);
            if (values == 0) continue;
            Octet<T> octets[kRows<T>];
            if (is_sum()) sum(job.d(), values, octets);
            else load<T>(x(slice(job)) + start(job.d()), values, octets);
            if (is_missing) return;
            job = {again(job.number)};
            if (!pushes) {
                store<T>(out(0) + start(job.d()), values, octets);
                continue;
            }
            const int bytes = encode(octets, values, slice(job), start(job.d()));
            job = {again(job.number)};
            if (is_scatter()) push(peer(job.distance()), job.d(), bytes);
            else push_all(job.d(), bytes);
        }
    }
    FC_DEVICE int slice(const Job& job) const { return is_scatter() ? peer(job.distance()) : 0; }
    FC_DEVICE int values(const Job& job) const {
        return values_of(sizes[call.kind == kOneStep || is_scatter() ? slice(job) : rank], job.d());
    }

    // Of a tile that starts at value `at` of a slice; returns the payload's bytes. Which leg's codec it is is asked
    // again behind the barriers, instead of kept in a register.
    FC_DEVICE int encode(const Octet<T> (&octets)[kRows<T>], int values, int slice, int64_t at) {
        sync();  // what encoding needs may take the place of payloads that have been decoded
        const auto with = [&](const auto& codec) {
            codec.with_blocks([&](auto blocks) {
                blocks.template encode_to<true>(octets, values, scratch(), payload(), blocks.own(values),
                                                residual(codec, leg, slice, at));
            });
        };
        if constexpr (std::is_same_v<Reduce, Gather>) with(leg == kReduceLeg ? reduce : gather);
        else if (leg == kReduceLeg) with(reduce);
        else with(gather);
        return leg == kReduceLeg ? reduce.bytes(values) : gather.bytes(values);
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
                    blocks, d, [&](int) { return values; }, shrunk, total,
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

    // ---- decode ----------------------------------------------------------------------------------------------------

    FC_DEVICE void decode() {
        gather.with_blocks([&](auto blocks) {
            for (int d = 0; d < call.shape.depth; d++) {
                auto values = [&](int source) { return values_of(sizes[source], d); };
                float x[kRows<T>][8];
                receive<true>(blocks, d, values, 0, x, [&](int source, uint32_t huge) {
                    Octet<T> octets[kRows<T>];
                    blocks.template finish<true>(x, huge);
                    narrow<T>(x, octets);
                    store<T>(out(source) + start(d), values(source), octets);
                });
            }
        });
    }

    // ---- inboxes ---------------------------------------------------------------------------------------------

    // Of a tile: where this rank reads what a source sent, and where it writes what it sends.
    FC_DEVICE const Vec16* slot_from(int source, int d) const {
        return (const Vec16*)((source == rank ? own_from : others_from + source * call.region) + d * slot_hop);
    }
    FC_DEVICE Vec16* slot_to(int peer, int d) const {
        return (Vec16*)((peer == rank ? own_to : call.inbox[peer] + others_to) + d * slot_hop);
    }

    FC_DEVICE void push(int peer, int d, int bytes) const {
        Vec16* to = slot_to(peer, d);
        for (int i = thread(); 16 * i < bytes; i += kThreads) to[i] = ((const Vec16*)payload())[i];
    }
    FC_DEVICE void push_all(int d, int bytes) const {
        for (int distance = 1; distance <= call.world; distance++) push(peer(distance), d, bytes);
    }

    // The payloads of one tile from every rank, decoded to x (not kAlone: added): after each use(source, huge), whole
    // warps together. Those to be added come in rank order; others from this rank on down, as they are sent. Each is
    // awaited before its first tile, and read ahead while the one before it is decoded, if it has come by
    // then. values_of(source): of the tile; shrunk, huge: a bit for each row. Where a flag does not come, what lies there is
    // decoded, for nobody: leaving early took registers that the sums need.
    template <bool kAlone, class Codec, class Values, class Use>
    FC_DEVICE void receive(const Codec& codec, int d, Values values_of, uint32_t shrunk, float (&x)[kRows<T>][8],
                           Use use) {
        constexpr int kAll = (Codec::kMaxBytes + 16 * kThreads - 1) / (16 * kThreads);
        constexpr int kAhead = kAll < Codec::kMostAhead ? kAll : Codec::kMostAhead;
        Vec16 ahead[kAhead ? kAhead : 1];
        const int lane = thread();
        auto fetch = [&](int source) {
            const int bytes = codec.bytes(values_of(source));
            const Vec16* from = slot_from(source, d);
            FC_UNROLL for (int k = 0; k < kAhead; k++) {
                const int word = k * kThreads + lane;
                if (16 * word < bytes) ahead[k] = load_fresh(from + word);
            }
        };
        const auto source_at = [&](int count) {
            const int source = rank - count;
            return !kAlone ? count : source < 0 ? source + call.world : source;
        };
        for (int count = 0; count < call.world; count++) {
            const int source = source_at(count);
            if (count == 0 || !is_here[count & 1]) {
                if (count > 0 || d == 0) await(source);  // its first tile
                fetch(source);
            }
            const int values = values_of(source), octets = codec.octets(values), bytes = codec.bytes(values);
            Vec16* to = (Vec16*)incoming(d * call.world + count);
            FC_UNROLL for (int k = 0; k < kAhead; k++) {
                const int word = k * kThreads + lane;
                if (16 * word < bytes) to[word] = ahead[k];
            }
            for (int k = kAhead; k < kAll; k++) {
                const int word = k * kThreads + lane;
                if (16 * word < bytes) to[word] = load_fresh(slot_from(source, d) + word);
            }
            const bool is_last = count + 1 == call.world;
            int& is_next_here = is_here[(count + 1) & 1];  // read behind this barrier and before the next
            if (!is_last && look() && lane == source_at(count + 1)) is_next_here = has_come(lane);
            sync();  // and the other buffer has been decoded
            if (!is_last && is_next_here) fetch(source_at(count + 1));
            const int octet = kRows<T> * lane;
            if ((Codec::kRotates ? kRows<T> * (lane & ~(kWarp - 1)) : octet) >= octets) continue;
            // A lane behind the end decodes something, for nobody.
            const int first = octet < octets ? octet : 0;
            use(source, codec.template decode_from<kAlone>((const uint8_t*)to, codec.own(values), first, shrunk, x));
        }
    }

    // ---- flags: out of line in flags.h -----------------------------------------------------------------------

    FC_DEVICE bool conclude();
    FC_DEVICE bool has_come(int source) const { return reached(seen[source], arriving); }
    FC_DEVICE bool poll(int source);
    FC_DEVICE bool look();
    FC_DEVICE void await(int source);
    FC_DEVICE bool spin(int source);
    FC_DEVICE bool overdue(int source) const;
    FC_DEVICE void end() const;
    static FC_DEVICE void wait_until(uint64_t time) {
        while (nanoseconds() < time) continue;
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA

#include "cuda/flags.h"
