// The codec of rotated blocks for rows that end inside a super-block: 5120 values in blocks of 64, 3584 in blocks of 32.
//
// A row's last super-block is short, and a warp or more of threads works on a super-block. So each row is counted with
// as many octets as whole super-blocks have, `padded`, and threads of octets that a row has not do nothing:
//
//     octets counted    | row 0: 640 exist, 128 do not | row 1 ...          5120 values in blocks of 64, padded to 6144
//
// What a thread is told of its tile (its values, where codes, scales and tops lie, its residual) is shifted by what of
// that is not there. Nothing inside a tile changes, and codes, scales and residuals lie as rotated.h says.
#pragma once

#include "cuda/codec_kernels.h"

namespace flashcomm::FLASHCOMM_ISA {

template <class Tile, class T> struct RowedCodec {
    using Word = typename T::Word;
    using Place = typename Tile::template Place<int>;  // in a payload of less than 2 GiB (fits())

    Tile codec;
    int tile, tops;        // values counted of a tile; super-blocks of a row
    uint32_t row, padded;  // octets of a row: that exist, and that are counted
    uint32_t rows;
    int tiles, residuals;  // of the tensor; numbers of a row's residual
    Place whole;

    // `padded`: values counted of a row of `width`, a multiple of both legs' super-blocks.
    RowedCodec(Setting with, int64_t numel, int64_t width, int64_t padded, int tile)
        : codec(with), tile(tile), tops((int)ceil_div(width, codec.unit())), row((uint32_t)(width / 8)),
          padded((uint32_t)(padded / 8)), rows((uint32_t)(numel / width)),
          tiles((int)ceil_div(numel / width * padded, tile)), residuals((int)codec.residual_numel(width)),
          whole(codec.template own<int>((int)numel)) {}

    // Whether 32 bits count the values, the octets and the payload of such a tensor.
    static bool fits(int64_t numel, int64_t counted) { return numel <= 1 << 30 && counted / 8 <= UINT32_MAX; }

    // The same codec, of another tensor.
    FC_DEVICE void resize(const RowedCodec& other) { rows = other.rows, tiles = other.tiles, whole = other.whole; }

    FC_DEVICE Extent extent(int t) const {
        const Octets here = octets(t);
        return {8 * (real(here) - first_octet<T>()), values(here)};
    }
    FC_DEVICE void encode_tile(int t, const Octet<T> (&x)[kRows<T>], uint8_t* payload, Word* residual) const {
        const Octets here = octets(t);
        const int64_t lost = product((int)here.row, residuals) + codec.block() * blocks(here);
        codec.with_blocks([&](const auto& blocks) {
            blocks.template encode_to<false>(x, values(here), shared_memory(), payload, place(here),
                                             Tile::kKeepsResiduals ? residual + lost : nullptr);
        });
    }
    FC_DEVICE void sum_tile(int t, const Payloads& payloads, int64_t offset, int count, float (&x)[kRows<T>][8]) const {
        sum_octets<T>(codec, payloads, offset, count, place(octets(t)), first_octet<T>(), x);
    }
    FC_DEVICE void zero_gaps(uint8_t* payload) const {
        codec.template zero_gaps<int>(whole, (int)(rows * row >> codec.octet_shift), (int)rows * tops, payload);
    }

private:
    // Where a thread's octets are: its first in a row, and how many the row has from there on. Where there is none, what
    // the thread reads, for nobody, are octets of row 0.
    struct Octets {
        uint32_t row, first, left;
    };
    FC_DEVICE Octets octets(int t) const {
        const uint32_t counted = (uint32_t)t * (uint32_t)(tile / 8) + (uint32_t)first_octet<T>();
        const uint32_t at = counted / padded, first = counted - at * padded;
        if (at < rows && first < row) return {at, first, row - first};
        return {0, first & ((1u << codec.octet_shift) - 1), 0};
    }
    FC_DEVICE int real(const Octets& here) const { return (int)(here.row * row + here.first); }
    // Values of the row, counted from where the tile begins for this thread.
    FC_DEVICE int values(const Octets& here) const { return here.left ? 8 * (first_octet<T>() + (int)here.left) : 0; }
    // By how many blocks, and super-blocks, of its row a thread is further than in its tile.
    FC_DEVICE int blocks(const Octets& here) const {
        return (int)(here.first >> codec.octet_shift) - (first_octet<T>() >> codec.octet_shift);
    }
    FC_DEVICE Place place(const Octets& here) const {
        const int octet = real(here) - first_octet<T>(), top = (int)here.row * tops + blocks(here) / kSuperBlock;
        return {whole.groups, octet, whole.scales + (octet >> codec.octet_shift), whole.tops + 2 * top};
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
