// The spike codec on the CPU: a block at a time, its codes and positions gathered in strips that become planes at once.
//
//     encode   extremes, where they lie, extremes of the rest -> span, low -> codes, metadata
//     decode   codes -> values, spikes put in their places -> add, for every payload; write
//
// Plain loops over one block that compilers turn into vectors; blocks of 32, 64 and 128 have their length in the type.
#include "cpu/spike_cpu.h"

#include "cpu/planes.h"
#include "format/spike.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

constexpr int kStripBlocks = 16;  // of shares of a multiple of 64 blocks

// What a strip's blocks leave for the planes, or take from them.
struct alignas(64) SpikeStrip {
    uint8_t codes[kStripBlocks * kLargestBlock], positions[2 * kStripBlocks];
    float sums[kStripBlocks * kLargestBlock], bounds[kStripBlocks];
};

// ---- encode ----------------------------------------------------------------------------------------------------

// Keys of a block: the spikes', with the places where they come first, and those of the rest.
struct Extremes {
    uint32_t low, high, rest_low, rest_high;
    int low_at, high_at;
};

template <int kBlock> uint32_t least(const uint32_t* keys, int block) {
    uint32_t found = keys[0];
    for (int i = 1; i < (kBlock ? kBlock : block); i++) found = keys[i] < found ? keys[i] : found;
    return found;
}

template <int kBlock> uint32_t most(const uint32_t* keys, int block) {
    uint32_t found = keys[0];
    for (int i = 1; i < (kBlock ? kBlock : block); i++) found = keys[i] > found ? keys[i] : found;
    return found;
}

template <int kBlock> int first_of(uint32_t key, const uint32_t* keys, int block) {
    uint32_t at = (uint32_t)block;
    for (uint32_t i = 0; i < (uint32_t)(kBlock ? kBlock : block); i++) {
        const uint32_t here = keys[i] == key ? i : (uint32_t)kLargestBlock;
        at = here < at ? here : at;
    }
    return (int)at;
}

// `keys` [block] has one value at least; those from `count` on repeat the last. Overwrites the spikes' keys.
template <int kBlock> Extremes extremes_of(uint32_t* keys, int count, int block) {
    Extremes e;
    e.low = least<kBlock>(keys, block), e.high = most<kBlock>(keys, block);
    e.low_at = first_of<kBlock>(e.low, keys, block), e.high_at = first_of<kBlock>(e.high, keys, block);
    const int spikes = e.low_at == e.high_at ? 1 : 2;
    for (int i = count; i < block; i++) keys[i] = ~0u;
    keys[e.low_at] = keys[e.high_at] = ~0u;
    e.rest_low = count > spikes ? least<kBlock>(keys, block) : e.low;
    for (int i = count; i < block; i++) keys[i] = 0;
    keys[e.low_at] = keys[e.high_at] = 0;
    e.rest_high = count > spikes ? most<kBlock>(keys, block) : e.low;
    return e;
}

// To bfloat16's nearest number, within its finite range.
float spike_of(float x) {
    const float spike = float_of(BFloat16::narrow(x) << 16);
    return spike < -BFloat16::kMax ? -BFloat16::kMax : spike > BFloat16::kMax ? BFloat16::kMax : spike;
}

void store_half(uint8_t* section, int64_t index, uint32_t bits) {
    const uint16_t half = (uint16_t)bits;
    __builtin_memcpy(section + 2 * index, &half, 2);
}

