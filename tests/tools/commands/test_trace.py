from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemons import running_daemon
from prepared import MAIN, Prepared

import moetier
from moetier.runtime.trace.trace import NO_EXPERT, Trace
from moetier.tiers.errors import ConfigError
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.main import main
from moetier.tools.traces.recording import read_prompts

PROMPTS = "def read_lines(path):\n\n  La mattina seguente, don Rodrigo\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path / "prompts.txt"


def words_of(folder: Path, prompts: Path, output: Path) -> list[str]:
    return ["trace", str(folder), "--prompts", str(prompts), "-o", str(output), "--daemon", "none"]


def trace(folder: Path, prompts: Path, output: Path, *options: str) -> int:
    return main([*words_of(folder, prompts, output), *options])


def test_it_records_what_the_model_does(scripts: Prepared, tinymix_4bit: Path, prompts: Path, tmp_path: Path) -> None:
    """As a person runs it, with room for a quarter of the experts."""
    words = ["trace", tinymix_4bit, "--prompts", prompts, "-o", tmp_path / "T.npz"]
    result = scripts.run(MAIN, *words, "--max-new-tokens", 5, "--ram", "3520KiB")
    assert result.returncode == 0, result.stderr
    head, columns, *rows = result.stdout.splitlines()
    found = Trace.load(tmp_path / "T.npz")
    assert head.endswith(f"T.npz: 2 sequences, {found.tokens} tokens, 8 blocks, top 2")
    assert columns.split() == ["recall", "gates", "popularity", "previous", "token"]
    assert [row.split()[:2] for row in rows] == [["1", "ahead"], ["2", "ahead"]]
    for row in rows:
        gates, popularity, previous = map(float, row.split()[2:])
        assert 1 > gates > max(popularity, previous) > 0.25  # .25 is chance
    assert "2 of 2 prompts" in result.stderr
    assert "Warning" not in result.stderr

    manifest = read_manifest(store_folder(tinymix_4bit))
    assert (found.model, found.digest) == (manifest.model, manifest.digest)
    assert found.blocks == tuple(block.path for block in manifest.blocks)
    assert found.num_experts == (8,) * 8
    assert [len(span) - prompt for span, prompt in zip(found.sequences, found.n_prefill, strict=True)] == [4, 4]
    assert found.lookaheads == (1, 2)
    assert (found.experts != NO_EXPERT).all()
    pieces = ["".join(found.pieces[token] for token in span[:prompt]) for span, prompt in spans(found)]
    assert pieces == [line for line in PROMPTS.splitlines() if line]


def spans(found: Trace) -> list[tuple[range, int]]:
    return list(zip(found.sequences, found.n_prefill, strict=True))


def test_the_file_is_as_its_format_says(
    tinymix_4bit: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/traces.md, read with numpy alone; and what --json says of it."""
    assert trace(tinymix_4bit, prompts, tmp_path / "T.npz", "--max-new-tokens", "2", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    with np.load(tmp_path / "T.npz", allow_pickle=False) as arrays:
        found = {name: (str(arrays[name].dtype), arrays[name].shape) for name in arrays.files}
    tokens = found["experts"][1][0]
    assert (said["trace"], said["tokens"], said["blocks"]) == (str(tmp_path / "T.npz"), tokens, 8)
    assert [entry["lookahead"] for entry in said["recall"]] == [1, 2]
    texts = {name: shape for name, (_, shape) in found.items() if name in ("pieces", "blocks", "model", "digest")}
    assert texts == {"pieces": (tokens,), "blocks": (8,), "model": (), "digest": ()}
    assert {name: value for name, value in found.items() if name not in texts} == {
        "experts": ("uint8", (tokens, 8, 2)),
        "offsets": ("int64", (3,)),
        "num_experts": ("int64", ()),
        "top_k": ("int64", ()),
        "n_prefill": ("int64", (2,)),
        "weights": ("float16", (tokens, 8, 2)),
        "probabilities": ("float16", (tokens, 8, 8)),
        "token_ids": ("int32", (tokens,)),
        "lookaheads": ("int64", (2,)),
        "predictions": ("uint8", (2, tokens, 8, 2)),
        "prediction_probabilities": ("float16", (2, tokens, 8, 2)),
    }


def test_the_same_run_gives_the_same_bytes(tinymix_4bit: Path, prompts: Path, tmp_path: Path) -> None:
    """Whatever the budget."""
    for name, ram in (("a", "3520KiB"), ("b", "64MiB")):
        options = ("--max-new-tokens", "4", "--temperature", "1.2", "--seed", "7", "--ram", ram)
        assert trace(tinymix_4bit, prompts, tmp_path / f"{name}.npz", *options) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_daemons_experts_are_routed_to_the_same(tinymix_4bit: Path, prompts: Path, tmp_path: Path) -> None:
    options = ("--max-new-tokens", "4")
    assert trace(tinymix_4bit, prompts, tmp_path / "own.npz", *options) == 0
    with running_daemon(tinymix_4bit, ram="3520KiB", folder=tmp_path / "d") as daemon:
        shared = ("--daemon", str(daemon.folder))
        assert trace(tinymix_4bit, prompts, tmp_path / "shared.npz", *options, *shared) == 0
        assert daemon.stats().host.misses > 0
    assert (tmp_path / "shared.npz").read_bytes() == (tmp_path / "own.npz").read_bytes()


def test_no_look_ahead(tinymix_4bit: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace(tinymix_4bit, prompts, tmp_path / "T.npz", "--max-new-tokens", "1", "--look-ahead", "0") == 0
    assert Trace.load(tmp_path / "T.npz").lookaheads == ()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_file_that_is_there_stays_unless_told_otherwise(
    tinymix_4bit: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "T.npz"
    target.write_text("mine")
    assert trace(tinymix_4bit, prompts, target, "--max-new-tokens", "1") == 1
    assert "--force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert trace(tinymix_4bit, prompts, target, "--max-new-tokens", "1", "--force") == 0
    assert Trace.load(target).tokens > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["T.npz", "prompts.txt"]


KILLED = """
import os, signal, sys
from moetier.tools.main import main

def write(text, write=sys.stderr.write):
    write(text)
    if text == "\\n":  # the first prompt is recorded
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)

