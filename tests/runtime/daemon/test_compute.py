"""Computing on a daemon: the bits of local computing, and requests that it refuses, over a real socket."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import google_crc32c
import grpc
import outlets
import pytest
import torch
from daemons import DaemonProcess, running_daemon
from readers import PATIENCE, GatedReader
from stores import read_records
from threads import threads_named, wait_until, without_thread
from torch import Tensor

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.daemon import compute, leases
from moetier.runtime.daemon.compute import ComputeCalls
from moetier.runtime.daemon.hosted_model import HostedModel
from moetier.runtime.daemon.leases import CALLS
from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.experts.expert_products import ExpertProducts
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.channel import MAX_OUTPUTS, open_channel
from moetier.runtime.wire.status_codes import abort, error_of
from moetier.tiers.cache.budget import slots_for
from moetier.tiers.errors import (
    ClosedError,
    ConfigError,
    ExhaustedError,
    MissingExpertError,
    MoetierError,
    ProtocolError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.store.reader import ShardStore

SILU = pb.Activation(function="silu", alpha=1.0, limit=math.inf, gated=True)


@pytest.fixture(scope="module")
def daemon(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon") / "one"
    with running_daemon(tinymix_4bit, folder=folder, extra=["--listen", "127.0.0.1:0", "--insecure"]) as started:
        yield started


@pytest.fixture(scope="module")
def manifest(tinymix_4bit: Path) -> Manifest:
    return read_manifest(store_folder(tinymix_4bit))


@pytest.fixture
def stub(daemon: DaemonProcess) -> Iterator[ExpertStoreStub]:
    with open_channel(Address.parse(daemon.card.listen), Credentials(insecure=True)) as channel:
        yield ExpertStoreStub(channel)


def width_of(manifest: Manifest) -> int:
    return manifest.layout(0).projection("down_proj").rows


def hidden_states(manifest: Manifest, rows: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, width_of(manifest), generator=torch.Generator().manual_seed(rows)).to(dtype)


def message(manifest: Manifest, x: Tensor, named: list[int], **fields: object) -> pb.ComputeRequest:
    given = {
        "digest": manifest.digest,
        "block": 1,
        "experts": named,
        "hidden_states": x.view(torch.uint8).numpy().tobytes(),
        "dtype": str(x.dtype).removeprefix("torch."),
        "activation": SILU,
    }
    return pb.ComputeRequest(**(given | fields))  # type: ignore[arg-type]


def answer(
    stub: ExpertStoreStub, request: pb.ComputeRequest, *, timeout: float | None = PATIENCE, again: bool = True
) -> bytes:
    """With ``again``, once code is compiled."""
    while True:
        try:
            return b"".join(piece.data for piece in stub.Compute(request, timeout=timeout))
        except grpc.RpcError as error:
            said = error_of(error)
        if said.fix != "Fetch records meanwhile." or not again:
            raise said
        time.sleep(0.05)


def locally(
    folder: Path,
    manifest: Manifest,
    x: Tensor,
    wanted: list[tuple[int, list[int]]],
    activation: Activation | None = None,
) -> Tensor:
    """Rows of x, each expert by itself."""
    kernels = ExpertKernels(manifest.layout(1), activation or Activation(), x.dtype, manifest.blocks[1].experts)
    parts = []
    with ShardStore.open(folder) as store:
        for expert, rows in wanted:
            slot = torch.empty(manifest.layout(1).slot_bytes + 4096, dtype=torch.uint8)
            first = -slot.data_ptr() % 4096
            record = slot[first : first + manifest.layout(1).slot_bytes]
            store.read_into(ExpertKey(1, expert), memoryview(record.numpy()))
            out = torch.empty(len(rows), x.shape[1], dtype=x.dtype)
            jobs = array("q", (record.data_ptr(), 0, len(rows)))
            kernels.compute(x[rows].contiguous(), jobs, array("q", range(len(rows))), out)
            parts.append(out)
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_are_those_of_local_computing(
    stub: ExpertStoreStub, manifest: Manifest, tinymix_4bit: Path, dtype: torch.dtype
) -> None:
    x = hidden_states(manifest, 1, dtype)
    found = answer(stub, message(manifest, x, [3, 0, 2]))
    wanted = locally(tinymix_4bit, manifest, x, [(3, [0]), (0, [0]), (2, [0])])
    assert found == wanted.view(torch.uint8).numpy().tobytes()

    x = hidden_states(manifest, 300, dtype)  # more than are computed together
    rows = [(2, [5, 1, 299]), (1, list(range(300))), (0, [7])]
    request = message(
        manifest, x, [expert for expert, _ in rows], counts=[len(own) for _, own in rows],
        picked=[row for _, own in rows for row in own],
    )  # fmt: skip
    found = answer(stub, request)
    assert found == locally(tinymix_4bit, manifest, x, rows).view(torch.uint8).numpy().tobytes()


def test_an_expert_may_compute_the_only_row_several_times(
    stub: ExpertStoreStub, manifest: Manifest, tinymix_4bit: Path
) -> None:
    x = hidden_states(manifest, 1, torch.float32)
    found = answer(stub, message(manifest, x, [3, 0], counts=[5, 1], picked=[0] * 6))
    wanted = locally(tinymix_4bit, manifest, x, [(3, [0] * 5), (0, [0])])
    assert found == wanted.view(torch.uint8).numpy().tobytes()


def test_rows_that_are_not_numbers_are_computed(stub: ExpertStoreStub, manifest: Manifest) -> None:
    x = torch.full((1, width_of(manifest)), math.nan, dtype=torch.bfloat16)
    numbers = torch.frombuffer(bytearray(answer(stub, message(manifest, x, [1]))), dtype=torch.bfloat16)
    assert numbers.shape == (width_of(manifest),)
    assert numbers.isnan().all()


BAD: list[tuple[dict[str, object], type[MoetierError], str]] = [
    ({"block": 9}, MissingExpertError, "no block 9"),
    ({"block": 2**32 - 1}, MissingExpertError, "no block"),
    ({"experts": [99]}, MissingExpertError, "no block 1 expert 99"),
    ({"experts": [2**32 - 1]}, MissingExpertError, "no block 1"),
    ({"experts": []}, ProtocolError, "no expert"),
    ({"experts": [1, 1]}, ProtocolError, "twice"),
    ({"experts": [1] * (MAX_OUTPUTS + 1)}, ExhaustedError, "more than the"),
    ({"hidden_states": b""}, ProtocolError, "has 0 bytes, not a positive multiple of"),
    ({"hidden_states": b"123"}, ProtocolError, "has 3 bytes, not a positive multiple"),
    ({"dtype": "float64"}, ProtocolError, "is unknown"),
    ({"activation": pb.Activation()}, ProtocolError, "is unknown"),
    ({"activation": pb.Activation(function="silu", alpha=math.nan, limit=1.0)}, ProtocolError, "not finite"),
    ({"activation": pb.Activation(function="silu", alpha=1.0, limit=-1.0)}, ProtocolError, "above 0"),
    ({"activation": pb.Activation(function="silu", alpha=1.0, limit=1.0)}, ProtocolError, "No code can be"),  # no gate
    ({"counts": [1], "picked": [1]}, ProtocolError, "not among"),
    ({"counts": [1], "picked": [2**32 - 1]}, ProtocolError, "not among"),
    ({"counts": [0], "picked": []}, ProtocolError, "no token"),
    ({"counts": [2], "picked": [0]}, ProtocolError, "must add up to"),
    ({"counts": [1, 1], "picked": [0, 0]}, ProtocolError, "must add up to"),
    ({"counts": [2**32 - 1], "picked": [0]}, ProtocolError, "must add up to"),
    ({"counts": [MAX_OUTPUTS + 1], "picked": [0] * (MAX_OUTPUTS + 1)}, ExhaustedError, "more than the"),
]


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [({"digest": "0" * 64}, UnknownModelError, "does not serve"), ({"experts": [1, 1]}, ProtocolError, "twice")],
)
def test_what_can_t_be_computed_is_refused(
    stub: ExpertStoreStub, manifest: Manifest, fields: dict[str, object], kind: type[MoetierError], words: str
) -> None:
    x = hidden_states(manifest, 1)
    with pytest.raises(kind, match=words) as caught:
        answer(stub, message(manifest, x, [1], **fields))
    assert type(caught.value) is kind
    assert answer(stub, message(manifest, x, [1])), "it serves as before"


def test_requests_with_a_checksum_are_checked_and_their_answers_have_one(
    stub: ExpertStoreStub, manifest: Manifest
) -> None:
    """As any client may write it: the checksum is of the serialised request without it. Older clients send none."""
    x = hidden_states(manifest, 1)
    asked = message(manifest, x, [1, 2])
    outputs = answer(stub, asked)
    fetch = pb.FetchRequest(digest=manifest.digest, block=1, expert=2)
    for call, request, covered in ((stub.Compute, asked, outputs), (stub.Fetch, fetch, b"")):
        assert not any(piece.HasField("crc32c") for piece in call(request, timeout=PATIENCE))
        request.crc32c = google_crc32c.value(request.SerializeToString())
        pieces = list(call(request, timeout=PATIENCE))
        assert pieces[-1].crc32c == google_crc32c.extend(request.crc32c, covered)
        request.block = 0
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request, timeout=PATIENCE))
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS


def test_a_call_needs_a_deadline(stub: ExpertStoreStub, manifest: Manifest) -> None:
    with pytest.raises(ProtocolError, match="A computation needs a deadline"):
        answer(stub, message(manifest, hidden_states(manifest, 1), [1]), timeout=None)


def test_it_is_counted_and_said(daemon: DaemonProcess, stub: ExpertStoreStub, manifest: Manifest) -> None:
    (model,) = stub.Describe(pb.DescribeRequest(), timeout=PATIENCE).models
    assert model.computes
    before = daemon.stats().computed
    answer(stub, message(manifest, hidden_states(manifest, 4), [0, 1]))
    stats = daemon.stats()
    assert stats.computed == before + 8
    assert stats.host.leased == 0


# -- in this process --------------------------------------------------------------------------------------------------


class Computing(outlets.Outlet):
    def __init__(self, manifest: Manifest, computes: ComputeCalls) -> None:
        super().__init__(manifest, lambda request, context: iter(()))
        self.computes = computes

    def Compute(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]  # serialised pieces
        try:
            yield from self.computes.serve(request, context)
        except MoetierError as error:
            abort(context, error)


@pytest.fixture
def host(tinymix_4bit: Path) -> Iterator[HostTier]:
    with (
        ShardStore.open(tinymix_4bit) as store,
        HostTier(store, slots=slots_for(store.manifest, store.manifest.stored_bytes)) as tier,
    ):
        yield tier


@pytest.fixture
def served(host: HostTier) -> Iterator[tuple[ComputeCalls, Address]]:
    with ExitStack() as stack:
        computes = ComputeCalls(host, host.manifest)
        stack.callback(computes.close)
        yield computes, stack.enter_context(outlets.serving(Computing(host.manifest, computes)))


def test_each_fault_of_a_request_is_named(served: tuple[ComputeCalls, Address], manifest: Manifest) -> None:
    x = hidden_states(manifest, 1)
    with open_channel(served[1], Credentials(insecure=True)) as channel:
        stub = ExpertStoreStub(channel)
        for fields, kind, words in BAD:
            with pytest.raises(kind, match=words) as caught:
                answer(stub, message(manifest, x, [1], **fields))
            assert type(caught.value) is kind, fields
        assert answer(stub, message(manifest, x, [1])), "it serves as before"
    assert served[0].counts() == {"computed": 1}


def test_without_compiled_code_it_computes_nothing(host: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "refusal", lambda: "memory can't be made executable")
    with pytest.raises(ConfigError, match=r"can't compute experts \(memory can't be made executable\)") as caught:
        ComputeCalls(host, host.manifest)
    assert caught.value.fix == "Fetch records instead."


def test_any_number_of_activations_shares_the_code(
    served: tuple[ComputeCalls, Address], manifest: Manifest, tinymix_4bit: Path
) -> None:
    """Only the first client is told that code is compiled."""
    _, address = served
    x = hidden_states(manifest, 1)
    limits = [math.inf, *(0.01 * (limit + 1) for limit in range(20))]
    with open_channel(address, Credentials(insecure=True)) as channel:
        for limit in limits:
            asked = pb.Activation(function="silu", alpha=1.702, limit=limit, shift=1.0, gated=True)
            request = message(manifest, x, [1], activation=asked)
            if limit == math.inf:
                answer(ExpertStoreStub(channel), request)
            found = answer(ExpertStoreStub(channel), request, again=False)
            activation = Activation("silu", alpha=1.702, limit=limit, shift=1.0)
            wanted = locally(tinymix_4bit, manifest, x, [(1, [0])], activation)
            assert found == wanted.view(torch.uint8).numpy().tobytes()


def test_few_variants_of_activations_are_compiled(served: tuple[ComputeCalls, Address], manifest: Manifest) -> None:
    """Whatever clients ask for: four functions, with gate and up in two orders, as the records have a gate."""
    x = hidden_states(manifest, 1)
    computed = 0
    with open_channel(served[1], Credentials(insecure=True)) as channel:
        for function, interleaved, gated in itertools.product(
            ("silu", "gelu", "gelu_tanh", "relu2"), *[(False, True)] * 2
        ):
            asked = pb.Activation(function=function, interleaved=interleaved, alpha=1, limit=math.inf, gated=gated)
            with contextlib.suppress(ProtocolError):
                computed += bool(answer(ExpertStoreStub(channel), message(manifest, x, [1], activation=asked)))
    assert computed == 8


def test_clients_that_read_nothing_make_room_for_others(
    served: tuple[ComputeCalls, Address], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a thread of the server."""
    monkeypatch.setattr(leases, "STALL", PATIENCE)
    computes, address = served
    x = hidden_states(manifest, 1, torch.float32)
    long = message(manifest, x, [1], counts=[MAX_OUTPUTS], picked=[0] * MAX_OUTPUTS)
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    with (
        open_channel(address, Credentials(insecure=True)) as channel,
        grpc.insecure_channel(address.target, narrow) as other,
    ):
        stub = ExpertStoreStub(channel)
        answer(stub, long)
        calls = [ExpertStoreStub(other).Compute(long, timeout=600) for _ in range(CALLS)]
        wait_until(lambda: computes.counts() == {"computed": (1 + CALLS) * MAX_OUTPUTS})
        time.sleep(1.0)
        with pytest.raises(ExhaustedError, match="under way"):
            answer(stub, long)
        monkeypatch.setattr(leases, "STALL", 0.5)

        def is_computed() -> bool:
            try:
                return bool(answer(stub, long))
            except ExhaustedError:
                return False

        wait_until(is_computed)
        for call in calls:
            call.cancel()


