"""A network of its own, in which every address is this machine; what is sent to other addresses is noted."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, TypeVar

T = TypeVar("T")

REPORTED_BY = 20.0
"""Seconds from its import on by which ONNX Runtime has begun to report: the first time after nine."""

# Constants of Linux's sched.h, if_ether.h, if_packet.h and in.h.
NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_EVERY_PROTOCOL, _IPV4, _IPV6 = 0x0003, 0x0800, 0x86DD
_OUTGOING = 4
_TCP, _UDP = 6, 17
_SYN, _ACK = 0x02, 0x10
_DNS = 53

_ROUTES = ("link set lo up", "route add local 0.0.0.0/0 dev lo", "-6 route add local ::/0 dev lo")
_LOOK_SECONDS = 0.2


class Seclusion:
    """Runs work in a thread that has a network of its own, as have the processes that it starts.

    sent: address, port and, of a question to a resolver, the name, of all that was written to others than
    127.0.0.0/8 and ::1. Raises OSError where this user may make no such network, or has no `ip`.
    """

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self._pool = ThreadPoolExecutor(1)
        self._pool.submit(self._enter).result()
        self._closing = threading.Event()
        self._listening = threading.Thread(target=self._listen)
        self._listening.start()

    def run(self, work: Callable[[], T]) -> T:
        """The result of work, in the thread."""
        return self._pool.submit(work).result()

    def close(self) -> None:
        """Ends the thread, and with it the network."""
        self._pool.shutdown()
        self._closing.set()
        self._listening.join()

    def _enter(self) -> None:
        enter_own_network()
        for command in _ROUTES:
            subprocess.run(["ip", *command.split()], check=True)
        self._packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_EVERY_PROTOCOL))
        self._packets.settimeout(_LOOK_SECONDS)

    def _listen(self) -> None:
        with self._packets:
            while not self._closing.is_set():
                with suppress(TimeoutError):
                    self._note(*self._packets.recvfrom(65_536))

    def _note(self, packet: bytes, sender: Any) -> None:
        _, protocol, kind, *_ = sender
        if kind == _OUTGOING and (where := destination(packet, protocol)) is not None:
            self.sent.add(where)


def enter_own_network() -> None:
    """Give this thread a network of its own, in which nothing is set up. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NETWORK):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def destination(packet: bytes, protocol: int) -> str | None:
    """The destination of a connection's first packet or of a datagram; None for others and this machine."""
    address: IPv4Address | IPv6Address
    if protocol == _IPV4:
        size, transport, address = (packet[0] & 15) * 4, packet[9], ip_address(packet[16:20])
    elif protocol == _IPV6:
        size, transport, address = 40, packet[6], ip_address(packet[24:40])
    else:
        return None
    if transport not in (_TCP, _UDP):
        return None
    body = packet[size:]
    (port,) = struct.unpack_from(">H", body, 2)
    if transport == _TCP and body[13] & (_SYN | _ACK) != _SYN:
        return None
    name = question(body[8:]) if transport == _UDP and port == _DNS else ""
    # A resolver on this machine asks others.
    if address.is_loopback and port != _DNS:
        return None
    return f"{address} port {port} {name}".strip()


def question(message: bytes) -> str:
    """The first name that a message to a resolver asks for."""
    labels, at = [], 12
    while at < len(message) and (length := message[at]):
        labels.append(message[at + 1 : at + 1 + length].decode(errors="replace"))
        at += 1 + length
    return ".".join(labels)
