// Functions for host and device, and the namespace of one instruction set.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FC_BOTH __host__ __device__
#else
#define FC_BOTH
#endif
#define FC_INLINE FC_BOTH inline __attribute__((always_inline))
#ifndef FLASHCOMM_ISA
#define FLASHCOMM_ISA baseline  // the linker must never merge code compiled with different flags
#endif
