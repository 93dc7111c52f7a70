"""Tokens of a model whose experts are held by daemons of other hosts, while these are killed and started again."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
import torch
from comparison import smallest_ram
from daemons import DaemonProcess, running_daemon
from threads import wait_until
from transformers.generation.streamers import BaseStreamer

import moetier
from moetier.runtime.client.spread import SpreadStore
from moetier.runtime.wire.address import Credentials
from moetier.tiers.store.folder import read_manifest, store_folder

TOKENS = 40


@pytest.fixture
def three(tinymix_4bit: Path, tmp_path: Path) -> Iterator[list[DaemonProcess]]:
    (tmp_path / "token").write_text("s3cret")
    ram = read_manifest(store_folder(tinymix_4bit)).stored_bytes
    with ExitStack() as stack:
        daemons = []
        for name in "abc":
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            options = ["--listen", f"127.0.0.1:{port}", "--token-file", tmp_path / "token"]
            daemons.append(
                stack.enter_context(running_daemon(tinymix_4bit, ram=ram, folder=tmp_path / name, extra=options))
            )
        yield daemons


class Interruptions(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Does something behind the n-th token."""

    def __init__(self, actions: dict[int, Callable[[], object]]) -> None:
        self._actions = actions
        self._tokens = -1  # the first that it is given is the prompt

    def put(self, value: torch.Tensor) -> None:
        self._tokens += 1
        if action := self._actions.pop(self._tokens, None):
            action()

    def end(self) -> None:
        assert not self._actions, "the text was too short"


def decode(model: Any, actions: dict[int, Callable[[], object]]) -> list[int]:
    ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        streamer=Interruptions(actions),
    )
    tokens: list[int] = found[0].tolist()
    return tokens


@pytest.mark.slow
def test_no_token_is_lost_or_wrong(
    three: list[DaemonProcess], tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the smallest budget, so that experts are fetched for every token; without shards to fall back on."""
    bare = tmp_path / "bare"
    shutil.copytree(tinymix_4bit, bare, ignore=shutil.ignore_patterns("c"))
    readers: list[SpreadStore] = []
    opened = SpreadStore.open
    monkeypatch.setattr(SpreadStore, "open", lambda *arguments: (readers.append(opened(*arguments)), readers[-1])[1])
    ram = smallest_ram(tinymix_4bit)
    own, _ = moetier.load(tinymix_4bit, ram=ram, daemon=None)
    with own.tiers:
        expected = decode(own, {})
    model, _ = moetier.load(
        bare,
        ram=ram,
        daemon=",".join(daemon.card.listen for daemon in three),
        remote_compute="off",
        credentials=Credentials(token_file=tmp_path / "token", insecure=True),
    )
    with model.tiers:
        (reader,) = readers

        def restart() -> None:
            three[0].restart()
            wait_until(lambda: not reader.shares()[0].away)

        assert decode(model, {5: three[0].kill, 20: restart, 25: three[1].kill}) == expected
        assert min(share.records for share in reader.shares()) > 0
        assert [share.lost > 0 for share in reader.shares()] == [True, True, False]
        assert reader.shares()[1].away