// Encodes block `index`, of which `count` values are there.
template <class T, int kBlock>
void encode_block(const typename T::Word* x, int count, const SpikeLayout& at, int64_t index, uint8_t* payload,
                  uint8_t* __restrict codes, uint8_t* positions) {
    const int block = kBlock ? kBlock : (int)at.block;
    constexpr uint32_t above = ordered<T>(T::kInfinity), below = (typename T::Word) ~above;
    uint32_t keys[kLargestBlock];
    for (int i = 0; i < (count == kBlock ? kBlock : count); i++) keys[i] = ordered<T>(x[i]);
    for (int i = count; i < block; i++) keys[i] = keys[count - 1];
    const Extremes e = extremes_of<kBlock>(keys, count, block);
    const bool finite = e.high < above && e.low > below;
    const auto value = [finite](uint32_t key) { return finite ? T::widen(unordered<T>(key)) : 0.0f; };

    const float lowest = value(e.low), highest = value(e.high);
    const float minimum = spike_of(lowest), maximum = spike_of(highest);
    const Frame frame = Frame::of(minimum, maximum);
    const float low = value(e.rest_low) * frame.prescale, high = value(e.rest_high) * frame.prescale;
    const uint32_t code = frame.code(low, high);
    const float span = frame.span(code), unit = span / kUnits, levels = (float)((1 << at.bits) - 1);
    float steps = span > 0 ? __builtin_floorf((low - frame.anchor) / unit) : 0.0f;
    steps = steps < -128 ? -128.0f : steps > 127 ? 127.0f : steps;
    const float start = frame.anchor + steps * unit, inverse = span > 0 ? 1.0f / (span / levels) : 0.0f;
    const float prescale = frame.prescale;
    for (int i = 0; finite && i < (count == kBlock ? kBlock : count); i++) {
        float q = (T::widen(x[i]) * prescale - start) * inverse;
        q = q > 0 ? q : 0.0f;
        codes[i] = (uint8_t)rounded(q < levels ? q : levels);
    }
    for (int i = finite ? count : 0; i < block; i++) codes[i] = 0;
    codes[e.low_at] = codes[e.high_at] = 0;

    const uint32_t bits = bits_of(lowest);
    const bool escaped = finite && lowest == highest && lowest != minimum;
    store_half(payload + at.minima, index, escaped ? bits >> 16 : finite ? bits_of(minimum) >> 16 : BFloat16::kNan);
    store_half(payload + at.maxima, index, escaped ? bits : finite ? bits_of(maximum) >> 16 : BFloat16::kNan);
    payload[at.spans + index] = (uint8_t)(escaped ? kConstantSpan : code);
    payload[at.lows + index] = (uint8_t)(int8_t)steps;
    positions[0] = (uint8_t)e.low_at, positions[1] = (uint8_t)e.high_at;
}

template <class T, int kBlock>
void encode_strips(const void* x, const SpikeLayout& at, uint8_t* payload, int64_t first, int64_t last) {
    SpikeStrip strip = {};
    for (; first < last; first += kStripBlocks) {
        const int blocks = (int)(last - first < kStripBlocks ? last - first : kStripBlocks);
        const int64_t octet = at.rows.first_octet(first);
        int codes = 0;
        for (int b = 0; b < blocks; b++) {
            const int count = (int)at.rows.values(first + b);
            encode_block<T, kBlock>((const typename T::Word*)x + at.rows.first_value(first + b), count, at, first + b,
                                    payload, strip.codes + codes, strip.positions + 2 * b);
            codes += (count + 7) / 8 * 8;
        }
        for (int i = 2 * blocks; i < 2 * kStripBlocks; i++) strip.positions[i] = 0;
        pack_planes(at.bits, at.octets, octet, codes, strip.codes, payload);
        pack_planes(at.position_bits, at.pairs, first / 4, (2 * blocks + 7) / 8 * 8, strip.positions,
                    payload + at.positions);
    }
}

void zero_gaps(const SpikeLayout& at, uint8_t* payload) {
    const auto planes = [](int bits, int64_t octets, uint8_t* section) {
        Layout::each_plane(bits, octets,
                           [=](int width, int, int64_t start) { Layout::zero(section + start, octets * width); });
    };
    planes(at.bits, at.octets, payload);
    planes(at.position_bits, at.pairs, payload + at.positions);
    Layout::zero(payload + at.minima, 2 * at.blocks);
    Layout::zero(payload + at.maxima, 2 * at.blocks);
    Layout::zero(payload + at.spans, at.blocks);
    Layout::zero(payload + at.lows, at.blocks);
}

// ---- decode ----------------------------------------------------------------------------------------------------

float load_half(const uint8_t* section, int64_t index) {
    uint16_t half;
    __builtin_memcpy(&half, section + 2 * index, 2);
    return float_of((uint32_t)half << 16);
}

// float32 values of block `index`; a constant and a NaN block are the same number everywhere. Returns their error bound.
template <int kBlock>
float decode_block(const uint8_t* payload, const SpikeLayout& at, int64_t index, const uint8_t* __restrict codes,
                   const uint8_t* positions, float* __restrict values) {
    const int block = kBlock ? kBlock : (int)at.block;
    const float minimum = load_half(payload + at.minima, index), maximum = load_half(payload + at.maxima, index);
    const uint32_t code = payload[at.spans + index];
    if (code == kConstantSpan || minimum != minimum) {
        const uint32_t constant = (bits_of(minimum) & 0xFFFF0000) | bits_of(maximum) >> 16;
        const float value = float_of(code == kConstantSpan ? constant : Float32::kNan);
        for (int i = 0; i < block; i++) values[i] = value;
        return 0;
    }
    const Frame frame = Frame::of(minimum, maximum);
    const float span = frame.span(code), step = span / (float)((1 << at.bits) - 1), grow = 1 / frame.prescale;
    const float low = frame.anchor + (float)(int8_t)payload[at.lows + index] * (span / kUnits);
    for (int i = 0; i < block; i++) values[i] = (low + (float)codes[i] * step) * grow;
    if (positions[1] < block) values[positions[1]] = maximum;
    if (positions[0] < block) values[positions[0]] = minimum;
    return Frame::bound(minimum, maximum, step, grow);
}

