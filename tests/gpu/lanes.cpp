// One rotated tile on fibers, with a NaN in the octet of one lane: whether all lanes of its warp exchange alike.
#include "stand_ins/cuda/fibers.h"

#include <vector>

#include "cuda/rotated_tile.h"

using namespace flashcomm::emulated;

int main() {
    const RotatedTile<BFloat16> codec({1, 8, 64});
    std::vector<uint16_t> x(kLeastTile, 0x3F80);
    x[40] = 0x7FC0;
    std::vector<Vec16> payload((size_t)codec.bytes(kLeastTile) / 16);
    fibers::Block block(
        [&] {
            Octet<BFloat16> octets[kRows<BFloat16>];
            load<BFloat16>(x.data(), kLeastTile, octets);
            codec.with_blocks([&](const auto& blocks) {
                blocks.template encode_to<true>(octets, kLeastTile, shared_memory(), (uint8_t*)payload.data(),
                                                codec.own(kLeastTile), nullptr);
            });
        },
        0, 1, kThreads);
    while (!block.ended()) block.step();
}