sys.stderr.write = write
main()
"""


def test_a_run_that_is_cut_leaves_the_old_file(
    scripts: Prepared, tinymix_4bit: Path, prompts: Path, tmp_path: Path
) -> None:
    target = tmp_path / "T.npz"
    target.write_text("mine")
    prompts.write_text("one\n" * 1000)
    result = scripts.run(KILLED, *words_of(tinymix_4bit, prompts, target), "--force", "--max-new-tokens", "4")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert "1 of 1000 prompts" in result.stderr
    assert target.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["T.npz", "prompts.txt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ram", "1KiB"], ["too small", "--ram"]),
        (["-o", "/nonexistent/T.npz"], ["/nonexistent is not a folder"]),
        (["-o", "/"], ["/ is a folder"]),
        (["--prompts", "/nonexistent"], ["/nonexistent", "No such file"]),
    ],
)
def test_what_cannot_work_is_reported(
    tinymix_4bit: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: list[str],
) -> None:
    assert trace(tinymix_4bit, prompts, tmp_path / "T.npz", *options) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert not (tmp_path / "T.npz").exists()


def test_a_prompt_without_tokens_is_refused_before_any_is_recorded(
    tinymix_4bit: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tokenizer that leaves a character out."""
    folder = tmp_path / "model"
    shutil.copytree(tinymix_4bit, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    prompts.write_text("one\n~\ntwo\n~~\n")
    assert trace(folder, prompts, tmp_path / "T.npz", "--max-new-tokens", "1") == 1
    message = capsys.readouterr().err
    assert "no tokens in prompt 2, 4" in message
    assert "of 4 prompts" not in message
    assert not (tmp_path / "T.npz").exists()


def test_it_does_not_speculate(
    tinymix_4bit: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose guesses would read and evict beside what is recorded, for nothing."""
    speculations, real = [], moetier.load

    def load(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = real(*arguments, **options)
        speculations.append(model.tiers.speculation)
        return model, tokenizer

    monkeypatch.setattr("moetier.runtime.model.load.load", load)
    assert trace(tinymix_4bit, prompts, tmp_path / "T.npz", "--max-new-tokens", "1") == 0
    assert speculations == [None]


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    lines = [{"question_id": 81, "turns": ["a\nb", "c"]}, {"prompt": " d"}, {"text": "é"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    assert read_prompts(tmp_path / "p.jsonl") == ["a\nb", " d", "é"]


def test_prompts_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("one \r\n\r\n  two\u2028still\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["one ", "  two\u2028still"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", b"", "no prompts"),
        ("p.txt", b" \n\n", "no prompts"),
        ("p.txt", b"a\n\xff\n", "not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\nplain\n', r"p\.jsonl:2 is not JSON"),
        ("p.jsonl", b'\n{"prompt": 1}\n', r"p\.jsonl:2 has no prompt"),
        ("p.jsonl", b'{"turns": []}', "has no prompt"),
        ("p.jsonl", b'{"prompt": ""}', "has no prompt"),
        ("p.jsonl", b'["a"]', "has no prompt"),
        ("p.jsonl", b'{"prompt": "a\\udcff"}', r"prompt of \S+p\.jsonl:1 is not UTF-8"),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        read_prompts(tmp_path / name)
