"""What joins this rank's GPU to others: NVLink, or PCIe, and then on which processor socket it is.

Linux says which NUMA node a PCI device is next to, and of which package that node's processors are; one package may be
several nodes. NVIDIA's driver says whether NVLink is in use. Where any of them says nothing, neither do we, and sums
travel as over PCIe from GPUs that are equally near. Ranks tell each other what they found (communicator.py), so all
decide alike.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

SYSTEM = Path("/sys")
NVLINK, NVLINKS = "NVLink", 18  # of a GPU, at most


def socket() -> str:
    """``NVLINK`` if that joins the current GPU to others, else its socket; empty if it is not known."""
    if not torch.cuda.is_available() or torch.version.hip:
        return ""
    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        bus = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    except AttributeError:  # torch before 2.8
        return ""
    joined = has_nvlink(bus)
    return NVLINK if joined else "" if joined is None else package(bus)


def package(bus: str) -> str:
    """The processor package next to the PCI device at ``bus``; empty if Linux does not say."""
    try:
        node = int((SYSTEM / "bus/pci/devices" / bus / "numa_node").read_text())
        first = (SYSTEM / f"devices/system/node/node{node}/cpulist").read_text().replace("-", ",").split(",")[0]
        return (SYSTEM / f"devices/system/cpu/cpu{int(first)}/topology/physical_package_id").read_text().strip()
    except (OSError, ValueError):  # node -1: a machine with one, or a virtual one that hides them
        return ""


def has_nvlink(bus: str) -> bool | None:
    """Whether a link of the GPU at ``bus`` is up; None if the driver's library cannot be asked."""
    handle, is_up = ctypes.c_void_p(), ctypes.c_uint()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(handle)):
            return None
        links = range(NVLINKS)  # asking for a link that there is not ends with an error code
        return any(not nvml.nvmlDeviceGetNvLinkState(handle, n, ctypes.byref(is_up)) and is_up.value for n in links)
    except (OSError, AttributeError):
        return None
