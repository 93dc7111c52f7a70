"""The bar of a prompt, on a real terminal."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared import Prepared
from terminals import Terminal

import moetier
from moetier.runtime.engine.sequence import Request, TokenSequence
from moetier.runtime.moe.layers import OneTokenLayer
from moetier.tools.cli import progress
from moetier.tools.cli.progress import prompt_bar

PROMPT = "la mattina seguente " * 40
SIZE = 100, 30  # of the terminal
SHOWN = r"prompt of \d,?\d+ tokens: +(\d+)%"

# without the second in which most prompts need no bar
SCRIPT = """
import sys
from moetier.tools.cli import progress
from moetier.tools.main import main
progress.PROMPT_SECONDS = 0
sys.exit(main(sys.argv[1:]))
"""


def test_generate_shows_how_far_its_prompt_is(scripts: Prepared, tinymix_4bit: Path) -> None:
    options = "--max-new-tokens 4 --prefill-chunk 32 --daemon none"
    words = ["generate", str(tinymix_4bit), PROMPT, *options.split()]
    with Terminal(SCRIPT, *words, size=SIZE, scripts=scripts) as terminal:
        terminal.wait_for("tokens/s")
        assert terminal.status() == 0
        screen = terminal.screen
    parts = [int(found) for found in re.findall(SHOWN, screen)]
    assert parts == sorted(parts)
    assert parts[0] == 0
    last = list(re.finditer(SHOWN, screen))[-1].end()
    assert "tokens/s" in screen[last:], "it ends before the text"
    done = scripts.run(SCRIPT, *words)
    assert done.returncode == 0
    assert "prompt of" not in done.stdout + done.stderr


def test_chat_shows_how_far_its_prompt_is(scripts: Prepared, tinymix_4bit: Path) -> None:
    words = ["chat", str(tinymix_4bit), "--max-new-tokens", "4", "--daemon", "none"]
    with Terminal(SCRIPT, *words, size=SIZE, scripts=scripts) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("la mattina " * 40 + "\n")
        terminal.wait_for(SHOWN)
        terminal.wait_for("first after .*>>> ")
        terminal.type("/exit\n")
        assert terminal.status() == 0


@pytest.fixture
def tty() -> Iterator[Any]:
    """A terminal to write to, which shows nothing."""
    main, other = os.openpty()
    with os.fdopen(other, "w") as found:
        yield found
    os.close(main)


def test_a_bar_does_not_change_how_a_prompt_is_computed(
    tinymix_4bit: Path, tty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk is one token, which compiled layers compute."""
    computed, compute = list[bool](), OneTokenLayer.compute

    def seen(layer: OneTokenLayer, *arguments: Any, **named: Any) -> Any:
        found = compute(layer, *arguments, **named)
        computed.append(found is not None)
        return found

    monkeypatch.setattr(OneTokenLayer, "compute", seen)
    model, _ = moetier.load(tinymix_4bit, daemon=None)
    ids, ways = torch.arange(3, 20)[None], list[list[bool]]()
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with model.tiers:
        for stderr in (sys.stderr, sys.stderr, tty):  # the first prompt finds out how layers can be computed
            computed.clear()
            monkeypatch.setattr(sys, "stderr", stderr)
            with prompt_bar(model, TokenSequence(Request(tuple(range(3, 20)), 1))):
                model.generate(**prompt, max_new_tokens=1, prefill_chunk_size=16, do_sample=False)
            ways.append(computed[:])
    assert any(ways[1])
    assert ways[1] == ways[2]


def test_the_bar_of_a_prompt_in_lockstep_reaches_its_end_with_the_last_block(
    tinymix_4bit: Path, tty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = list[float]()
    monkeypatch.setattr(progress.tqdm, "update", lambda bar, n: updates.append(n))
    model, _ = moetier.load(tinymix_4bit, daemon=None, context=1000)
    monkeypatch.setattr(sys, "stderr", tty)
    with model.tiers, moetier.Engine.of(model) as engine:
        stream = engine.stream(Request(tuple(range(3, 603)), 1))
        with prompt_bar(model, stream.sequence):
            assert len([*stream]) == 1
    assert 600 <= sum(updates) < 700, "the trial whether prompts can be computed in lockstep has a few tokens, too"
    assert max(updates) == 256 / len(model.tiers.manifest.blocks)


def test_bytes_are_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.ByteProgress("copy", 400) as few, progress.ByteProgress("copy", 400, quiet=True) as none:
        few.advance(100)
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        few.advance(100)
        none.advance(100)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"copy: 50%, [\d.]+ \w+/s, 0 s left", line)


class Screen(io.StringIO):
    """What a terminal gets."""

    def isatty(self) -> bool:
        return True


def test_bytes_are_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    with progress.ByteProgress("copy", 400) as bar:
        for _ in range(2):
            time.sleep(0.11)  # tqdm draws ten times a second
            bar.advance(100)
    said = screen.getvalue()
    assert re.search(r"\rcopy:  50%\|.* 200/400 ", said), said
    assert re.search(r"\r +\r$", said), "it is gone at the end"
