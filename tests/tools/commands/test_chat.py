from __future__ import annotations

import importlib
import importlib.util
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from prepared import MAIN, Prepared
from terminals import CTRL_C, CTRL_D, UP, Terminal
from threads import wait_until

import moetier
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.model_runner import ModelRunner
from moetier.runtime.generation.conversation import PLAIN_TEMPLATE
from moetier.runtime.moe.experts import experts_modules
from moetier.tools.chat.answer import Answering, Leave, interruptible
from moetier.tools.chat.options import AnswerOptions
from moetier.tools.main import main


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets what comes on standard input."""
    file = tmp_path / "stdin"

    def set_input(text: str | bytes) -> None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        stream = file.open(encoding="utf-8", errors="surrogateescape")  # as in the locale C
        opened.append(stream)
        monkeypatch.setattr(sys, "stdin", stream)

    opened: list[Any] = []
    yield set_input
    for stream in opened:
        stream.close()


@pytest.fixture
def endless(tinymix_4bit: Path, tmp_path: Path) -> Path:
    """tinymix that never ends by itself: what is to be interrupted is still under way."""
    folder = tmp_path / "endless"
    copytree(tinymix_4bit, folder)
    for name, changes in {
        "config.json": {"eos_token_id": None, "max_position_embeddings": 1_000_000},
        "generation_config.json": {"eos_token_id": None},
    }.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def answers(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_pipe_brings_turns(says: Any, tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line is a turn, a block of lines is one, commands are none; what was said is prefilled once."""
    saved = tmp_path / "saved.json"
    says(f'To be?\n\n"""Or\n/not"""\n /stats?\n/save {saved}\n/stats\n/reset\nTo be?\n/exit\nnever read\n')
    options = ["--json", "--max-new-tokens", "6", "--system", "A play."]
    assert main(["chat", str(tinymix_4bit), *options]) == 0
    *turns, stats, again = answers(capsys)
    assert [turn["role"] for turn in turns] == ["assistant"] * 3
    for turn in turns:
        assert turn["finish_reason"] == ("length" if turn["new_tokens"] == 6 else "stop")
        assert 0 < turn["hit_ratio"] <= 1
    kept = [turn["kept_tokens"] for turn in turns]
    lengths = [turn["prompt_tokens"] for turn in turns]
    assert kept[0] == 0
    # all of the prompt before is kept, and of the answer as much as is tokenised as it was generated
    assert all(before <= now < length for before, now, length in zip(lengths, kept[1:], lengths[1:], strict=False))
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
    assert [message["content"] for message in messages[1::2]] == ["To be?", "Or\n/not", " /stats?"]
    assert [message["content"] for message in messages[2::2]] == [turn["content"] for turn in turns]
    assert stats["new_tokens"] == sum(turn["new_tokens"] for turn in turns)
    assert stats["prompt_tokens"] == sum(lengths) - sum(kept)  # those that were computed
    assert stats["tiers"]["host"]["hits"] > 0
    # the same prompt again: all but its last token are still kept
    assert (again["kept_tokens"], again["content"]) == (lengths[0] - 1, turns[0]["content"])


