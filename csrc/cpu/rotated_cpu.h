// The rotated format's kernels of one instruction set; see struct Kernels in api.h.
#pragma once

#include "api.h"

namespace flashcomm::FLASHCOMM_ISA {

void encode_rotated(const void* x, void* residual, int dtype, const Spec&, uint8_t* payload, int64_t first,
                    int64_t last);
void decode_sum_rotated(const uint8_t* const* payloads, int count, const Spec&, void* out, int dtype, int64_t first,
                        int64_t last);

}  // namespace flashcomm::FLASHCOMM_ISA
