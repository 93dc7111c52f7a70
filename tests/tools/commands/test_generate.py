from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from daemons import running_daemon
from faults import mounted
from prepared import MAIN, Prepared
from terminals import CTRL_D, Terminal
from threads import wait_until

import moetier
from moetier.runtime.generation.streamer import TimedStreamer
from moetier.tiers.errors import StoreReadError
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.text import format_bytes
from moetier.tools.cli.daemon_reads import DaemonReads, DaemonWatch
from moetier.tools.cli.report import Timing, slow_line
from moetier.tools.main import main
from moetier.tools.rates.hardware import CpuTimes

PROMPT = "def read_lines(path):"


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["generate", *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def budget(folder: Path, records: int) -> str:
    with ShardStore.open(folder) as store:
        return str(records * store.layout(0).slot_bytes)


SHORT = """
load      [\\d.]+ s
prefill   \\d+ tokens, [\\d.]+ tokens/s, first token after [\\d.]+ s
decode    4 tokens, [\\d.]+ tokens/s
hits      host [\\d.]+% of \\d+; waiting for misses took [\\d.]+% of the time
read      [\\d.]+ MiB, [\\d.]+ [KM]iB a token
memory    [\\d.]+ MiB at its peak
(busy      other processes used [\\d.]+ of \\d+ CPUs meanwhile: .*
)?(slow      misses took [\\d.]+% of the time: give experts more memory with --ram, or leave it out; .*
)?"""
LONG = r"""
experts   of this process
tier +slots +hits +misses +hit ratio +read +a token +evictions +wait p50 +p99 +of time
host .*
predicted in \d+ of \d+ steps, now (on|off)(; .*)?
          predicting costs [\d.]+ ms a step
(prefetch  host: .*
)?(preloaded .*
)?"""


def test_it_streams_the_text_and_then_reports(scripts: Prepared, tinymix_4bit: Path) -> None:
    """Text on standard output; the main figures on standard error, and all of them if they are asked for."""
    words = ["generate", tinymix_4bit, PROMPT, "--max-new-tokens", "4", "--daemon", "none", "--ram", "3MiB"]
    result = scripts.run(MAIN, *words)
    assert result.returncode == 0
    assert result.stdout.strip()
    assert re.fullmatch(SHORT, result.stderr), result.stderr
    result = scripts.run(MAIN, *words, "--verbose")
    assert re.fullmatch(SHORT + LONG, result.stderr), result.stderr


def test_the_report_of_a_slow_run_says_what_helps(tinymix_4bit: Path) -> None:
    """Unless all experts have room: then each was read once."""
    for records, is_slow in ((16, True), (64, False)):
        model, tokenizer = moetier.load(tinymix_4bit, ram=budget(tinymix_4bit, records), daemon=None)
        assert tokenizer is not None
        with model.tiers:
            model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8)
            seconds = model.tiers.host.stats().wait_seconds
            slow = slow_line(Timing(8, 8, 0.0, 4 * seconds), model.tiers, "1MiB")
            quick = slow_line(Timing(8, 8, 0.0, 6 * seconds), model.tiers, "1MiB")
            free = slow_line(Timing(8, 8, 0.0, 4 * seconds), model.tiers, None)
        assert quick is None
        if is_slow:
            said = "slow      misses took 25% of the time: give experts more memory with --ram, or leave it out; "
            assert slow == f"{said}moetier plan says what that gives"
            assert free is not None
            assert "--ram" not in free
        else:
            assert slow is None


