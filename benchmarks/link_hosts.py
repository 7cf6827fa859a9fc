"""Machines that are network namespaces: their own interface, address and host name, joined by a switch at a given rate.

A token bucket on each machine's interface limits what it sends. Everything is taken away again when the ``with`` block
ends, however it ends. Needs root and the ``ip`` and ``tc`` commands of iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType

SUBNET = "10.77.0"


class Refused(RuntimeError):
    """The lab cannot be built here, and why."""


class Hosts:
    """``count`` machines that each send at most ``rate`` (as tc writes it: "100mbit", "1gbit"; None: no limit)."""

    def __init__(self, count: int, rate: str | None) -> None:
        if os.geteuid() != 0:
            raise Refused("network namespaces need root: run this with sudo, or in a container that allows them.")
        missing = [tool for tool in ("ip", "tc", "unshare", "hostname") if shutil.which(tool) is None]
        if missing:
            raise Refused(f"{', '.join(missing)} not found: install iproute2, util-linux and hostname.")
        self.count, self.rate = count, rate
        self._prefix = f"fclab{os.getpid()}"
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Hosts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, _interrupt)
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in [self._switch, *(self.name(host) for host in range(self.count))]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def _switch(self) -> str:
        return f"{self._prefix}switch"

    def name(self, host: int) -> str:
        """Namespace, and host name, of one machine."""
        return f"{self._prefix}h{host}"

    def address(self, host: int) -> str:
        """IPv4 address of one machine."""
        return f"{SUBNET}.{host + 1}"

    def start(self, host: int, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run ``command`` on one machine, under the machine's own host name."""
        inside = ["ip", "netns", "exec", self.name(host), "unshare", "--uts", "sh", "-c"]
        script = f'hostname {self.name(host)} && exec "$@"'
        return subprocess.Popen([*inside, script, "sh", *command], env={**os.environ, **environment})

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host in range(self.count):
            name, port = self.name(host), f"port{host}"
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "mtu", str(self._packet), "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "mtu", str(self._packet), "up")
            _ip("-n", name, "link", "set", "lo", "up")
            if self.rate is not None:
                self._limit(name, self.rate)

    @property
    def _packet(self) -> int:
        """Bytes of a packet: jumbo frames from 1 Gbit/s on, where two cores cannot handle small ones at that rate."""
        return 9000 if self.rate is None or bits_per_second(self.rate) >= 1e9 else 1500

    def _limit(self, name: str, rate: str) -> None:
        """A token bucket of a quarter of a millisecond, at least two packets, and a queue that never drops.

        A larger bucket fills up while ranks compute, and small messages then travel for nothing (link_ranks.py checks
        it). Beyond 1 Gbit/s the kernel's timer needs a millisecond's to keep the rate.
        """
        bits = bits_per_second(rate)
        burst = max(int(bits / 8 * (2.5e-4 if bits <= 1e9 else 1e-3)), 2 * self._packet + 100)
        bucket = ["rate", rate, "burst", str(burst), "limit", str(256 << 20)]
        _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", *bucket)


def bits_per_second(rate: str) -> float:
    """What "100mbit" or "1gbit" means."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise Refused(f"rate {rate!r}: write it like 100mbit or 10gbit.")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # unwinds the with block