// Limited to the finite range of the tensor's dtype; NaN stays.
template <bool kFirst> void add(const float* __restrict values, int count, float limit, float* __restrict sums) {
    for (int i = 0; i < count; i++) {
        float x = values[i];
        x = x < -limit ? -limit : x > limit ? limit : x;
        sums[i] = kFirst ? x : sums[i] + x;
    }
}

template <class T>
void write(const float* __restrict sums, float bound, int count, typename T::Word* __restrict out) {
    for (int i = 0; i < count; i++) out[i] = rounded_sum<T>(sums[i], bound);
}

template <class T, int kBlock>
void decode_strips(const uint8_t* const* payloads, int count, const SpikeLayout& at, void* out, int64_t first,
                   int64_t last) {
    SpikeStrip strip = {};
    const int block = (int)at.block;
    float values[kLargestBlock];
    for (; first < last; first += kStripBlocks) {
        const int blocks = (int)(last - first < kStripBlocks ? last - first : kStripBlocks);
        const int64_t octet = at.rows.first_octet(first), end = at.rows.first_octet(first + blocks);
        for (int p = 0; p < count; p++) {
            unpack_planes(at.bits, at.octets, octet, (int)(end - octet) * 8, payloads[p], strip.codes);
            unpack_planes(at.position_bits, at.pairs, first / 4, (2 * blocks + 7) / 8 * 8, payloads[p] + at.positions,
                          strip.positions);
            const uint8_t* codes = strip.codes;
            for (int b = 0; b < blocks; b++) {
                float* sums = strip.sums + b * block;
                const float bound =
                    decode_block<kBlock>(payloads[p], at, first + b, codes, strip.positions + 2 * b, values);
                strip.bounds[b] = !kIsHalf<T> || count == 1 ? 0 : p ? strip.bounds[b] + bound : bound;
                p ? add<false>(values, block, T::kMax, sums) : add<true>(values, block, T::kMax, sums);
                codes += (at.rows.values(first + b) + 7) / 8 * 8;
            }
        }
        for (int b = 0; b < blocks; b++)
            write<T>(strip.sums + b * block, strip.bounds[b], (int)at.rows.values(first + b),
                     (typename T::Word*)out + at.rows.first_value(first + b));
    }
}

template <class T> constexpr auto encoder_of(int64_t block) {
    return block == 32    ? encode_strips<T, 32>
           : block == 64  ? encode_strips<T, 64>
           : block == 128 ? encode_strips<T, 128>
                          : encode_strips<T, 0>;
}

template <class T> constexpr auto decoder_of(int64_t block) {
    return block == 32    ? decode_strips<T, 32>
           : block == 64  ? decode_strips<T, 64>
           : block == 128 ? decode_strips<T, 128>
                          : decode_strips<T, 0>;
}

}  // namespace

void encode_spike(const void* x, void*, int dtype, const Spec& spec, uint8_t* payload, int64_t first, int64_t last) {
    const SpikeLayout at(spec.numel, spec.bits, spec.block, spec.width);
    const auto encode = dtype == kFloat32   ? encoder_of<Float32>(at.block)
                        : dtype == kFloat16 ? encoder_of<Float16>(at.block)
                                            : encoder_of<BFloat16>(at.block);
    encode(x, at, payload, first, last);
    if (last == at.blocks) zero_gaps(at, payload);
}

void decode_sum_spike(const uint8_t* const* payloads, int count, const Spec& spec, void* out, int dtype, int64_t first,
                      int64_t last) {
    const SpikeLayout at(spec.numel, spec.bits, spec.block, spec.width);
    const auto decode = dtype == kFloat32   ? decoder_of<Float32>(at.block)
                        : dtype == kFloat16 ? decoder_of<Float16>(at.block)
                                            : decoder_of<BFloat16>(at.block);
    decode(payloads, count, at, out, first, last);
}

}  // namespace flashcomm::FLASHCOMM_ISA
