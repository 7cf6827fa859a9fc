"""Runs the machine code of a CUDA kernel on the CPU and counts what it does: an interpreter of SASS.

    disassembly   compiles a .cu for one architecture, reads what cuobjdump prints: {kernel: [Instruction]}
    machine       the grid: registers, convergence barriers, block barriers, scheduling, counts
    arithmetic    integers and logic;  floating: float32, halves, conversions
    memory        global memory with bounds and alignment, shared memory with wavefronts
    kernels       the codecs and collectives of csrc/cuda, with the parameters that the host code makes

All lanes of all blocks run side by side: a register is one numpy row with an entry for every thread of the grid. The
scheduler takes all lanes that are at the smallest address and runs them until they branch or meet others. So what
depends on the order in which warps run is seen in one order only.

What is assumed:

- Memory is one and the same for all at once: no caches, no weak order. What is ordered by release and acquire is
  checked by the opcodes (tests/gpu/test_sass.py) and by the model of the protocol.
- A lane that reads the clock or sleeps gives way to all others; a microsecond passes when all do.
- ``SHFL`` among fewer lanes than the warp has, and lanes of one warp or block that wait at different places, are
  errors. The kernels exchange among whole warps only.
- Of the results that CUDA leaves open (``MUFU``) those of IEEE are taken: divisions refine them.
- ``FCHK`` sends a division to its slow path where the exponents say so; the exact bound is not published.
- A wavefront of shared memory serves one word of each of the 32 banks.
"""
