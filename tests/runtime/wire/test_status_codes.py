"""Every row of the table, across a real wire, both ways."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from readers import PATIENCE

from moetier.proto.expert_store_pb2 import Error
from moetier.runtime.wire.status_codes import CODES, ERRORS, METADATA, abort, code_of, error_of, message_of
from moetier.tiers import errors
from moetier.tiers.errors import DaemonError, MoetierError, UnavailableError

TREE = sorted(
    (kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MoetierError)),
    key=lambda kind: kind.__name__,
)
CODES_OF_FAILURE = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


class Failing:
    """Answers every call as ``fail`` does."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.fail = lambda context: None

    def over_the_wire(self) -> grpc.RpcError:
        with grpc.insecure_channel(self.target) as channel, pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/test/Fail")(b"", timeout=PATIENCE)
        return raised.value


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Failing]:
    service = Failing(f"unix:{tmp_path}/s")
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: service.fail(context))
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Fail": handler}),))
        server.add_insecure_port(service.target)
        server.start()
        yield service
        server.stop(0).wait()


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_it_was_raised(failing: Failing, kind: type[MoetierError]) -> None:
    failing.fail = lambda context: abort(context, kind("It is — broken.", "Mend it."))
    error = failing.over_the_wire()
    assert error.code() is code_of(kind("", "")) is not grpc.StatusCode.OK
    assert error.code() is next(CODES[base] for base in kind.__mro__ if base in CODES)
    arrived = error_of(error)
    assert type(arrived) is kind
    assert (arrived.cause, arrived.fix) == ("It is — broken.", "Mend it.")


@pytest.mark.parametrize("code", CODES_OF_FAILURE, ids=lambda code: code.name)
def test_a_code_alone_is_an_error_too(failing: Failing, code: grpc.StatusCode) -> None:
    failing.fail = lambda context: context.abort(code, "some\nproxy says no")
    arrived = error_of(failing.over_the_wire())
    assert type(arrived) is ERRORS.get(code, DaemonError)
    assert code.name in arrived.cause
    assert "some proxy says no" in arrived.cause
    assert arrived.fix


@pytest.mark.parametrize("junk", [b"", b"\xff\xff", b"\x0a\x05Excep", Error(type="SystemExit").SerializeToString()])
def test_metadata_that_are_no_error_are_not_believed(failing: Failing, junk: bytes) -> None:
    def fail(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(((METADATA, junk),))
        context.abort(grpc.StatusCode.NOT_FOUND, "it is not there")

    failing.fail = fail
    assert type(error_of(failing.over_the_wire())) is errors.UnknownModelError


def test_an_internal_error_tells_only_its_class(failing: Failing) -> None:
    failing.fail = lambda context: abort(context, KeyError("/home/somebody/secret"))
    error = failing.over_the_wire()
    assert error.code() is grpc.StatusCode.INTERNAL
    arrived = error_of(error)
    assert type(arrived) is DaemonError
    assert "KeyError" in arrived.cause
    assert "secret" not in arrived.cause + arrived.fix + str(error)


def test_a_long_line_is_cut_and_arrives(failing: Failing) -> None:
    failing.fail = lambda context: abort(context, errors.ChecksumError("é" * 100_000, "ü" * 100_000))
    arrived = error_of(failing.over_the_wire())
    assert type(arrived) is errors.ChecksumError
    assert set(arrived.cause) == {"é"}
    assert set(arrived.fix) == {"ü"}


def test_no_server_is_unavailable(tmp_path: Path) -> None:
    assert type(error_of(Failing(f"unix:{tmp_path}/nobody").over_the_wire())) is errors.UnavailableError


def test_the_table_names_only_what_is_there() -> None:
    assert set(CODES) <= set(TREE)
    assert set(ERRORS.values()) <= set(TREE)
    for kind in TREE:  # what goes out as a code comes back from it as the same branch of the tree, or as its root
        back = ERRORS.get(code_of(kind("", "")), DaemonError)
        assert message_of(kind("a", "b")).type == kind.__name__
        assert issubclass(back, MoetierError)


def test_a_call_on_a_closed_channel_says_so() -> None:
    channel = grpc.insecure_channel("127.0.0.1:1")
    call = channel.unary_unary("/test/Fail")
    channel.close()
    with pytest.raises(ValueError, match="closed") as raised:
        call(b"", timeout=PATIENCE)
    error = error_of(raised.value)
    assert type(error) is UnavailableError
    assert error.cause == "The connection to the daemon was closed."