def test_the_report_adds_up(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ram", budget(tinymix_4bit, 16), "--max-new-tokens", "8", "--speculate", "off"]
    answer = generate(capsys, str(tinymix_4bit), PROMPT, *options)
    host = answer["tiers"]["host"]
    assert answer["new_tokens"] == 8
    assert host["slots"] == 16
    # eight blocks; each of the seven decode steps wants two experts of each, the prefill at least two
    assert host["hits"] + host["misses"] >= 8 * 2 * 8
    assert 0 < host["hit_ratio"] < 1
    assert host["evictions"] == host["misses"] - host["joined"] - 16
    assert host["bytes_in"] == (host["misses"] - host["joined"]) * int(budget(tinymix_4bit, 1))
    tokens = answer["prompt_tokens"] + answer["new_tokens"]
    assert host["bytes_per_token"] == pytest.approx(host["bytes_in"] / tokens)
    assert 0 <= host["wait_share"] < 1
    assert 0 < answer["time_to_first_token_s"] < answer["total_s"]


def test_where_records_came_from_is_reported(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a daemon by TCP, and when that is gone from the store. A wrong token is an error, store or not."""
    (tmp_path / "token").write_text("s3cret")
    (tmp_path / "wrong").write_text("s3cre")
    ram = budget(tinymix_4bit, 16)
    extra = ["--listen", "127.0.0.1:0", "--token-file", tmp_path / "token"]
    with running_daemon(tinymix_4bit, ram=ram, folder=tmp_path / "d", extra=extra) as daemon:
        listen = daemon.card.listen
        options = [str(tinymix_4bit), PROMPT, "--ram", ram, "--max-new-tokens", "2", "--daemon", listen, "--insecure"]
        options += ["--remote-compute", "off"]  # else it depends on times
        assert main(["generate", *options, "--token-file", str(tmp_path / "wrong")]) == 1
        cause, fix = capsys.readouterr().err.splitlines()
        assert listen in cause
        assert "--token-file" in fix
        options += ["--token-file", str(tmp_path / "token")]
        answer = generate(capsys, *options)
        read = answer["tiers"]["host"]["bytes_in"]
        records = read // int(budget(tinymix_4bit, 1))
        nothing_else = {"away": "", "lost": 0, "computed": 0, "computed_bytes": 0}
        assert answer["shares"] == [
            {"place": listen, "records": records, "bytes": read} | nothing_else,
            {"place": "the local store", "records": 0, "bytes": 0} | nothing_else,
        ]
    assert main(["generate", *options]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fetched")]
    assert lines[0].startswith(f"fetched   0 records, 0 B, from {listen}, which can't be reached: ")
    # how many there were is a matter of the order in which they came
    assert re.fullmatch(r"fetched   [1-9]\d* records, [\d.]+ MiB, from the local store", lines[1])


def test_a_daemon_that_reads_and_is_lost_and_comes_back_is_reported(tinymix_4bit: Path, tmp_path: Path) -> None:
    with running_daemon(tinymix_4bit, ram=budget(tinymix_4bit, 16), folder=tmp_path / "d") as daemon:
        model, tokenizer = moetier.load(tinymix_4bit, daemon=str(daemon.folder), speculate="off")
        assert tokenizer is not None
        inputs = tokenizer(PROMPT, return_tensors="pt")
        with model.tiers:
            watch = DaemonWatch(model.tiers)
            model.generate(**inputs, max_new_tokens=2)
            reads = watch.end()
            assert reads is not None
            read = daemon.stats().host.bytes_in
            assert (reads.bytes_read, reads.clients, reads.lost, reads.local_bytes) == (read, 1, 0, 0)
            assert reads.text() == f"{daemon.folder} read {format_bytes(read)} for this run"
            daemon.kill()
            wait_until(lambda: bool(model.tiers.origin.daemon.away))
            model.generate(**inputs, max_new_tokens=2)
            reads = watch.end()
            assert reads is not None
            assert (reads.bytes_read, reads.lost, reads.local_bytes > 0) == (None, 1, True)
            assert re.fullmatch(
                r"\S+/d; it can't be reached: .*; [\d.]+ MiB were read from the local store instead", reads.text()
            )
            daemon.restart()
            wait_until(lambda: not model.tiers.origin.daemon.away)
            model.generate(**inputs, max_new_tokens=2)
            reads = watch.end()
            assert reads is not None
            assert (reads.bytes_read, reads.restarted, reads.lost) == (daemon.stats().host.bytes_in, True, 1)
            assert re.fullmatch(
                r"\S+/d read [\d.]+ MiB for this run since it was restarted; the connection was lost and restored; "
                r"[\d.]+ MiB were read from the local store instead",
                reads.text(),
            )


def test_a_daemon_that_works_for_it_is_no_other_process(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it listens: nothing is said of a busy machine then."""
    monkeypatch.setattr(CpuTimes, "used_by_others", lambda _: 1e3)
    options = [str(tinymix_4bit), PROMPT, "--max-new-tokens", "1", "--daemon"]
    extra = ["--listen", "127.0.0.1:0", "--insecure"]
    with running_daemon(tinymix_4bit, folder=tmp_path / "d", extra=extra) as daemon:
        for place in (["none"], [str(daemon.folder)], [daemon.card.listen, "--insecure"]):
            assert main(["generate", *options, *place]) == 0
            assert ("\nbusy " in capsys.readouterr().err) == (place == ["none"])


def test_the_outcomes_of_prefetches_are_reported_where_they_are_counted(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon's are of all its clients together: it says them itself."""
    options = [str(tinymix_4bit), PROMPT, "--max-new-tokens", "8", "--speculate", "always"]
    ram = budget(tinymix_4bit, 16)
    assert main(["generate", *options, "--daemon", "none", "--ram", ram, "--verbose"]) == 0
    (own,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefetch")]
    assert re.match(
        r"prefetch  host: [1-9]\d* read, \d+ useful, \d+ late, \d+ wasted, \d+ cancelled; \d+ dropped; saved up to ",
        own,
    )
    with running_daemon(tinymix_4bit, ram=ram, folder=tmp_path / "d") as daemon:
        assert main(["generate", *options, "--daemon", str(daemon.folder), "--verbose"]) == 0
        report = capsys.readouterr().err
        host = daemon.stats().host
        assert host.prefetched > 0
    words = [line.split()[0] for line in report.splitlines() if line]
    assert "predicted" in words
    assert "prefetch" not in words
    assert "read" not in words
    assert f"daemon    {daemon.folder} read {format_bytes(host.bytes_in)} for this run" in report.splitlines()


def test_the_budget_changes_no_token(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        generate(capsys, str(tinymix_4bit), PROMPT, "--ram", ram, "--max-new-tokens", "6")["text"]
        for ram in (budget(tinymix_4bit, 2), budget(tinymix_4bit, 16), "1GiB")
    }
    assert len(texts) == 1


def test_the_seed_decides_what_is_sampled(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", "1.5", "--seed", str(seed), "--max-new-tokens", "6")
        text: str = generate(capsys, str(tinymix_4bit), PROMPT, *options)["text"]
        return text

    assert sample(1) == sample(1) != sample(2)


def test_the_next_run_begins_with_what_was_used_most(scripts: Prepared, tinymix_4bit: Path, tmp_path: Path) -> None:
    """In two processes, as they end and write what they learned."""
    options = ["--max-new-tokens", "8", "--daemon", "none", "--learn", "--speculate", "off"]
    options += ["--ram", budget(tinymix_4bit, 63)]  # one too few: with room for all, the rest would be read, too
    words = ["generate", tinymix_4bit, PROMPT, *options]
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    first = json.loads(scripts.run(MAIN, *words, "--json", environment=environment).stdout)
    host = first["tiers"]["host"]
    assert (host["warmed"], host["recalled"]) == (0, 0)
    result = scripts.run(MAIN, *words, "--verbose", environment=environment)
    assert result.returncode == 0, result.stderr
    assert first["text"].strip() in result.stdout
    hits, misses = map(int, re.findall(r"^host +\S+ +(\d+) +(\d+) ", result.stderr, re.MULTILINE)[0])
    assert hits + misses == host["hits"] + host["misses"]
    assert misses < host["misses"]  # how many fewer: how far the warm-up got before the first demand came
    last = result.stderr.splitlines()[-1]
    said = re.fullmatch(r"preloaded (\d+) experts, (\d+) of them used", last)
    assert said is not None
    assert int(said[1]) >= int(said[2]) > 0


def test_counts_that_cannot_be_written_are_a_warning(scripts: Prepared, tinymix_4bit: Path, tmp_path: Path) -> None:
    words = ["generate", tinymix_4bit, PROMPT, "--max-new-tokens", "2", "--daemon", "none", "--learn", "--json"]

    def check(result: subprocess.CompletedProcess[str], why: str) -> None:
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["new_tokens"] == 2
        (line,) = [line for line in result.stderr.splitlines() if "counts of experts" in line]
        assert " can't be saved (" in line
        assert why in line

    full, read_only = tmp_path / "full", tmp_path / "read-only"
    with mounted("tmpfs", full, "size=4k"), mounted("tmpfs", read_only, "ro"):
        (full / "other").write_bytes(bytes(4096))
        check(scripts.run(MAIN, *words, environment={"XDG_CACHE_HOME": str(full)}), "No space left on device")
        check(scripts.run(MAIN, *words, environment={"XDG_CACHE_HOME": str(read_only)}), "Read-only file system")


GREEDY = ("--max-new-tokens", "6", "--temperature", "0")


@pytest.fixture(scope="module")
def greedy_text(tinymix_4bit: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["generate", str(tinymix_4bit), PROMPT, *GREEDY, "--json"]) == 0
    return str(json.loads(output.getvalue())["text"])


@pytest.mark.parametrize(
    ("file", "preferred"),
    [
        ("generation_config.json", {"num_beams": 4, "early_stopping": True}),
        pytest.param("generation_config.json", {"num_beams": 4, "num_beam_groups": 2}, marks=pytest.mark.slow),
        ("generation_config.json", {"do_sample": True, "num_return_sequences": 2}),
        ("generation_config.json", {"penalty_alpha": 0.6, "top_k": 4}),
        ("generation_config.json", {"prompt_lookup_num_tokens": 3}),
        ("tokenizer_config.json", {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}),
        pytest.param("tokenizer_config.json", {"model_input_names": ["input_ids"]}, marks=pytest.mark.slow),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_whatever_a_directory_prefers_one_sequence_streams(
    tinymix_4bit: Path,
    greedy_text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    preferred: dict[str, Any],
) -> None:
    folder = tmp_path / "copy"
    copytree(tinymix_4bit, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | preferred))
    answer = generate(capsys, str(folder), PROMPT, *GREEDY)
    assert (answer["text"], answer["new_tokens"]) == (greedy_text, 6)


def test_a_directory_says_how_it_samples(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in chat and serve: generation_config.json, unless --temperature is given."""
    folder = tmp_path / "copy"
    copytree(tinymix_4bit, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": True, "temperature": 1.5, "top_k": 50}))

    def said(*more: str) -> str:
        text: str = generate(capsys, str(folder), PROMPT, "--max-new-tokens", "6", *more)["text"]
        return text

    assert said("--seed", "1") != said("--seed", "2")
    greedy = said("--seed", "1", "--temperature", "0")
    assert said("--seed", "2", "--temperature", "0") == said("--temperature", "1e-320") == greedy


def test_the_prompt_may_come_from_standard_input(scripts: Prepared, tinymix_4bit: Path) -> None:
    result = scripts.run(MAIN, "generate", tinymix_4bit, "--max-new-tokens", "2", "--json", input=PROMPT)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["prompt"] == PROMPT


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_standard_input_that_is_not_utf8_is_refused(scripts: Prepared, tinymix_4bit: Path, locale: str) -> None:
    """In the C locale Python reads any bytes; in others it raises an error."""
    words = [sys.executable, "-m", "moetier", "generate", str(tinymix_4bit)]
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(words, input=b"to \xff be", capture_output=True, env=environment, check=False)
    assert result.returncode == 1, result.stderr
    cause, fix = result.stderr.decode().splitlines()
    assert re.match(r"moetier: (Standard|The) input is not UTF-8 text", cause)
    assert "iconv" in fix


def test_the_number_of_tokens_has_a_short_name(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tinymix_4bit), PROMPT, "-n", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ram", "1KiB"], ["too small", "--ram"]),
        (["--ram", "0.001%"], ["too small", "--ram", "bytes"]),
    ],
)
def test_what_cannot_work_is_reported(
    tinymix_4bit: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert main(["generate", str(tinymix_4bit), PROMPT, *options]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        (["--ram", "999TiB"], [r"--ram 999TiB is more than the \S+ \wiB of (this machine|the control group \S+)\. .*"]),
        (
            ["--context", "100000"],
            [r"--context 100000 is more than the 2,048 tokens of the model's training: no more are used\."],
        ),
        (["--ram", "100%", "--context", "2048"], []),
        ([], []),
    ],
)
def test_more_than_there_is_is_reported_once(
    tinymix_4bit: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    options: list[str],
    warnings: list[str],
) -> None:
    generate(capsys, str(tinymix_4bit), PROMPT, "--max-new-tokens", "1", "--daemon", "none", *options)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == len(warnings)
    assert all(map(re.fullmatch, warnings, said)), said


@pytest.fixture(scope="module")
def short_context(tinymix_4bit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of at most 32 tokens."""
    folder = tmp_path_factory.mktemp("short") / "copy"
    copytree(tinymix_4bit, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    return folder


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    tinymix_4bit: Path, short_context: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, prompt, numbers in (
        (tinymix_4bit, "a b c " * 1000, ("3,001", "2,048")),
        (short_context, "a b c " * 10 + "a b", ("32", "32")),
        (short_context, "a b c " * 50_000, ("more than 64", "32")),
    ):
        assert main(["generate", str(folder), prompt]) == 1
        out, err = capsys.readouterr()
        assert not out
        cause, fix = err.splitlines()
        assert f"has {numbers[0]} tokens" in cause
        assert f"context is {numbers[1]}" in cause
        assert fix.startswith("  Shorten it")
    assert generate(capsys, str(short_context), "a b c " * 10)["new_tokens"] == 1


def test_an_endless_prompt_is_refused(scripts: Prepared, tinymix_4bit: Path, tmp_path: Path) -> None:
    """Standard input is read as far as it has to be."""
    with (
        subprocess.Popen(["yes", "La mattina seguente"], stdout=subprocess.PIPE) as endless,
        (tmp_path / "said").open("w") as said,
    ):
        assert endless.stdout is not None
        streams = {"stdin": endless.stdout.fileno(), "stdout": said.fileno(), "stderr": said.fileno()}
        assert scripts.start(MAIN, "generate", tinymix_4bit, **streams).wait(120) == 1
        endless.kill()
    assert "has more than 4,096 tokens, and the model's maximum context is 2,048" in (tmp_path / "said").read_text()


def test_the_text_ends_where_the_context_does(
    short_context: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    answer = generate(capsys, str(short_context), "a b c " * 8, "--max-new-tokens", "100")
    assert (answer["prompt_tokens"], answer["new_tokens"]) == (25, 7)
    assert caplog.messages == ["The text ends at the model's maximum context of 32 tokens, prompt and answer together."]
    caplog.clear()
    assert generate(capsys, str(short_context), "a b c " * 8, "--max-new-tokens", "7")["new_tokens"] == 7
    assert not caplog.messages

    (tmp_path / "prompts.txt").write_text("a b\n" + "a b c " * 8)
    words = ["trace", str(short_context), "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "t.npz")]
    assert main([*words, "--max-new-tokens", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 + 19 + 31
    assert len(caplog.messages) == 1
    (tmp_path / "prompts.txt").write_text("a b\n" + "a b c " * 20)
    assert main([*words, "--force"]) == 1
    assert "Prompt 2 has 61 tokens, and the model's maximum context is 32" in capsys.readouterr().err


def test_a_prompt_is_asked_for_at_a_terminal(tinymix_4bit: Path, scripts: Prepared) -> None:
    words = ("generate", str(tinymix_4bit), "-n", "2", "--json", "--daemon", "none")
    with Terminal(MAIN, *words, scripts=scripts) as terminal:
        terminal.wait_for("Type the prompt, and end it with Enter and Ctrl-D:\n")
        terminal.type(f"To be\n{CTRL_D}")
        assert '{"prompt": "To be\\n", "text": ' in terminal.wait_for('"text": ')
        assert terminal.status() == 0


def test_an_empty_prompt_is_refused(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tinymix_4bit), ""]) == 1
    assert "prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("error", [StoreReadError("A disk failed.", "Check it."), KeyboardInterrupt()], ids=repr)
def test_an_error_begins_a_line(
    error: BaseException, tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Behind text that was cut in the middle."""
    put, count = TimedStreamer.put, iter(range(100))

    def fail(streamer: TimedStreamer, value: torch.Tensor) -> None:
        put(streamer, value)
        if next(count) == 20:
            raise error

    monkeypatch.setattr(TimedStreamer, "put", fail)
    assert main(["generate", str(tinymix_4bit), PROMPT, "--temperature", "0"]) in (1, 130)
    said = capfd.readouterr()
    assert said.out.strip()
    assert said.out.endswith("\n")
    assert said.err.startswith("moetier: ")


def test_a_daemon_that_is_away_is_a_sentence() -> None:
    reads = DaemonReads("/run/d", 0, 1, False, 1, "No daemon runs in /run/d (Connection refused).", 1 << 30)
    assert reads.text().endswith(
        "; it can't be reached: No daemon runs in /run/d (Connection refused); 1 GiB were read from the local store "
        "instead"
    )


def test_one_token_is_no_tokens(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tinymix_4bit), PROMPT, "--max-new-tokens", "1"]) == 0
    assert "decode    1 token\n" in capsys.readouterr().err


def test_rates() -> None:
    timing = Timing(prompt_tokens=10, new_tokens=5, first_token=2.0, total=4.0)
    assert (timing.prefill_rate, timing.decode_rate) == (5.0, 2.0)
    assert Timing(prompt_tokens=10, new_tokens=1, first_token=2.0, total=2.0).decode_rate == 0.0
