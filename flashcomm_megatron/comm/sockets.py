"""TCP connections between the ranks of a group that are on different machines.

Every rank listens for a moment; where and with which password it tells the others over the process group. Of each pair
the higher rank connects and shows the password, which nobody outside the job knows. Connections carry payloads as
they are, like the process group's own: not encrypted.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Collection
from contextlib import suppress
from weakref import WeakSet

import torch.distributed as dist

from . import votes

SECONDS = 10.0  # to connect; whoever cannot uses the process group
GREETING_SECONDS = 1.0  # for who has connected to say who it is
PASSWORD_BYTES = 16
GREETING = struct.Struct(f"{PASSWORD_BYTES}sI")  # the password, and who connects
SIOCGIFADDR = 0x8915  # netdevice(7): an interface's IPv4 address

_open: WeakSet[socket.socket] = WeakSet()


def connect(group: dist.ProcessGroup, far: Collection[int]) -> tuple[dict[int, socket.socket], str]:
    """Connections to the ranks ``far`` from this one; or none, and why.

    Every rank of ``group`` calls this, and all of them have their connections or none has.
    """
    connections: dict[int, socket.socket] = {}
    listener, reason, password = None, "", secrets.token_bytes(PASSWORD_BYTES)
    try:
        listener = _listen(address(), backlog=len(far) + 8) if far else None
    except OSError as error:
        reason = f"cannot listen for connections ({error})"
    where = f"{password.hex()} {' '.join(map(str, listener.getsockname()[:2]))}" if listener else ""
    told = [each.decode() for each in votes.gather(where.encode(), group)]
    reason = votes.failure(reason, group)
    if not reason:
        try:
            deadline = time.monotonic() + SECONDS
            for rank in (rank for rank in far if rank < group.rank()):
                connections[rank] = _call(told[rank], group.rank(), deadline)
            if listener is not None:
                callers = [rank for rank in far if rank > group.rank()]
                connections |= _answer(listener, password, callers, deadline)
        except OSError as error:
            reason = f"no connection to another machine within {SECONDS:g} s ({error})"
        reason = votes.failure(reason, group)
    if listener is not None:
        listener.close()
    if reason:
        for each in connections.values():
            each.close()
        return {}, reason
    return connections, ""


def address() -> str:
    """The address at which other machines reach this one: of gloo's interface, else of that towards the master."""
    interface, master = os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("MASTER_ADDR")
    with suppress(OSError):
        return _address_of(interface.split(",")[0]) if interface else _address_towards(master or socket.gethostname())
    return socket.gethostbyname(socket.gethostname())


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(found[20:24])


def _address_towards(host: str) -> str:
    family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(there)  # sends nothing, but finds the way
        return str(probe.getsockname()[0])


def _listen(host: str, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=backlog)


def _call(told: str, me: int, deadline: float) -> socket.socket:
    password, host, port = told.split()
    connection = socket.create_connection((host, int(port)), timeout=_until(deadline))
    connection.sendall(GREETING.pack(bytes.fromhex(password), me))
    return _ready(connection)


def _until(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _answer(
    listener: socket.socket, password: bytes, callers: Collection[int], deadline: float
) -> dict[int, socket.socket]:
    """One connection from each of ``callers``; whoever else connects is turned away."""
    answered: dict[int, socket.socket] = {}
    while len(answered) < len(callers):
        listener.settimeout(_until(deadline))
        connection, _ = listener.accept()
        shown, rank = _greeting(connection, min(time.monotonic() + GREETING_SECONDS, deadline))
        if hmac.compare_digest(shown, password) and rank in callers and rank not in answered:
            answered[rank] = _ready(connection)
        else:
            connection.close()
    return answered


def _greeting(connection: socket.socket, deadline: float) -> tuple[bytes, int]:
    received = b""
    with suppress(OSError):
        while len(received) < GREETING.size and time.monotonic() < deadline:
            connection.settimeout(_until(deadline))
            more = connection.recv(GREETING.size - len(received))
            if not more:
                break
            received += more
    shown, rank = GREETING.unpack(received.ljust(GREETING.size, b"\0"))
    return shown, rank


def _ready(connection: socket.socket) -> socket.socket:
    _open.add(connection)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    return connection


def _close_in_child() -> None:
    """A connection closes when its rank ends, and not only when the rank's forked children have ended as well."""
    for each in list(_open):
        each.close()


os.register_at_fork(after_in_child=_close_in_child)
