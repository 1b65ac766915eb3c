"""A port for ranks to meet at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of this host that nothing listens on, below those that the kernel gives to connections.

    Of those another process may get it in the seconds until this run listens: gloo alone takes some for every pair of ranks.
    """
    try:
        lowest = int(_GIVEN_OUT.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32768
    below = range(lowest // 2, lowest)
    tries = random.SystemRandom().sample(below, 100) if below.start > 1024 else []
    for port in [*tries, 0]:  # at the last any
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("a socket without a port of its own is always bound")
