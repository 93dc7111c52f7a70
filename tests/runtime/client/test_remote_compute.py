"""Experts that daemons compute: bits, failures, and what is fetched in place of that; with real daemons and sockets."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import outlets
import pytest
import torch
import trustme
from comparison import smallest_ram
from daemons import DaemonProcess, running_daemon
from networks import network
from threads import Task, wait_until
from torch import Tensor

import moetier
from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.client import remote_compute, spread
from moetier.runtime.client.costs import FetchRate, OutputSeconds, RecentUses
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.remote_compute import RemoteCompute
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.moe import quick
from moetier.runtime.wire.address import Credentials
from moetier.runtime.wire.piece import encode_piece
from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import BudgetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import Share
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.store.reader import ShardStore

SLOW = 1e3  # bytes per second: no fetch pays until an expert is used often
STEPS = 16


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FetchRate, "value", SLOW)


@pytest.fixture(scope="module")
def bare(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without shards."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    return Path(shutil.copytree(tinymix_4bit, folder, ignore=shutil.ignore_patterns("c")))


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text("s3cret")
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def daemons(folder: Path, directory: Path, token: Path, count: int = 3) -> Iterator[list[DaemonProcess]]:
    """Each with room for all, on a port that it keeps when it is started again."""
    with ExitStack() as stack:
        started = []
        for number in range(count):
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            options = ["--listen", f"127.0.0.1:{port}", "--token-file", token]
            started.append(
                stack.enter_context(running_daemon(directory, ram="100MiB", folder=folder / str(number), extra=options))
            )
        yield started


@pytest.fixture(scope="module")
def three(tinymix_4bit: Path, token: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DaemonProcess]]:
    """Daemons that no test stops."""
    with daemons(tmp_path_factory.mktemp("daemons"), tinymix_4bit, token) as three:
        yield three


def listening(started: list[DaemonProcess]) -> list[str]:
    return [daemon.card.listen for daemon in started]


@torch.inference_mode()
def logits(model: Any, actions: dict[int, Callable[[], object]] | None = None, *, steps: int = STEPS) -> Tensor:
    """Return logits of a prompt, of single tokens, and, if these are STEPS, of eight at once. ``actions`` run before
    their steps."""
    ids = torch.randint(3, 250, (1, 12 + STEPS + 8), generator=torch.Generator().manual_seed(0))
    output = model(ids[:, :12], use_cache=True)
    found = [output.logits[0]]
    for step in range(12, 12 + steps):
        if actions is not None and (action := actions.pop(step - 12, None)):
            action()
        output = model(ids[:, step : step + 1], **{CACHE: output.past_key_values}, use_cache=True)
        found.append(output.logits[0])
    if steps < STEPS:
        return torch.cat(found)
    output = model(ids[:, 12 + STEPS :], **{CACHE: output.past_key_values}, use_cache=True)
    return torch.cat([*found, output.logits[0]])


@pytest.fixture(scope="module")
def expected(tinymix_4bit: Path) -> Tensor:
    model, _ = moetier.load(tinymix_4bit, daemon=None)
    with model.tiers:
        return logits(model)


def load(directory: Path, addresses: list[str], token: Path, ram: int, **options: Any) -> Any:
    credentials = options.pop("credentials", Credentials(token_file=token, insecure=True))
    model, _ = moetier.load(directory, ram=ram, daemon=",".join(addresses), credentials=credentials, **options)
    return model


def shares_of(model: Any) -> list[Share]:
    return [share for share in model.tiers.origin.shares() if share.place != "the local store"]


@pytest.mark.usefixtures("slow")
def test_the_logits_are_those_of_local_computing(
    bare: Path, three: list[DaemonProcess], token: Path, expected: Tensor
) -> None:
    before = [daemon.stats().computed for daemon in three]
    model = load(bare, listening(three), token, smallest_ram(bare))
    with model.tiers:
        assert torch.equal(logits(model), expected)
        shares = shares_of(model)
        assert min(share.computed for share in shares) > 0
        assert all(share.computed_bytes > share.computed * 128 for share in shares)
    computed = [daemon.stats().computed - count for daemon, count in zip(three, before, strict=True)]
    assert computed == [share.computed for share in shares]
    assert [daemon.stats().host.leased for daemon in three] == [0, 0, 0]


@pytest.mark.usefixtures("slow")
def test_daemons_that_compute_at_the_same_time_are_timed_once(
    bare: Path, three: list[DaemonProcess], token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each was timed by itself, a row would seem to take as many times as long as there are daemons."""
    timed: list[int] = []
    monkeypatch.setattr(OutputSeconds, "add", lambda self, seconds, rows: timed.append(rows))
    model = load(bare, listening(three), token, smallest_ram(bare))
    with model.tiers:
        logits(model)
        assert sum(timed) > 0.8 * sum(share.computed for share in shares_of(model)), "all but what failed"
        blocks = len(model.tiers.manifest.blocks)
    assert 0 < len(timed) <= blocks * (STEPS + 2)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("has_shards", [pytest.param(False, marks=pytest.mark.slow), True])
