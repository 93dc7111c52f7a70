"""Bits that are flipped between a daemon and its client, over TCP without TLS: no result is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch
from daemons import DaemonProcess, running_daemon
from readers import PATIENCE
from relays import DOWN, UP, Flips, flips
from stores import read_record, slot_of
from threads import wait_until
from torch import Tensor

from moetier.runtime.client.peers import Peer
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.remote_compute import RemoteCompute
from moetier.runtime.client.spread import SpreadStore
from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import MoetierError, UnavailableError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.store.reader import ShardStore

PLAIN = Credentials(insecure=True)


@pytest.fixture(scope="module")
def daemon(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon") / "one"
    options = ["--listen", "127.0.0.1:0", "--insecure"]
    with running_daemon(tinymix_4bit, ram="100MiB", folder=folder, extra=options) as started:
        yield started


@pytest.fixture(scope="module")
def manifest(tinymix_4bit: Path) -> Manifest:
    return read_manifest(store_folder(tinymix_4bit))


@pytest.fixture
def wire(daemon: DaemonProcess) -> Iterator[Flips]:
    with flips(daemon.card.listen) as made:
        yield made


def spread_over(wire: Flips, manifest: Manifest) -> SpreadStore:
    """A reader of the daemon, and of nothing else."""
    reader = RemoteStore(Address.parse(wire.address), PLAIN, manifest, channels=1, timeout=3.0)
    reader.probe(PATIENCE)
    return SpreadStore(manifest, [Peer("one", reader)])


@contextmanager
def computing(
    wire: Flips, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Tensor | None]]:
    """Yield a function that lets the daemon compute an expert for three rows. It returns the outputs or None."""
    monkeypatch.setattr(RemoteCompute, "_fetches", lambda *_: False)
    with ExitStack() as stack:
        spread = stack.enter_context(spread_over(wire, manifest))
        host = stack.enter_context(HostTier(spread, slots=slots_for(manifest, smallest_budget(manifest))))
        remote = RemoteCompute(spread, host)
        kernels = ExpertKernels(manifest.layout(1), Activation(), torch.bfloat16, manifest.blocks[1].experts)
        x = torch.randn(3, kernels.width, generator=torch.Generator().manual_seed(0)).bfloat16()

        def compute() -> Tensor | None:
            outputs = torch.zeros(3, kernels.width, dtype=torch.bfloat16)
            rows = {2: ([0, 2], [0, 1]), 3: ([1], [2])}
            with closing(remote.send(kernels, 1, x.data_ptr(), 3, rows)) as sent:
                return outputs if sent.experts and not sent.collect(outputs.data_ptr()) else None

        wait_until(lambda: compute() is not None)  # the daemon has compiled its code
        yield compute


def flipped_everywhere(wire: Flips, call: Callable[[], bool], steps: tuple[int, int]) -> Counter[object]:
    """Repeat a call, with a bit flipped in every so many bytes of either direction. Return how often it returned what.

    It returns whether the result is right, which it has to be; an error counts as "error".
    """

    def result() -> bool | str:
        try:
            return call()
        except MoetierError:
            return "error"

    for _ in range(3):  # headers are short once they were sent before
        before = list(wire.passed)
        wait_until(lambda: result() is True)
    sizes = [after - first for after, first in zip(wire.passed, before, strict=True)]
    found = Counter[object]()
    for way in (DOWN, UP):
        for at in range(0, sizes[way], steps[way]):
            for _ in range(2):  # a process that was held misses a deadline, but hardly twice
                wire.flip(way, at, at % 8)
                outcome = result()
                wire.forget()
                assert outcome, f"bit {at % 8} of byte {at} {'to' if way == UP else 'from'} the daemon"
                if outcome is True:
                    break
                wait_until(lambda: result() is True)
            found[outcome] += 1
    assert wire.flipped > 0.5 * found.total()
    return found


STEPS = [pytest.param((41, 67), id="some"), pytest.param((5, 7), id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("steps", STEPS)
def test_computations(wire: Flips, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]) -> None:
    """The client fetches records that the daemon does not compute with."""
    with computing(wire, manifest, monkeypatch) as compute:
        wanted = compute()
        assert wanted is not None

        def call() -> bool:
            if (found := compute()) is None:
                raise UnavailableError("Nothing was computed.", "Try again.")
            return torch.equal(found, wanted)

        found = flipped_everywhere(wire, call, steps)
        assert found[True] > 0.8 * found.total(), "a second call is enough"


@pytest.mark.parametrize("steps", STEPS)
def test_records(wire: Flips, manifest: Manifest, tinymix_4bit: Path, steps: tuple[int, int]) -> None:
    key = ExpertKey(1, 2)
    with ShardStore.open(tinymix_4bit) as store:
        wanted = read_record(store, key)
    with spread_over(wire, manifest) as reader:

        def call() -> bool:
            slot = slot_of(manifest, key)
            reader.read_into(key, slot)
            return slot[: len(wanted)] == wanted

        found = flipped_everywhere(wire, call, (steps[0] // 8 or 1, 300 * steps[1]))
        assert found.keys() == {True}, "a second call, or one over a new connection, is enough"
