"""The ring of page-locked buffers, on a device that does everything as late as is legal."""

from __future__ import annotations

import pytest
import torch
from consumers import PLAN, RECORDS, SMALLEST, Consumer, device_of
from readers import RamReader

from moetier.tiers.device import ring
from moetier.tiers.device.ring import BUFFERS, Ring
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.host.tier import HostTier


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "PIECE_BYTES", 100)


@pytest.mark.usefixtures("small_pieces")
def test_a_record_comes_piece_by_piece() -> None:
    device = device_of()
    source = torch.arange(1050).to(torch.uint8)
    target, copies = device.allocate(1050), Ring(device, 1050)
    ended = copies.copy(source, target)
    assert device.waits_of_the_host > 0, "the first pieces have left their buffers"
    assert sum(device.pending.values()) <= BUFFERS
    source.fill_(0)
    ended.synchronize()
    assert torch.equal(target, torch.arange(1050).to(torch.uint8))
    assert list(device.locked.values()) == [100] * BUFFERS


def test_copies_that_fit_the_buffers_are_not_waited_for() -> None:
    device = device_of()
    sources = [torch.full((64,), number, dtype=torch.uint8) for number in range(BUFFERS + 1)]
    targets, copies = [device.allocate(64) for _ in sources], Ring(device, 64)
    for source, target in zip(sources[:BUFFERS], targets[:BUFFERS], strict=True):
        copies.copy(source, target)
    assert device.waits_of_the_host == 0
    copies.copy(sources[-1], targets[-1])
    assert device.waits_of_the_host == 1
    device.finish()
    assert all(torch.equal(source, target) for source, target in zip(sources, targets, strict=True))
    copies.close()
    assert not device.locked


def test_buffers_of_an_aborted_copy_are_not_filled_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception came between the copy and its event."""
    device = device_of()
    sources = [torch.full((64,), number, dtype=torch.uint8) for number in range(BUFFERS + 1)]
    targets, copies = [device.allocate(64) for _ in sources], Ring(device, 64)
    with monkeypatch.context() as patched:
        patched.setattr(device.copies, "record_event", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            copies.copy(sources[0], targets[0])
    copies.abort(device.copies.record_event())
    for source, target in zip(sources[1:], targets[1:], strict=True):
        copies.copy(source, target)
    device.finish()
    assert all(torch.equal(source, target) for source, target in zip(sources, targets, strict=True))


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(3))
def test_every_computation_sees_its_record_of_many_pieces(seed: int) -> None:
    device = device_of(seed)
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as host:
        tier = DeviceTier(host, PLAN, slots={"records": 4}, device=device)
        consumer = Consumer(tier, device)
        for block in (0, 1, 2, 0):
            consumer.run(block, [0, 1, 2, 3])
        assert consumer.wrong() == 0
        tier.close()
