"""`moetier serve` as a real process, and its application in this one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI
from prepared import MAIN, Process, for_commands
from readers import PATIENCE

KEY = "a-key-of-the-tests"


class LoadedAlready:
    """Loads the one model of a server by returning its service, which exists already."""

    resources: Mapping[str, Any] = {}

    def __init__(self, service: Any, keys: Any, leave_out: str | None) -> None:
        self.keys = keys
        self._service = service
        self._leave_out = leave_out

    @contextmanager
    def loaded(self, directory: Path, tally: Any, options: Any) -> Iterator[Any]:
        from moetier.tools.serve.prompts import Prompts
        from moetier.tools.serve.serving import Served

        service = self._service
        service.tally = tally
        limits = {"context": service.context, "max_scored": service.max_scored}
        yield Served(service, Prompts(service.model, service.tokenizer, **limits, leave_out=self._leave_out))


def application(
    name: str, service: Any, keys: Any, most: int, *, leave_out: str | None = None, **seconds: float
) -> Any:
    """The application of a server with one model, which is loaded already, as ``name``."""
    from moetier.tools.serve.app import application as application_of
    from moetier.tools.serve.catalogue import Catalogue
    from moetier.tools.serve.models import Models

    models = Models(Catalogue([Path(name)], name=name), LoadedAlready(service, keys, leave_out))
    with models.load_only():
        return application_of(models, keys, most, **seconds)


@contextmanager
def serving(
    directory: Path, *, context: int, parallel: int = 2, template: Any = None, most: int = 64, **seconds: float
) -> Iterator[tuple[Any, Any]]:
    """(application, service), without a key; with another chat ``template`` than the model's."""
    import moetier

    model, tokenizer = moetier.load(directory, daemon=None, same_bits=True)  # as on processors without AMX
    assert tokenizer is not None
    tokenizer.chat_template = template or tokenizer.chat_template
    with model.tiers, answering(model, tokenizer, context=context, parallel=parallel) as service:
        yield application("small", service, None, most, **seconds), service


@contextmanager
def answering(model: Any, tokenizer: Any, *, context: int, chunk: int = 16, parallel: int = 2) -> Iterator[Any]:
    """A service that answers with a model, up to ``parallel`` requests at a time."""
    from moetier.runtime.engine.engine import Engine
    from moetier.runtime.engine.model_runner import ModelRunner
    from moetier.tools.serve.answers import AnswerService

    pages = parallel * -(-context // 64)
    with Engine(ModelRunner(model, pages), pages=pages, max_sequences=parallel, chunk=chunk, context=context) as engine:
        engine._masks.submit(int).result()  # its thread is there now
        yield AnswerService(model, tokenizer, engine)


@contextmanager
def listening(app: Any, *, unread: int | None = None) -> Iterator[str]:
    """The address of an application that the server's own listener serves from a thread of this process.

    ``unread``: bytes that the kernel takes of an answer that a client does not read; None: as many as it likes.
    """
    from moetier.tools.serve.listen import Server, bind

    ready = threading.Event()
    with bind("127.0.0.1", 0) as bound:
        if unread is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unread)
        server = Server(app, connections=64, ready=ready.set, ending=lambda: None, answer_seconds=2 * PATIENCE)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            assert ready.wait(PATIENCE)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@contextmanager
def scripted_client(service: Any, start: str, template: str | None = None, **options: Any) -> Iterator[httpx2.Client]:
    """A client of a server of a scripted qwen3_moe, which answers with the text that ``start`` chooses."""
    import scripted

    template = template or scripted.own_template("qwen3_moe")
    service.tokenizer.chat_template = f"{{% set start = '{start}' %}}{template}"
    with (
        listening(application("small", service, None, 8, **options)) as url,
        httpx2.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield client


class ServerProcess:
    """Ready when it is made. ``log`` is what it wrote to stderr so far."""

    def __init__(
        self,
        directory: Path,
        place: Path,
        arguments: Sequence[str] = (),
        *,
        under: Sequence[str] = (),
        key: str = KEY,
    ) -> None:
        """``under``: a Python script that starts it, with its own arguments. Without, it is a fork of a prepared
        process. ``key``: its API key; "" for none."""
        self._log, said = place / "log", place / "said"
        words = ["serve", str(directory), "--port", "0", *arguments]
        variables = {"MOETIER_API_KEY": key, "MOETIER_LOG": "info"}
        self.process: subprocess.Popen[bytes] | Process
        with Path(os.devnull).open() as nothing, self._log.open("wb") as log, said.open("wb") as out:
            streams = {"stdin": nothing.fileno(), "stdout": out.fileno(), "stderr": log.fileno()}
            if under:
                command = [sys.executable, *under, sys.executable, "-m", "moetier.tools.main", *words]
                self.process = subprocess.Popen(command, env=os.environ | variables, **streams)
            else:
                self.process = for_commands().start(MAIN, *words, environment=variables, **streams)
        try:
            self.url = self._wait(lambda: re.search(r"http://\S+(?=/v1\n)", said.read_text()))
            assert httpx2.get(self.url + "/health", timeout=PATIENCE).json() == {"status": "ok"}
        except BaseException:
            self.end()
            raise
        self.said = said.read_text()

    def _wait(self, found) -> str:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + 3 * PATIENCE  # it imports torch and transformers: long on a busy machine
        while (match := found()) is None:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"it says nothing:\n{self.log}"
            time.sleep(0.02)
        return str(match.group())

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> str:
        """A line of its log."""
        return self._wait(lambda: re.search(pattern, self.log))

    def client(self, **options: object) -> OpenAI:
        given = {"base_url": self.url + "/v1", "api_key": KEY, "max_retries": 0, "timeout": PATIENCE} | options
        return OpenAI(**given)  # type: ignore[arg-type]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