def test_text_goes_to_standard_output_and_all_else_to_standard_error(
    says: Any, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says("To be?\n/stats\n/?\n")
    assert main(["chat", str(tinymix_4bit), "--max-new-tokens", "4", "--status"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    for words in (
        "no chat template",
        "tokens/s",
        "prompt tokens new",
        "hits",
        "first token after",
        "waiting for misses took",
        "evictions",
        "/save",
    ):
        assert words in printed.err
        assert words not in printed.out
    says("To be?\nOr not?\n")
    assert main(["chat", str(tinymix_4bit), "--max-new-tokens", "4"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out.startswith(printed.out + "\n"), "an empty line is between two answers"
    assert quiet.err == ""


def test_the_oldest_turns_are_left_out_and_that_is_reported(
    says: Any, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says("Good morning to you all.\n" * 8)
    assert main(["chat", str(tinymix_4bit), "--json", "--context", "100", "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr()
    turns = [json.loads(line) for line in printed.out.splitlines()]
    assert len(turns) == 8
    assert all(turn["prompt_tokens"] + turn["new_tokens"] <= 100 for turn in turns)
    assert re.search(r"the context is full: the model no longer sees the first \d+ turns", printed.err)


def test_a_directory_says_how_it_talks_and_samples_and_the_seed_what(
    says: Any, tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sampling"
    copytree(tinymix_4bit, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 1.5, "top_k": 50}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}")

    def said(*options: str) -> str:
        says("To be?\n")
        assert main(["chat", str(folder), "--max-new-tokens", "12", *options]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    assert said("--seed", "1") == said("--seed", "1") != said("--seed", "2")
    assert said("--seed", "1", "--temperature", "0") == said("--seed", "2", "--temperature", "0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/nothing\n", ["no command /nothing", "/help"]),
        ("/save\n", ["needs the name of a file", "/save FILE"]),
        ("/save /nonexistent/file\n", ["/nonexistent/file", "can't be written"]),
        ("/save /\n", ["exists already", "another file"]),
        ("/save ~nobody-of-this-name/file\n", ["~nobody-of-this-name/file", "can't be written"]),
        ('"""no\nend\n', ["did not end", '"""']),
        (b"\xff\xfe\n", ["not UTF-8"]),
        ("many words " * 300 + "\n", ["the context has only 200", "--context"]),
    ],
    ids=["command", "no file", "no folder", "there", "no home", "block", "bytes", "length"],
)
def test_what_cannot_work_ends_a_pipe(
    says: Any, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, words: list[str]
) -> None:
    says(text)
    assert main(["chat", str(tinymix_4bit), "--context", "200"]) == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 2
    assert all(word in message for word in words), message


def test_ctrl_c_stops_between_layers_of_a_prefill_and_between_tokens_of_an_answer(endless: Path) -> None:
    """With signals, at a known place. What was computed by then serves the next answer."""
    model, tokenizer = moetier.load(endless, daemon=None)
    with model.tiers, Engine(ModelRunner(model, 4), pages=4, max_sequences=1, chunk=8, context=200) as engine:
        assert tokenizer is not None
        answering = Answering(model, tokenizer, engine, AnswerOptions({"temperature": 0.0}), is_plain=True)
        ids = tokenizer("What is the matter with you, that you say nothing of all this to anybody?")["input_ids"]
        module = [*experts_modules(model).values()][3]
        handler = signal.getsignal(signal.SIGINT)

        def answer_with_signal(at: int, times: int = 1, most: int = 50) -> Any:
            calls = []

            def press(*_: object) -> None:
                calls.append(None)
                if len(calls) == at:  # Python handles a signal on the main thread, and at once if that one has it
                    for _ in range(times):
                        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
                        wait_until(lambda: engine.sequences[0].is_cancelled)

            handle = module.register_forward_hook(press)
            try:
                with interruptible() as is_interrupted:
                    return answering.answer(ids, most=most, is_interrupted=is_interrupted, echo=False)
            finally:
                handle.remove()

        assert len(ids) > 16
        chunks = -(-len(ids) // 8)
        nothing = answer_with_signal(2)
        assert (nothing.text, nothing.finish_reason, nothing.timing.new_tokens) == ("", "interrupted", 0)
        # the first chunk was computed, and the second was cut
        assert (nothing.cached_tokens, nothing.timing.prompt_tokens) == (0, 8)
        assert f"no tokens, interrupted after {nothing.timing.total:.2f} s: 8 of {len(ids)} prompt tokens are kept" in (
            nothing.line()
        )
        assert nothing.to_json()["computed_tokens"] == 8
        some = answer_with_signal(chunks - 1 + 4)  # a chunk is kept; the rest, and then token by token
        assert some.prompt_tokens - some.timing.prompt_tokens == 8
        assert (some.finish_reason, some.timing.new_tokens) == ("interrupted", 5)
        whole = answer_with_signal(0, most=9)
        assert (whole.finish_reason, whole.timing.new_tokens, whole.timing.prompt_tokens) == ("length", 9, 1)
        assert whole.text.startswith(some.text)
        with pytest.raises(Leave):
            answer_with_signal(2, times=2)
        assert signal.getsignal(signal.SIGINT) is handler


# of the other one, which some builds of Python have instead, neither keys nor Ctrl-C do the same
gnu_readline = pytest.mark.skipif(
    importlib.util.find_spec("readline") is None or "libedit" in (importlib.import_module("readline").__doc__ or ""),
    reason="this Python is built without GNU readline",
)

LOOP = """
from moetier.tools.chat.chat_input import ChatInput
from moetier.tools.chat.commands import Commands
from moetier.tools.chat.dialogue import Dialogue
dialogue = Dialogue(*[None] * 4, options=None, kept=None, title="", as_json=False, status=False)
dialogue.talk(ChatInput(), Commands(dialogue).run)
print("left")
"""


@pytest.mark.parametrize("keys", [CTRL_D, "/exit\n", "/bye\n"], ids=["Ctrl-D", "exit", "bye"])
def test_the_ways_out_of_a_terminal(keys: str) -> None:
    with Terminal("-c", LOOP) as terminal:
        terminal.wait_for(">>> ")
        terminal.type(keys)
        terminal.wait_for("left\n")
        assert terminal.status() == 0


@gnu_readline
def test_ctrl_c_leaves_the_second_time() -> None:
    with Terminal("-c", LOOP) as terminal:
        terminal.wait_for(">>> ")
        terminal.interrupt()
        terminal.wait_for("Press Ctrl-C again or Ctrl-D, or type /exit, to end the chat.\n.*>>> ")
        terminal.interrupt()
        terminal.wait_for("left\n")
        assert terminal.status() == 0


@gnu_readline
def test_lines_are_edited_cleared_and_come_back() -> None:
    with Terminal("-c", LOOP) as terminal:
        terminal.wait_for(">>> ")
        for _ in range(3):  # a line with something on it is cleared, however often
            terminal.type("garbage")
            terminal.wait_for("garbage")
            terminal.interrupt()
            terminal.wait_for("\n.*>>> ")
        terminal.type("/hlp\x02\x02e\n")  # two characters back, and one in between
        terminal.wait_for("the counters of each tier.*>>> ")
        terminal.type(UP)
        terminal.wait_for("/help")
        terminal.type("\n")
        terminal.wait_for("the counters of each tier.*>>> ")
        terminal.type('"""one\n')
        terminal.wait_for(r"\.\.\. ")
        terminal.interrupt()
        terminal.wait_for("\n.*>>> ")
        assert "Ctrl-C again" not in terminal.screen
        terminal.type(CTRL_D)
        assert terminal.status() == 0


def test_a_person_talks_in_a_terminal(scripts: Prepared, endless: Path, tmp_path: Path) -> None:
    """No answer ends by itself: each is stopped by Ctrl-C, and what it said stays."""
    saved = tmp_path / "saved.json"
    options = ["--context", "100000", "--max-new-tokens", "90000", "--daemon", "none", "--ram", "32MiB"]
    with Terminal(MAIN, "chat", str(endless), *options, scripts=scripts) as terminal:
        terminal.wait_for(f"loading {endless} \\.\\.\\.\n")
        terminal.wait_for("experts of this process; a context of 100,000 tokens .*>>> ")
        shown = []
        for keys, more in (("To be, or not to be?\n", ""), ('"""What is\n', 'the matter?"""\n')):
            terminal.type(keys)
            if more:
                terminal.wait_for(r"\.\.\. ")
                terminal.type(more)
            terminal.wait_for("\\?[^\n]*\n")
            shown.append(terminal.wait_for(r"\S[^\x1b]{20}"))
            terminal.type(CTRL_C)
            shown[-1] += terminal.wait_for(r"\^C").removesuffix("^C")
            terminal.wait_for(r"\[\d+ tokens, interrupted, \S+ tokens/s; first after .* prompt tokens new; hits \S+%\]")
            terminal.wait_for(">>> ")
        terminal.type("/stats\n")
        terminal.wait_for("first token after.*hit ratio.*host.*>>> ")
        terminal.type(f"/save {saved}\n")
        terminal.wait_for("4 messages saved\n.*>>> ")
        terminal.type(CTRL_D)
        assert terminal.status() == 0
        assert "Traceback" not in terminal.screen
    messages = json.loads(saved.read_text())
    assert [message["content"] for message in messages[::2]] == ["To be, or not to be?", "What is\nthe matter?"]
    for message, text in zip(messages[1::2], shown, strict=True):
        said = re.sub(r"\x1b\[[?\d]*[a-z]|\r", "", text).strip()
        assert message["content"].startswith(said)
    # the second prompt was computed but for what the first turn had left
    computed = [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+) prompt tokens new", terminal.screen)]
    assert computed[0][0] == computed[0][1]
    assert computed[1][0] <= computed[1][1] - computed[0][1]


def test_the_plain_template_is_one_that_transformers_takes() -> None:
    import jinja2

    jinja2.Environment().from_string(PLAIN_TEMPLATE)


def test_a_directory_may_name_a_cache_class(
    says: Any, tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    copytree(tinymix_4bit, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cache_implementation": "dynamic"}))
    says("To be?\n")
    assert main(["chat", str(folder), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