def test_records_that_are_read_too_slowly_are_reported_in_time(manifest: Manifest, tinymix_4bit: Path) -> None:
    """Before the client takes the daemon for lost. What is being read is there for the next call."""
    with ShardStore.open(tinymix_4bit) as store:
        gate = GatedReader(manifest, read_records(store))
    with ExitStack() as stack:
        host = stack.enter_context(HostTier(gate, slots=slots_for(manifest, manifest.stored_bytes)))
        stack.callback(gate.open)
        computes = ComputeCalls(host, manifest)
        stack.callback(computes.close)
        address = stack.enter_context(outlets.serving(Computing(manifest, computes)))
        stub = ExpertStoreStub(stack.enter_context(open_channel(address, Credentials(insecure=True))))
        x = hidden_states(manifest, 1)
        request = message(manifest, x, [1, 2])
        errors = list[Exception]()
        for seconds in (1, 2, 4, 8, 16, 32):  # a busy machine may need the second half of the time itself
            with pytest.raises((ExhaustedError, UnavailableError)) as raised:
                answer(stub, request, timeout=seconds)
            errors.append(raised.value)
            if isinstance(errors[-1], ExhaustedError):
                break
        assert "records in time" in str(errors[-1])
        gate.open()
        wanted = locally(tinymix_4bit, manifest, x, [(1, [0]), (2, [0])])
        assert answer(stub, request) == wanted.view(torch.uint8).numpy().tobytes()
        assert set(gate.reads.values()) == {1}


