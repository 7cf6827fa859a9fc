"""GPUs and the links between them: published figures, each with its source beside it.

Rates are bytes per second in one direction from one GPU, times are seconds. A link's rate is what transfers reach, not
what the data sheet adds up over both directions. Fitted constants say so and name what they were fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Row = TypeVar("Row")

GB = 1e9
US = 1e-6

# Share of a GPU's memory bandwidth that codecs, and decoding, reach. Assumed: between 0.89, a copy on an A800 PCIe
# (1727 of 1935 GB/s, github.com/mli/transformers-benchmarks issue 4), and 0.71, our bar of 80 % of such a copy.
MEMORY_EFFICIENCY = 0.8

# Seconds that compressing adds to a small collective, fitted to QuickReduce's 32 KiB: medians 23 against 17 us.
CODEC_LATENCY = 6 * US

NCCL_TOPOLOGY = "NCCL src/graph/topo.h"  # what NCCL itself reckons with when it chooses rings
NVLS = "github.com/NVIDIA/nccl-tests issue 212: 275 GB/s of tensor with 8 GPUs"
NCCL_NVLINK = "19.4 us, H100 TP8, 4 KB, NCCL (NVIDIA aiconfigurator)"
NCCL_PCIE = "42 us, 8 RTX 4090, 8 B (github.com/NVIDIA/nccl issue 1530)"
QUICKREDUCE = "QuickReduce README, MI300X"


@dataclass(frozen=True)
class Link:
    """How the GPUs of one node reach each other."""

    rate: float  # one GPU sends to all others together; where ``mesh``, to each of them
    source: str  # of the rate
    latency: float  # of a small exact collective as a whole; a compressed one takes ``codec_latency`` more
    latency_source: str
    codec_latency: float = CODEC_LATENCY
    step: float = 0.0  # more, for each of a collective's exchanges
    message: float = 0.0  # more, for each message a rank posts
    nvlink: bool = False
    mesh: bool = False  # a wire of its own between every two GPUs
    multicast: float | None = None  # tensor bytes per second of an all-reduce that the switch adds up
    multicast_source: str = ""
    drain: float | None = None  # bytes per second at which a fused kernel works off what others sent it
    drain_source: str = ""

    def send_rate(self, world: int) -> float:
        return self.rate * (world - 1 if self.mesh else 1)


def _pcie(rate: float, source: str) -> Link:
    return Link(rate * GB, f"{NCCL_TOPOLOGY}: {source}", 42 * US, NCCL_PCIE)


def _nvlink(links: int, each: float, constant: str, multicast: float, source: str = NVLS) -> Link:
    rate, published = links * each * GB, f"{NCCL_TOPOLOGY}: {links} links of {constant}"
    multicast *= GB
    return Link(rate, published, 19.4 * US, NCCL_NVLINK, nvlink=True, multicast=multicast, multicast_source=source)


LINKS: dict[str, Link] = {
    "pcie4": _pcie(24, "PCI Gen4 x16, twice PCI_BW; GPUs under one socket or switch"),
    "pcie4-sockets": _pcie(10, "SKL_QPI_BW; the ring crosses from one socket to the other"),
    "pcie5-sockets": _pcie(22, "SRP_QPI_BW; the ring crosses from one socket to the other"),
    "nvlink3": Link(
        235 * GB,
        "NCCL src/graph/tuning.cc: compute capability 8.0 reaches 235 of 12 links of SM80_NVLINK_BW = 240 GB/s",
        19.4 * US,
        NCCL_NVLINK,
        nvlink=True,
    ),
    "nvlink4": _nvlink(18, 20.6, "SM90_NVLINK_BW", 275),
    "nvlink4-h800": _nvlink(8, 20.6, "SM90_NVLINK_BW", 215 / 1.75, "github.com/NVIDIA/nccl issue 1374: busbw 215 GB/s"),
    "nvlink5": _nvlink(18, 40.1, "SM100_NVLINK_BW", 830 / 1.75, "github.com/NVIDIA/nccl issue 1807: busbw 830 GB/s"),
    "xgmi": Link(
        48 * GB,
        "AMD, Understanding RCCL Bandwidth and xGMI Performance on MI300X (2025): 48 of 64 GB/s between two GPUs",
        17 * US,
        f"fitted: {QUICKREDUCE}, 32 KiB, median of RCCL's 16.2 to 18.2 us",
        mesh=True,
        drain=300 * GB,
        drain_source=f"fitted, rounded, to one number: {QUICKREDUCE}, TP8, 64 MiB, 4 bits, 273 us",
    ),
}


@dataclass(frozen=True)
class Gpu:
    """One GPU. Peaks are dense bf16, without sparsity."""

    peak: float  # operations per second
    matmul: float  # share of the peak that large matrix products reach
    matmul_source: str
    memory_rate: float
    memory: float  # bytes
    link: str  # of the usual machine with eight of them
    source: str


MAMF = "github.com/stas00/ml-engineering, maximum achievable matmul FLOPS"
L20_CUBLAS = "105 to 115 of 119.5 TFLOPS by cuBLAS on L20 (github.com/DefTruth/CUDA-Learn-Notes, hgemm)"
L40_CUBLAS = f"taken as L20's: {L20_CUBLAS}"
RTX_4090 = "158.6 TFLOPS at n = 8192 (github.com/mli/transformers-benchmarks issue 4)"
ADA = "NVIDIA Ada GPU architecture whitepaper, bf16 with float32 accumulation"
H100_LIKE = f"taken as H100's ({MAMF})"

GPUS: dict[str, Gpu] = {
    "L40": Gpu(181.05e12, 0.92, L40_CUBLAS, 864 * GB, 48 * GB, "pcie4-sockets", "NVIDIA L40 data sheet"),
    "L20": Gpu(119.5e12, 0.92, L20_CUBLAS, 864 * GB, 48 * GB, "pcie4-sockets", "NVIDIA L20 data sheet"),
    "4090": Gpu(165.2e12, 0.96, RTX_4090, 1008 * GB, 24 * GB, "pcie4-sockets", ADA),
    "A100": Gpu(312e12, 0.859, MAMF, 2039 * GB, 80 * GB, "nvlink3", "NVIDIA A100 data sheet, SXM 80 GB"),
    "A100-PCIe": Gpu(312e12, 0.822, MAMF, 1935 * GB, 80 * GB, "pcie4-sockets", "NVIDIA A100 data sheet, PCIe 80 GB"),
    "H100": Gpu(989e12, 0.803, MAMF, 3350 * GB, 80 * GB, "nvlink4", "NVIDIA H100 data sheet, SXM"),
    "H200": Gpu(989e12, 0.803, MAMF, 4800 * GB, 141 * GB, "nvlink4", "NVIDIA H200 data sheet, SXM"),
    "H800": Gpu(989e12, 0.803, H100_LIKE, 3350 * GB, 80 * GB, "nvlink4-h800", "H100's, but NVLink 400 GB/s"),
    "H20": Gpu(148e12, 0.803, H100_LIKE, 4000 * GB, 96 * GB, "nvlink4", "NVIDIA H20 data sheet"),
    "B200": Gpu(2250e12, 0.776, MAMF, 8000 * GB, 180 * GB, "nvlink5", "NVIDIA DGX B200 data sheet, one eighth"),
    "MI300X": Gpu(1307.4e12, 0.601, MAMF, 5300 * GB, 192 * GB, "xgmi", "AMD Instinct MI300X data sheet"),
}


def gpu(name: str) -> Gpu:
    """The row of ``name``, in any case; ValueError that lists what there is."""
    return _row(GPUS, name, "gpu")


def link(name: str) -> Link:
    """The row of ``name``; ValueError that lists what there is."""
    return _row(LINKS, name, "link")


def _row(table: Mapping[str, Row], name: str, what: str) -> Row:
    for known, row in table.items():
        if known.lower() == name.lower():
            return row
    raise ValueError(f"--{what} {name}: choose {', '.join(table)}.")
