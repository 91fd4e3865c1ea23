"""A network like a cluster's: pods have addresses of their own, and services have names."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import struct
import subprocess
import threading

from tests.scale.kubernetes.manifests import NAMESPACE
from tests.support.service.seclusion import NEW_NETWORK, enter_own_network, question

GATEWAY = "10.77.0.1"
DOMAIN = f"{NAMESPACE}.svc.cluster.local"
RESOLVER = f"nameserver {GATEWAY}\nsearch {DOMAIN} svc.cluster.local cluster.local\noptions ndots:5\n"

_DNS = 53
_A, _INTERNET, _NO_SUCH_NAME = 1, 1, 3


class Network:
    """The thread that makes it is in it until it closes it, with all threads and processes that it starts.

    Pods join it. `addresses`: what the names of services mean, which may change at any time. Raises OSError
    and CalledProcessError where this user may make no networks.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, tuple[str, ...]] = {}
        self._numbers = itertools.count(2)
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        enter_own_network()
        try:
            _ip("link set lo up")
            _ip("link add pods type bridge")
            _ip(f"address add {GATEWAY}/24 dev pods")
            _ip("link set pods up")
            self._asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._asked.bind((GATEWAY, _DNS))
        except BaseException:
            self._leave()
            raise
        self._resolver = threading.Thread(target=self._resolve, name="DNS")
        self._resolver.start()

    def join(self, process: int) -> str:
        """Give the network of a process an address here, and return it."""
        number = next(self._numbers)
        address = f"10.77.0.{number}"
        _ip(f"link add pod{number} type veth peer name eth0 netns {process}")
        _ip(f"link set pod{number} master pods up")
        for command in (
            "link set lo up",
            f"address add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {GATEWAY}",
        ):
            _ip(command, "nsenter", f"--net=/proc/{process}/ns/net")
        return address

    def close(self) -> None:
        """Bring this thread back to where it was."""
        # An empty message ends the thread, which a closed socket would leave waiting.
        self._asked.sendto(b"", (GATEWAY, _DNS))
        self._resolver.join()
        self._asked.close()
        self._leave()

    def _leave(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        left = libc.setns(self._outside, NEW_NETWORK)
        os.close(self._outside)
        assert left == 0, os.strerror(ctypes.get_errno())

    def _resolve(self) -> None:
        while True:
            message, sender = self._asked.recvfrom(4096)
            if not message:
                return
            self._asked.sendto(self._answer(message), sender)

    def _answer(self, message: bytes) -> bytes:
        """The response to a question, as RFC 1035 has it."""
        end = message.index(b"\0", 12) + 5
        (kind,) = struct.unpack_from(">H", message, end - 4)
        found = self.addresses.get(question(message).lower())
        answers = (found or ()) if kind == _A else ()
        flags = 0x8580 | (_NO_SUCH_NAME if found is None else 0)
        head = message[:2] + struct.pack(">HHHHH", flags, 1, len(answers), 0, 0)
        record = b"\xc0\x0c" + struct.pack(">HHIH", _A, _INTERNET, 1, 4)
        return head + message[12:end] + b"".join(record + socket.inet_aton(one) for one in answers)


def _ip(command: str, *launcher: str) -> None:
    subprocess.run([*launcher, "ip", *command.split()], check=True, capture_output=True)