def test_code_that_cannot_be_compiled_is_not_waited_for(
    served: tuple[ComputeCalls, Address], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no memory can be made executable")

    monkeypatch.setattr(ExpertProducts, "__init__", fail)
    with (
        open_channel(served[1], Credentials(insecure=True)) as channel,
        pytest.raises(ConfigError, match="no memory can be made executable"),
    ):
        answer(ExpertStoreStub(channel), message(manifest, hidden_states(manifest, 1), [1]))


def test_without_a_thread_a_call_fails_and_the_next_one_computes(
    served: tuple[ComputeCalls, Address], host: HostTier, manifest: Manifest, tinymix_4bit: Path
) -> None:
    model = HostedModel(manifest, host, tinymix_4bit, timeout=1.0)
    try:
        with without_thread("moetier-opener"), pytest.raises(ExhaustedError, match="can't start new thread"):
            _ = model.open_compute_calls()
        request = message(manifest, hidden_states(manifest, 1), [1])
        with open_channel(served[1], Credentials(insecure=True)) as channel:
            with without_thread("moetier-compiler"), pytest.raises(ExhaustedError, match="can't start new thread"):
                answer(ExpertStoreStub(channel), request)
            assert answer(ExpertStoreStub(channel), request)
    finally:
        model.close()


def test_once_closed_nothing_is_computed_or_compiled(
    served: tuple[ComputeCalls, Address], manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, address = served
    monkeypatch.setattr(ExpertProducts, "__init__", lambda *_: pytest.fail("code was compiled"))
    calls.close()
    with open_channel(address, Credentials(insecure=True)) as channel, pytest.raises(ClosedError):
        answer(ExpertStoreStub(channel), message(manifest, hidden_states(manifest, 1), [1]))
    assert not threads_named("moetier-compiler")


def test_closing_ends_answers_that_are_not_taken(served: tuple[ComputeCalls, Address], manifest: Manifest) -> None:
    calls, address = served
    x = hidden_states(manifest, 1, torch.float32)
    long = message(manifest, x, [1], counts=[MAX_OUTPUTS], picked=[0] * MAX_OUTPUTS)
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    with grpc.insecure_channel(address.target, narrow) as channel:
        stub = ExpertStoreStub(channel)
        answer(stub, long)
        call = stub.Compute(long, timeout=600)
        wait_until(lambda: calls.counts() == {"computed": 2 * MAX_OUTPUTS})
        calls.close()
        with pytest.raises(grpc.RpcError):
            list(call)