def test_daemons_are_killed_frozen_and_started_again(
    tinymix_4bit: Path,
    bare: Path,
    tmp_path: Path,
    token: Path,
    expected: Tensor,
    has_shards: bool,
) -> None:
    """Without shards one stays, with shards none does."""
    with daemons(tmp_path, tinymix_4bit, token) as three:
        directory = tinymix_4bit if has_shards else bare
        model = load(directory, listening(three), token, smallest_ram(tinymix_4bit))
        with model.tiers:

            def restart() -> None:
                three[0].restart()
                wait_until(lambda: not shares_of(model)[0].away)

            actions = {
                2: three[0].kill,
                5: lambda: os.kill(three[1].pid, signal.SIGSTOP),
                10: restart,
                13: three[2].kill if has_shards else lambda: None,
                15: three[0].kill if has_shards else lambda: None,
            }
            assert torch.equal(logits(model, actions), expected)
            assert [share.lost > 0 for share in shares_of(model)] == [True, True, has_shards]
            local = [share for share in model.tiers.origin.shares() if share.place == "the local store"]
            assert bool(local and local[0].records) == has_shards


@pytest.mark.usefixtures("slow")
def test_a_daemon_is_killed_while_it_computes(
    tinymix_4bit: Path, bare: Path, tmp_path: Path, token: Path, expected: Tensor
) -> None:
    with daemons(tmp_path, tinymix_4bit, token, 2) as two:
        model = load(bare, listening(two), token, smallest_ram(tinymix_4bit))
        with model.tiers:

            def kill() -> None:
                wait_until(lambda: shares_of(model)[0].computed > 5)
                two[0].kill()
                wait_until(lambda: bool(shares_of(model)[0].away))
                before = shares_of(model)[0].computed
                two[0].restart()
                wait_until(lambda: shares_of(model)[0].computed > before)

            task = Task(kill)
            while task.thread.is_alive():
                assert torch.equal(logits(model), expected)
                task.thread.join(0.2)
            task.result()
            assert shares_of(model)[0].lost


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_over_networks_with_tls(
    tinymix_4bit: Path, bare: Path, tmp_path: Path, token: Path, expected: Tensor, count: int
) -> None:
    """Daemons in namespaces of their own, at 1 Gbit/s and .3 ms there and back."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca"))
    with ExitStack() as stack:
        addresses = []
        for number in range(count):
            net = stack.enter_context(network(slow=True))
            issued = ca.issue_cert(net.there)
            folder = tmp_path / str(number)
            folder.mkdir()
            issued.private_key_pem.write_to_path(str(folder / "key"))
            issued.cert_chain_pems[0].write_to_path(str(folder / "cert"))
            options = ["--listen", f"{net.there}:0", "--token-file", token]
            options += ["--tls-cert", folder / "cert", "--tls-key", folder / "key"]
            daemon = stack.enter_context(
                running_daemon(tinymix_4bit, folder=folder / "daemon", extra=options, prefix=net.prefix)
            )
            addresses.append(daemon.card.listen)
        credentials = Credentials(token_file=token, ca=tmp_path / "ca")
        model = load(bare, addresses, token, smallest_ram(tinymix_4bit), credentials=credentials)
        with model.tiers:
            assert torch.equal(logits(model), expected)
            assert min(share.computed for share in shares_of(model)) > 0


@pytest.mark.usefixtures("slow")
def test_it_can_be_turned_off(bare: Path, three: list[DaemonProcess], token: Path, expected: Tensor) -> None:
    before = three[0].stats().computed
    model = load(bare, listening(three[:1]), token, smallest_ram(bare), remote_compute="off")
    with model.tiers:
        assert torch.equal(logits(model, steps=5), expected[: 12 + 5])
        (share,) = shares_of(model)
        assert share.records > 0
        assert share.computed == 0
    assert three[0].stats().computed == before


def test_what_stays_cached_is_fetched(
    bare: Path, three: list[DaemonProcess], token: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for all, each expert is fetched once it has been used often enough, and then is here."""
    manifest = read_manifest(store_folder(bare))
    # a fetch pays after about 40 uses
    monkeypatch.setattr(FetchRate, "value", SLOW)
    that_pay = manifest.layout(0).slot_bytes / (2 * 2 * manifest.layout(0).projection("down_proj").rows)
    monkeypatch.setattr(RecentUses, "of", lambda self, expert, of=RecentUses.of: of(self, expert) * that_pay / 5)
    model = load(bare, listening(three[:1]), token, smallest_ram(bare))
    with model.tiers:
        while not shares_of(model)[0].computed:  # the daemon compiles code meanwhile
            logits(model)
    model = load(bare, listening(three[:1]), token, manifest.stored_bytes)
    with model.tiers:
        for _ in range(3):
            assert torch.equal(logits(model), expected)
        (share,) = shares_of(model)
        assert share.computed > 0
        assert share.records > 0.8 * sum(block.experts for block in manifest.blocks)
        computed = share.computed
        assert torch.equal(logits(model), expected)
        assert shares_of(model)[0].computed - computed < 0.1 * computed


