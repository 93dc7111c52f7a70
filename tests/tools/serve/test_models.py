"""Several models of one server, loaded and unloaded as requests name them, in this process."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
from http_servers import listening
from prometheus_client.parser import text_string_to_metric_families as parsed
from readers import PATIENCE
from threads import wait_until

from moetier.runtime.engine.steps import Steps
from moetier.runtime.machine.memory import Available
from moetier.tiers.errors import BudgetError
from moetier.tools.cli.arguments import resources_of
from moetier.tools.main import parse
from moetier.tools.serve import keys
from moetier.tools.serve.app import application
from moetier.tools.serve.catalogue import Catalogue
from moetier.tools.serve.models import Models, _UnwantedError
from moetier.tools.serve.options import ServeConfig
from moetier.tools.serve.reservation import reservation_of
from moetier.tools.serve.serving import ModelLoader

TEXT = "/v1/completions"
OPTIONS = ["--daemon", "none", "--context", "512", "--parallel", "2"]
PLENTY = 4 << 30


@pytest.fixture(autouse=True)
def imports_stay_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A load freezes all objects and an unload visits them all, for half a second. ``undo`` where this is tested."""
    gc.freeze()
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda: None)
    yield
    gc.collect()  # what is left in cycles; or the next test would freeze it


@pytest.fixture
def pair(tinymix_4bit: Path, tmp_path: Path) -> list[Path]:
    """Two model directories, "a" and "b"."""
    places = [tmp_path / name for name in "ab"]
    for place in places:
        shutil.copytree(tinymix_4bit, place, copy_function=os.link)
    return places


def one_of(place: Path) -> int:
    """Bytes of memory that have room for one model, and not for two."""
    loader = ModelLoader(resources_of(parse(["serve", str(place), *OPTIONS])[0], sequences=2), None, None)  # type: ignore[arg-type]
    reservation = reservation_of(place, loader.resources, Available(PLENTY, "the test", 0.95))
    assert reservation is not None
    return int(1.5 * reservation.nbytes)


@contextlib.contextmanager
def serving(
    places: list[Path], *options: str, whole: int = PLENTY, unread: int | None = None, **seconds: float
) -> Iterator[tuple[Models, Any]]:
    """(models, client) of a server with ``whole`` bytes of memory for models."""
    arguments, _ = parse(["serve", *map(str, places), *OPTIONS, *options])
    config = ServeConfig.of(vars(arguments))
    given = keys.keys_of(None, config.api_keys)
    catalogue = Catalogue(arguments.directories, aliases=dict(arguments.alias))
    loader = ModelLoader(resources_of(arguments, sequences=config.parallel), config, given)

    def available() -> Available:
        return Available(whole - models._taken(), "the test", 0.95)

    with (
        Models(catalogue, loader, keep_alive=config.keep_alive, available=available) as models,
        listening(application(models, given, 64, **seconds), unread=unread) as url,
        # on a busy machine the server closes a connection that was idle
        httpx2.Client(base_url=url, timeout=3 * PATIENCE, headers={"Connection": "close"}) as client,
    ):
        yield models, client


def ask(client: Any, model: str | None, **fields: Any) -> Any:
    body = {"prompt": "La mattina seguente", "max_tokens": 2, "temperature": 0, "model": model} | fields
    return client.post(TEXT, json=body)


def loaded(client: Any) -> list[str]:
    return [card["id"] for card in client.get("/v1/models").json()["data"] if card["loaded"]]


def test_models_that_fit_stay_beside_each_other(pair: list[Path]) -> None:
    with serving(pair, "--alias", "gpt-4o=b") as (_, client):
        assert loaded(client) == []
        answers = [ask(client, name) for name in ("a", "b", "gpt-4o", "a")]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert [answer.json()["model"] for answer in answers] == ["a", "b", "b", "a"]
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        assert loaded(client) == ["a", "b"]
        assert client.get("/v1/models/gpt-4o").json()["id"] == "b"
        assert client.get("/v1/models/b").json()["aliases"] == ["gpt-4o"]
        assert client.post("/tokenize", json={"prompt": "Ciao", "model": "b"}).json()["max_model_len"] == 512


