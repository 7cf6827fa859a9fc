// Rows, and the blocks they are cut into: the rule of DESIGN's "rows stand alone", for host and device.
//
// A tensor is `count` rows of `width` values. Each row is cut into blocks of its own; where `block` does not divide the
// width, the row's last block is short. Each row's codes fill whole octets of the bit planes. So no block and no octet
// holds values of two rows. flashcomm_megatron/codec/planes.py has the same rule in torch.
#pragma once

#include "format/portable.h"

namespace flashcomm::FLASHCOMM_ISA {

struct Rows {
    int64_t numel, width, block;    // values of the tensor, of a row, of a block
    int64_t count, blocks, octets;  // rows; blocks and octets of one row

    // `width` 0, or not less than `numel`: one row holds all values.
    FC_INLINE Rows(int64_t numel, int64_t width, int64_t block)
        : numel(numel), width(width > 0 && width < numel ? width : numel), block(block),
          count(this->width ? numel / this->width : 0), blocks((this->width + block - 1) / block),
          octets((this->width + 7) / 8) {}

    FC_INLINE int64_t all_blocks() const { return count * blocks; }
    FC_INLINE int64_t all_octets() const { return count * octets; }

    // The blocks are those of one row of all values: `together` whole blocks divide a row, or there is one row.
    FC_INLINE bool is_flat(int64_t together = 1) const { return count <= 1 || width % (together * block) == 0; }

    // Where block `index`, counted over all rows, begins, and how many values it has.
    FC_INLINE int64_t first_value(int64_t index) const { return index / blocks * width + index % blocks * block; }
    FC_INLINE int64_t first_octet(int64_t index) const {
        return index / blocks * octets + index % blocks * (block / 8);
    }
    FC_INLINE int64_t values(int64_t index) const {
        const int64_t left = width - index % blocks * block;
        return left < block ? left : block;
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