def test_fast_networks_send_records(
    bare: Path, three: list[DaemonProcess], token: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first computations, whose time is measured. From then on, the estimate fades once for each block."""
    faded: list[None] = []
    fade = OutputSeconds.fade

    def counted(self: OutputSeconds) -> None:
        faded.append(None)
        fade(self)

    monkeypatch.setattr(OutputSeconds, "fade", counted)
    monkeypatch.setattr(FetchRate, "value", 1e12)
    model = load(bare, listening(three[:1]), token, smallest_ram(bare))
    with model.tiers:
        assert torch.equal(logits(model), expected)
        (share,) = shares_of(model)
        assert share.records > share.computed
        faded.clear()
        with torch.inference_mode():
            model(torch.arange(3, 103)[None])
        assert 0 < len(faded) <= len(model.tiers.manifest.blocks)


@contextlib.contextmanager
def one_daemon_computes(
    daemon: DaemonProcess, bare: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Yield a model, and a function that has ``daemon`` compute an expert for one row, and reads the answer after
    ``pause`` seconds. It returns the outputs [max(places) + 1, hidden], with the row's at ``places``, or None."""
    monkeypatch.setattr(RemoteCompute, "_fetches", lambda *_: False)
    model = load(bare, listening([daemon]), token, smallest_ram(bare))
    with model.tiers:
        manifest = model.tiers.manifest
        kernels = ExpertKernels(manifest.layout(1), Activation(), torch.bfloat16, manifest.blocks[1].experts)
        x = torch.randn(1, kernels.width, generator=torch.Generator().manual_seed(0)).bfloat16()

        def compute(places: list[int], pause: float = 0.0) -> Tensor | None:
            outputs = torch.zeros(max(places) + 1, kernels.width, dtype=torch.bfloat16)
            rows = {2: ([0] * len(places), places)}
            with closing(model.tiers.origin.remote_compute.send(kernels, 1, x.data_ptr(), 1, rows)) as sent:
                time.sleep(pause)
                return outputs if sent.experts and not sent.collect(outputs.data_ptr()) else None

        wait_until(lambda: compute([0]) is not None)  # the daemon has compiled its code
        yield model, compute


def test_a_token_may_name_an_expert_twice(
    bare: Path, three: list[DaemonProcess], token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_daemon_computes(three[0], bare, token, monkeypatch) as (_, compute):
        outputs = compute([2, 0])
        assert torch.equal(outputs[0], outputs[2])
        assert outputs[0].any()
        assert not outputs[1].any()


def test_a_daemon_is_not_lost_if_its_answer_is_read_too_late(
    bare: Path, three: list[DaemonProcess], token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other experts of the block take long."""
    monkeypatch.setattr(spread, "RemoteStore", partial(RemoteStore, timeout=2.0))
    with one_daemon_computes(three[0], bare, token, monkeypatch) as (model, compute):
        wanted = compute([0])
        for _ in range(5):  # a busy machine may be too late by itself
            wait_until(lambda: compute([0]) is not None)
            lost, outputs = shares_of(model)[0].lost, compute([0], pause=3.0)
            if outputs is not None:
                break
        assert torch.equal(outputs, wanted)
        assert shares_of(model)[0].lost == lost


def test_records_are_prefetched_where_no_daemon_can_compute_the_experts(
    bare: Path, three: list[DaemonProcess], token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their activation is not known."""
    modes = []
    for _ in range(2):
        model = load(bare, listening(three[:1]), token, smallest_ram(bare))
        with model.tiers:
            modes.append(model.tiers.speculation.stats().mode)
        monkeypatch.setattr(quick, "activation_of", lambda module: None)
    assert modes == ["off", "auto"]


# -- daemons that are not as they should be ---------------------------------------------------------------------------


class Stranger(outlets.Outlet):
    """An honest outlet whose answers to Compute are ``answer``'s; None: it is of a version without Compute.

    ``unchecked``: it is of a version without checksums of computations.
    """

    def __init__(self, manifest: Any, behaviour: Any, answer: Any) -> None:
        super().__init__(manifest, behaviour)
        self.answer = answer
        self.calls = 0

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        reply = super().Describe(request, context)
        reply.models[0].computes = self.answer is not None
        reply.models[0].checks = self.answer is not unchecked
        return reply

    def Compute(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]  # serialised pieces
        self.calls += 1
        yield from self.answer(request, context)


def too_short(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield encode_piece(memoryview(b"12"))


def too_long(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    while True:
        yield encode_piece(memoryview(bytes(1 << 20)))


def no_piece(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield b"\xff\xff"


def unchecked(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield encode_piece(memoryview(bytes(256)))


def another(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    """The right number of outputs, of another request."""
    rows = max(request.picked, default=0) + 1
    data = bytes(len(request.hidden_states) // rows * (len(request.picked) or len(request.experts)))
    yield encode_piece(memoryview(data), crc32c(data, request.crc32c ^ 1))


def unknown(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    yield b""


def full(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no slot")
    yield b""


def without_memory(request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    abort(context, BudgetError("The system can't allocate memory.", "Free some memory."))
    yield b""


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    "answer", [None, unchecked, another, too_short, too_long, no_piece, unknown, full, without_memory]
)
def test_strangers(tinymix_4bit: Path, bare: Path, expected: Tensor, token: Path, answer: Any) -> None:
    """Records are fetched from daemons that don't compute, or wrongly. Some are asked again later."""
    from moetier.runtime.daemon.fetch import FetchCalls
    from moetier.tiers.cache.budget import slots_for
    from moetier.tiers.host.tier import HostTier

    with ExitStack() as stack:
        store = stack.enter_context(ShardStore.open(tinymix_4bit))
        slots = slots_for(store.manifest, store.manifest.stored_bytes)
        host = stack.enter_context(HostTier(store, slots=slots))
        fetches = FetchCalls(host, store.manifest, slots)
        stack.callback(fetches.close)
        stranger = Stranger(store.manifest, fetches.serve, answer)
        address = stack.enter_context(outlets.serving(stranger))
        model = load(bare, [address.target], token, smallest_ram(tinymix_4bit), credentials=Credentials(insecure=True))
        with model.tiers:
            assert torch.equal(logits(model, steps=2), expected[: 12 + 2])
            (share,) = shares_of(model)
            assert share.records > 0
            assert (share.computed, share.lost) == (0, 0)
        if answer in (None, unchecked):
            assert stranger.calls == 0
        elif answer in (full, without_memory, another):
            assert stranger.calls > 10
        else:
            assert stranger.calls == 2, "as the first answer may have been changed on its way"


@pytest.mark.usefixtures("slow")
def test_outputs_in_flight_are_bounded(
    bare: Path, three: list[DaemonProcess], token: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one is allowed, of a token's experts one is computed, by one of two daemons. Then the next may be."""
    calls: list[Any] = []
    compute = RemoteStore.compute

    def watched(self: RemoteStore, request: pb.ComputeRequest, nbytes: int) -> tuple[Any, int]:
        assert len(request.experts) == 1
        assert all(call.done() for call in calls)
        call, crc = compute(self, request, nbytes)
        calls.append(call)
        return call, crc

    monkeypatch.setattr(remote_compute, "MAX_WAITING", 1)
    monkeypatch.setattr(RemoteStore, "compute", watched)
    model = load(bare, listening(three[:2]), token, smallest_ram(bare))
    with model.tiers:
        assert torch.equal(logits(model), expected)
        assert sum(share.computed for share in shares_of(model)) > STEPS


def test_outputs_are_waited_for_no_more_if_an_error_ends_the_choice_of_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a daemon may be resolved anew meanwhile, and Ctrl-C may come at any time."""
    monkeypatch.setattr(RemoteCompute, "_fetches", lambda *_: False)
    peer: Any = SimpleNamespace(name="a", failures=0, away=None, store=SimpleNamespace(computes=True))

    def order(key: ExpertKey) -> list[Any]:
        if key.expert:
            raise KeyboardInterrupt
        return [peer]

    manifest: Any = SimpleNamespace(blocks=[SimpleNamespace(experts=2)])
    store: Any = SimpleNamespace(manifest=manifest, peers=SimpleNamespace(order=order))
    host: Any = SimpleNamespace(absent=lambda keys: keys)
    products: Any = SimpleNamespace(row_bytes=4)
    remote = RemoteCompute(store, host)
    with pytest.raises(KeyboardInterrupt):
        remote.send(products, 0, 0, 1, {0: ([0], [0]), 1: ([0], [1])})
    assert remote.reserve(remote_compute._PeerCall(peer, 0, [], {}), remote_compute.MAX_WAITING)
