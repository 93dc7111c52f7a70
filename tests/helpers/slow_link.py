"""A link between this network namespace and another one that is as slow as a real one: 1 Gbit/s, .3 ms there and back.

    python slow_link.py NAMESPACE DEVICE OTHER

Makes the TUN device DEVICE here and OTHER there, says "ready", and carries packets between them until its standard
input ends. (The kernel's own delays, sch_netem, are not in every kernel.)
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import threading
import time
from collections import deque
from pathlib import Path

RATE = 1e9 / 8  # bytes per second, each way
DELAY = 150e-6  # seconds, each way
LONGEST = 0.05  # seconds that a packet may wait for its turn; others are dropped
MTU = 9000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_CLONE_NEWNET, _PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 0x40000000, 1, 29
_libc = ctypes.CDLL(None, use_errno=True)


def open_tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def open_in(namespace: str, name: str) -> int:
    descriptors: list[int] = []

    def enter() -> None:  # only this thread is moved
        descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        if _libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        descriptors.append(open_tun(name))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return descriptors[0]


def carry(source: int, target: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    waiting: deque[tuple[float, bytes]] = deque()
    free = 0.0  # when the last packet has left
    while True:
        pause = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        if select.select([source], [], [], pause)[0]:
            try:
                packet = os.read(source, 1 << 16)
            except (BlockingIOError, OSError):
                packet = b""
            now = time.monotonic()
            if packet and free - now < LONGEST:
                free = max(now, free) + len(packet) / RATE
                waiting.append((free + DELAY, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            with contextlib.suppress(OSError):  # the device is down
                os.write(target, waiting.popleft()[1])


def main() -> None:
    namespace, here, there = sys.argv[1:]
    ends = open_tun(here), open_in(namespace, there)
    children = []
    for source, target in (ends, ends[::-1]):
        if not (child := os.fork()):
            carry(source, target)
        children.append(child)
    print("ready", flush=True)
    sys.stdin.read()
    for child in children:
        os.kill(child, 9)


if __name__ == "__main__":
    assert Path("/dev/net/tun").exists()
    main()