def test_a_request_names_one_of_several_models(pair: list[Path]) -> None:
    with serving(pair) as (_, client):
        unnamed, unknown = ask(client, None), ask(client, "c")
        assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert client.get("/v1/models/c").status_code == 404
        assert ask(client, "a", max_tokens=-1).status_code == 400
        assert loaded(client) == [], "what is refused loads nothing"


def test_of_two_models_one_fits(pair: list[Path]) -> None:
    """Requests to both, one after the other and then all at once: none fails, and never are both loaded."""
    most = 0
    with serving(pair, whole=one_of(pair[0])) as (models, client):

        def count(name: str) -> int:
            nonlocal most
            status: int = ask(client, name).status_code
            most = max(most, len(loaded(client)))
            return status

        assert [count(name) for name in "abab"] == [200] * 4
        assert loaded(client) == ["b"]
        with ThreadPoolExecutor(4) as threads:
            assert {*threads.map(count, "ab" * 2)} == {200}
        assert most == 1
        assert models._taken() <= one_of(pair[0])


def test_an_answer_ends_before_its_model_goes_and_a_stream_says_what_it_waits_for(pair: list[Path]) -> None:
    with serving(pair, whole=one_of(pair[0]), alive_seconds=0.05) as (_, client):
        assert ask(client, "a").status_code == 200
        with client.stream(
            "POST", TEXT, json={"prompt": "Uno", "max_tokens": 400, "stream": True, "model": "a"}
        ) as one:
            lines = one.iter_lines()
            next(lines)
            asked = {"prompt": "Due", "max_tokens": 2, "stream": True, "model": "b"}
            with ThreadPoolExecutor(1) as thread:
                other = thread.submit(lambda: client.post(TEXT, json=asked).text)
                text = [line for line in lines if line]
                said = other.result()
        assert text[-1] == "data: [DONE]"
        assert ": b waits to be loaded\n" in said
        assert said.endswith("data: [DONE]\n\n")
        assert loaded(client) == ["b"]


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_client_that_reads_nothing_holds_no_model_up(pair: list[Path], stream: bool) -> None:
    """Once its answer is computed. It gets all of it when it reads at last."""
    body = {"prompt": "Uno", "max_tokens": 300, "model": "a", "logprobs": 20, "stream": stream}
    with serving(pair, whole=one_of(pair[0]), unread=4096) as (models, client), socket.socket() as idle:
        with models.pin("a") as pin:
            model = weakref.ref(pin.future.result(PATIENCE).service.model)
        del pin
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.settimeout(PATIENCE)
        idle.connect((client.base_url.host, client.base_url.port))
        content = json.dumps(body).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        idle.sendall(head.encode() + content)
        first = idle.recv(1)  # its model is in use
        assert ask(client, "b").status_code == 200
        assert loaded(client) == ["b"]
        wait_until(lambda: model() is None)
        answer = first + b"".join(iter(lambda: idle.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(answer) > 128 << 10, "the server had to keep a part of it"
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}")


def test_an_unload_leaves_nothing(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # models are frozen, and no more

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def of_models() -> list[str]:
        names = [thread.name for thread in threading.enumerate()]
        return [name for name in names if name.startswith(("moetier-engine", "moetier-loader", "moetier-masks"))]

    with serving(pair, "--keep-alive", "0") as (models, client):
        assert ask(client, "a").status_code == 200
        wait_until(lambda: loaded(client) == [] and not of_models())
        before = descriptors()
        with models.pin("a") as pin:
            served = pin.future.result(PATIENCE)
            model, arena = weakref.ref(served.service.model), served.reserved
            assert of_models()
            del served
        began = time.monotonic()
        del pin
        wait_until(lambda: model() is None)
        wait_until(lambda: not of_models() and descriptors() <= before)  # connections may have closed since
        assert arena > 0
        assert time.monotonic() - began < PATIENCE
        assert loaded(client) == []
        assert "/memfd:moetier-arena" not in Path("/proc/self/maps").read_text()


def test_a_model_that_is_not_used_is_unloaded_after_a_while(pair: list[Path]) -> None:
    with serving(pair, "--keep-alive", "300ms") as (_, client):
        assert ask(client, "a").status_code == 200
        assert ask(client, "b").status_code == 200
        wait_until(lambda: loaded(client) == [])
        assert ask(client, "a").status_code == 200


def test_the_only_model_is_unloaded_though_no_request_has_come(pair: list[Path]) -> None:
    with serving(pair[:1], "--keep-alive", "0") as (models, client):
        with models.load_only():
            assert loaded(client) == ["a"]
        wait_until(lambda: loaded(client) == [])
        assert ask(client, None).status_code == 200


def test_an_engine_that_dies_fails_its_own_answers_only(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(pair) as (models, client):
        assert [ask(client, name).status_code for name in "ab"] == [200, 200]
        step, ended = Steps.step, list[int]()

        def end(steps: Steps) -> None:
            if not ended:
                ended.append(1)
                raise SystemExit
            step(steps)

        monkeypatch.setattr(Steps, "step", end)
        assert ask(client, "a").status_code == 500
        wait_until(lambda: not models._entries["a"].is_ready)
        assert client.get("/health").status_code == 200, "the other one is alive"
        assert [ask(client, name).status_code for name in "ba"] == [200, 200]
        assert loaded(client) == ["a", "b"]


def test_the_only_engine_that_dies_is_seen_and_made_again(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(pair[:1]) as (models, client):
        assert ask(client, None).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(Steps, "step", lambda _: sys.exit())
            assert ask(client, "a").status_code == 500
            wait_until(lambda: not models.is_alive)
        health = client.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, "cb_worker_dead")
        assert ask(client, "a").status_code == 200
        assert client.get("/health").json() == {"status": "ok"}


def test_a_model_that_cannot_be_loaded_takes_no_other_its_place(
    pair: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(pair, whole=one_of(pair[0])) as (_, client):
        assert ask(client, "a").status_code == 200
        pair[1].rename(pair[1].with_name("moved"))
        gone = ask(client, "b")
        assert (gone.status_code, gone.json()["error"]["message"]) == (
            503,
            "The model b can't be loaded; the server's log says why.",
        )
        assert any("Loading b failed" in line for line in caplog.messages)
        assert loaded(client) == ["a"]
        pair[1].with_name("moved").rename(pair[1])
        assert ask(client, "b").status_code == 200


class Panic(BaseException):
    """As a library that is written in Rust raises it."""


def panic(*_: object) -> Any:
    raise Panic


def test_a_panic_in_a_load_or_an_unload_ends_nothing_else(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(pair[:1], "--keep-alive", "0") as (models, client):
        with monkeypatch.context() as patch:
            patch.setattr(models._loader, "loaded", panic)
            assert ask(client, "a").status_code == 503
        with models.pin("a") as pin:
            pin.future.result(PATIENCE)
            pin.entry.closing.callback(panic)
        wait_until(lambda: loaded(client) == [])
        assert ask(client, "a").status_code == 200


def test_a_request_that_comes_as_an_unused_model_goes_waits_for_it(
    pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not use the model first, which would then go at once."""
    with serving(pair[:1], "--keep-alive", "0") as (models, _):
        take, steps, at_once = models._next, list[Any](), list[bool]()

        def step() -> Any:
            steps.append(take())
            if len(steps) == 2:  # the unload, after the load
                with models.pin("a") as pin:
                    at_once.append(pin.future.done())
            return steps[-1]

        monkeypatch.setattr(models, "_next", step)
        with models.pin("a") as pin:
            pin.future.result(PATIENCE)
        wait_until(lambda: bool(at_once))
        assert at_once == [False]


def test_a_model_that_does_not_fit_at_all_is_refused(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before others are unloaded."""
    with serving(pair, whole=one_of(pair[0])) as (models, client):
        assert ask(client, "a").status_code == 200
        monkeypatch.setattr(models, "_whole", Available(20 << 20, "the test", 0.95))
        refused = ask(client, "b", stream=True)
        assert refused.status_code == 507
        error = refused.json()["error"]
        assert error["code"] == "model_too_large"
        assert error["message"].startswith("The model b does not fit into memory. With --bits 4")
        assert "the test leaves 20 MiB" in error["message"]
        assert loaded(client) == ["a"]


def test_another_model_goes_if_memory_turns_out_to_be_too_small(
    pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both should fit, but something else took the memory when the second one was loaded."""
    load, refused = ModelLoader.loaded, list[Path]()

    def scarce(loader: ModelLoader, directory: Path, *rest: Any) -> Any:
        if directory.name == "b" and not refused:
            refused.append(directory)
            raise BudgetError("There is no memory.", "Free some.")
        return load(loader, directory, *rest)

    monkeypatch.setattr(ModelLoader, "loaded", scarce)
    with serving(pair) as (_, client):
        assert [ask(client, name).status_code for name in "ab"] == [200, 200]
        assert loaded(client) == ["b"]
    assert len(refused) == 1


def test_a_client_that_leaves_while_it_waits_changes_nothing(pair: list[Path]) -> None:
    with serving(pair, whole=one_of(pair[0])) as (models, client):
        assert ask(client, "a").status_code == 200
        with models.pin("a") as pin:  # so that "b" waits
            with pytest.raises(httpx2.TimeoutException):
                ask(httpx2.Client(base_url=client.base_url, timeout=0.3), "b")
            wait_until(lambda: not models._entries["b"].waiting)
            assert ask(client, "a").status_code == 200
            del pin
        assert loaded(client) == ["a"]


def test_the_end_refuses_what_waits(pair: list[Path]) -> None:
    """A model that is being loaded then is unloaded as soon as it is there."""
    with serving(pair, whole=one_of(pair[0])) as (models, client), ThreadPoolExecutor(2) as threads:
        assert ask(client, "a").status_code == 200
        with models.pin("a"):
            waiting = threads.submit(ask, client, "b")
            wait_until(lambda: bool(models._entries["b"].waiting))
            models.cut()
            answer = waiting.result(PATIENCE)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "The server is shutting down.")
        assert ask(client, "a").status_code == 503


def test_an_end_while_a_model_is_unloaded_loads_no_other(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(pair, whole=one_of(pair[0])) as (models, client):
        assert ask(client, "a").status_code == 200
        models._entries["a"].closing.callback(models.cut)
        loads = list[Path]()
        monkeypatch.setattr(models._loader, "loaded", lambda path, *_: loads.append(path))
        assert ask(client, "b").status_code == 503
        models.close()  # waits for the thread
        assert loads == []


def test_a_request_that_comes_as_all_others_have_left_is_answered(
    pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(pair[:1]) as (models, client):
        make_room, left = models._make_room, list[int]()

        def leave(entry: Any) -> Any:
            if not left:
                left.append(1)
                raise _UnwantedError
            return make_room(entry)

        monkeypatch.setattr(models, "_make_room", leave)
        assert ask(client, "a").status_code == 200
        assert left


def test_an_end_while_a_model_loads_waits_for_it(pair: list[Path]) -> None:
    with serving(pair) as (models, client), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, client, "a")
        wait_until(lambda: "a" in models._entries and models._entries["a"].is_loading)
        assert client.get("/health").status_code == 200
        models.close()
        assert answer.result(PATIENCE).status_code == 503
        assert loaded(client) == []


def test_counts_are_of_each_model_and_outlive_it(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the limits of a key are of all models."""
    monkeypatch.setattr(keys, "MINUTE", 3600.0)  # on a busy machine, loading a model takes a minute
    file = tmp_path / "keys.toml"
    file.write_text('[anna]\nkey = "a-key"\nrequests_a_minute = 3\n')
    file.chmod(0o600)
    with serving(pair, "--keep-alive", "0", "--api-keys", str(file)) as (_, client):
        client.headers["x-api-key"] = "a-key"
        assert [ask(client, name).status_code for name in "aba"] == [200] * 3
        assert ask(client, "b").status_code == 429
        wait_until(lambda: loaded(client) == [])
        text = client.get("/metrics").text
    samples = {
        (each.name, each.labels["model"]): each.value
        for family in parsed(text)
        for each in family.samples
        if each.name.startswith("moetier_serve") and "le" not in each.labels and "outcome" not in each.labels
    }
    assert samples["moetier_serve_new_tokens_total", "a"] == 4
    assert samples["moetier_serve_new_tokens_total", "b"] == 2
    assert samples["moetier_serve_first_token_seconds_count", "a"] == 2
    assert samples["moetier_serve_loaded", "a"] == samples["moetier_serve_loaded", "b"] == 0
    assert "moetier_tier_hits_total{" not in text
