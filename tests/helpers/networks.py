"""A network of its own: a namespace, reached over a pair of virtual interfaces whose packets can be dropped.

Needs root and iproute2. Skips, saying why, where one can't be made.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_numbers = itertools.count()
# silence: netem loses everything; where the kernel has none, a bucket that no packet fits into does
_SILENCES = (["netem", "loss", "100%"], ["tbf", "rate", "1kbit", "burst", "10", "latency", "1ms"])


@dataclass(frozen=True, slots=True)
class Network:
    name: str
    here: str  # this side's IPv4 address
    there: str
    device: str

    @property
    def prefix(self) -> list[str]:
        """Words before a command that run it in the namespace."""
        return ["ip", "netns", "exec", self.name]

    def drop(self) -> None:
        """Drop every packet in both directions from now on. Neither end is told."""
        for inside in (False, True):
            for silence in _SILENCES:
                if not _ip("tc", inside, self.name, "qdisc", "replace", "dev", self._end(inside), "root", *silence):
                    break
            else:
                pytest.skip("this kernel has no queueing discipline that drops packets (sch_netem, sch_tbf)")

    def flow(self) -> None:
        """Again."""
        for inside in (False, True):
            _ip("tc", inside, self.name, "qdisc", "del", "dev", self._end(inside), "root")

    def _end(self, inside: bool) -> str:
        return f"{self.device}{'n' if inside else 'h'}"


@contextlib.contextmanager
def network(*, slow: bool = False) -> Iterator[Network]:
    """Make a network; with ``slow``, over a link of 1 Gbit/s with a round trip of .3 ms (slow_link.py)."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: iproute2)")
    number = os.getpid() * 16 + next(_numbers) % 16
    block = f"10.{200 + number // 16384 % 50}.{number // 64 % 256}"
    name, device = f"moetier-{number}", f"mt{number % 10**9}"
    made = Network(name, f"{block}.{number % 64 * 4 + 1}", f"{block}.{number % 64 * 4 + 2}", device)
    if error := _ip("ip", False, name, "netns", "add", name):
        pytest.skip(f"no network namespace can be made: {error}")
    link = None
    try:
        veth = (False, "link", "add", f"{device}h", "type", "veth", "peer", "name", f"{device}n", "netns", name)
        steps = (
            *(() if slow else (veth,)),
            (False, "addr", "add", f"{made.here}/30", "dev", f"{device}h"),
            (False, "link", "set", f"{device}h", "up"),
            (True, "addr", "add", f"{made.there}/30", "dev", f"{device}n"),
            (True, "link", "set", f"{device}n", "up"),
            (True, "link", "set", "lo", "up"),
        )
        if slow:
            link = _start_link(name, device)
        for inside, *step in steps:
            if error := _ip("ip", inside, name, *step):
                pytest.skip(f"no virtual network can be made: {error}")
        yield made
    finally:
        if link is not None:
            link.communicate()
        _ip("ip", False, name, "link", "del", f"{device}h")
        _ip("ip", False, name, "netns", "del", name)


def _start_link(name: str, device: str) -> subprocess.Popen[bytes]:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no TUN device can be made")
    command = [sys.executable, Path(__file__).with_name("slow_link.py"), name, f"{device}h", f"{device}n"]
    link = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert link.stdout is not None
    if link.stdout.readline() != b"ready\n":
        link.communicate()
        pytest.skip("no slow link can be made")
    for inside, end in ((False, "h"), (True, "n")):
        _ip("ip", inside, name, "link", "set", f"{device}{end}", "mtu", "9000")
    return link


def _ip(tool: str, inside: bool, namespace: str, *arguments: str) -> str:
    """Run ip(8), and return its error message; "" if it succeeds."""
    command = [tool, *(["-n", namespace] if inside else []), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return (result.stderr.strip() or f"{command} failed") if result.returncode else ""
