from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
from places import ASSETS
from stores import NASTY

from moetier.runtime.trace.trace import Trace
from moetier.tiers.errors import ConfigError
from moetier.tools.cli.parser import CommandParser
from moetier.tools.commands import replay
from moetier.tools.traces.simulation import SIMULATED

TRACES = ASSETS / "traces"
MIXTRAL = str(TRACES / "mixtral_8x7b_instruct_h39s.npz")
GPT_OSS = str(TRACES / "gptoss_120b_top2_bigmoeonedge.npz")


def run(*words: str) -> None:
    parser = CommandParser()
    replay.add_arguments(parser)
    replay.run(parser.parse_args([*words]))


def test_it_offers_every_policy_of_the_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--policy", ",".join(SIMULATED)]):
        run(GPT_OSS, "--slots", "4", "--json", *words)
        (report,) = json.loads(capsys.readouterr().out)["traces"]
        assert tuple(result["policy"] for result in report["results"]) == SIMULATED
    parser = ArgumentParser()
    replay.add_arguments(parser)
    assert all(name in parser.format_help() for name in SIMULATED)


def test_hit_ratios_bytes_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--slots", "3,4-4", "--policy", "lru,belady", "--record", "10MB", "--disk", "2", "--compute", "5"]
    run(MIXTRAL, *words, "--json")
    (report,) = json.loads(capsys.readouterr().out)["traces"]
    assert (report["tokens"], report["blocks"], report["experts"], report["top_k"]) == (773, 32, 8, 2)
    assert report["recall"] == []
    found = {(result["policy"], result["slots"]): result for result in report["results"]}
    assert found.keys() == {(policy, slots) for policy in ("lru", "belady") for slots in (3, 4)}
    lru = found["lru", 4]
    assert lru["hit_ratio"] == pytest.approx(0.574, abs=0.001)
    assert lru["loads_per_token"] == pytest.approx(64 * (1 - lru["hit_ratio"]))
    assert lru["bytes_per_token"] == pytest.approx(lru["loads_per_token"] * 10_000_000)
    assert lru["tokens_per_s"] == pytest.approx(1 / (0.005 + lru["bytes_per_token"] / 2e9))
    assert found["belady", 4]["tokens_per_s"] > lru["tokens_per_s"]

    run(MIXTRAL, "--slots", "4", *words[2:])
    text = capsys.readouterr().out
    assert "773 tokens (0 of prompts) in 1 sequences; 32 blocks of 8 experts, top-2" in text
    assert "4      0.574   0.720" in text
    assert "tokens per second, without overlap" in text


def test_a_device_tier_and_a_link(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--slots", "8", "--policy", "lru", "--device-slots", "4", "--record", "1MiB", "--link", "10"]
    run(MIXTRAL, *words, "--json")
    ((result,),) = [report["results"] for report in json.loads(capsys.readouterr().out)["traces"]]
    assert result["device_hit_ratio"] == pytest.approx(0.574, abs=0.001)
    assert result["tokens_per_s"] == pytest.approx(1e10 / (result["copies_per_token"] * 2**20))


@pytest.mark.slow
def test_several_traces_and_slots_of_its_own_choice(capsys: pytest.CaptureFixture[str]) -> None:
    run(MIXTRAL, GPT_OSS, "--policy", "lru", "--json")
    reports = json.loads(capsys.readouterr().out)["traces"]
    assert [[result["slots"] for result in report["results"]] for report in reports] == [
        list(range(1, 9)),
        list(range(16, 129, 16)),
    ]
    assert reports[1]["prompt_tokens"] == 85
    assert all(result["prompt_loads"] > 0 for result in reports[1]["results"])


def test_no_more_are_cached_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--slots 99: .* have 8 experts"):
        run(MIXTRAL, "--slots", "4,99")


def test_recall_where_there_are_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = np.asarray([[[0, 1], [2, 3]]] * 4, np.int16)
    predictions = np.stack([experts, np.full_like(experts, -1)])
    predictions[1, :, 1] = [2, 5]  # half of them
    Trace(
        experts=experts, offsets=(0, 4), num_experts=(8, 8), lookaheads=(0, 1), predictions=predictions, model=NASTY
    ).save(tmp_path / "t.npz")
    run(str(tmp_path / "t.npz"), "--slots", "2", "--json")
    (report,) = json.loads(capsys.readouterr().out)["traces"]
    assert report["model"] == NASTY
    assert report["recall"] == [
        {"lookahead": 0, "gates": 1.0, "popularity": 1.0, "previous_token": 1.0},
        {"lookahead": 1, "gates": 0.5, "popularity": 1.0, "previous_token": 1.0},
    ]
    run(str(tmp_path / "t.npz"), "--slots", "2")
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 't.npz'}: x?[31m?]0;owned??y\n")
    assert "1           0.500       1.000           1.000" in said


def test_without_predictions_there_is_no_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In strict JSON."""
    predictions = np.asarray([[[[-1], [1]]], [[[-1], [-1]]]], np.int16)
    experts = np.asarray([[[0], [1]]], np.int16)
    trace = Trace(experts=experts, offsets=(0, 1), num_experts=(2, 2), lookaheads=(1, 2), predictions=predictions)
    trace.save(tmp_path / "t.npz")
    run(str(tmp_path / "t.npz"), "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (report,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["traces"]
    assert report["recall"] == [
        {"lookahead": 1, "gates": 1.0, "popularity": 1.0, "previous_token": None},
        {"lookahead": 2, "gates": None, "popularity": None, "previous_token": None},
    ]
    run(str(tmp_path / "t.npz"))
    assert "1           1.000       1.000               -" in capsys.readouterr().out


def test_a_trace_of_prompts_has_no_hit_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = np.asarray([[[0, 1]]] * 4, np.int16)
    Trace(experts=experts, offsets=(0, 4), num_experts=(8,), n_prefill=(4,)).save(tmp_path / "t.npz")
    run(str(tmp_path / "t.npz"))
    text = capsys.readouterr().out
    assert "Nothing was decoded" in text
    assert "hit ratio" not in text


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--disk", "2"], "size of an expert"),
        (["--record", "50%", "--disk", "2"], "can't be '50%'"),
        (["--record", "1MB", "--link", "2"], "device tier"),
    ],
)
def test_options_that_do_not_fit_together(words: list[str], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        run(MIXTRAL, *words)


def test_what_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="not a trace"):
        run(str(tmp_path / "t.npz"))


@pytest.mark.parametrize(
    "words",
    [["--slots", "0"], ["--slots", "4-2"], ["--slots", "a"], ["--slots", ""], ["--policy", "fifo"], ["--disk", "0"]],
)
def test_options_that_mean_nothing(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(MIXTRAL, *words)
    assert stop.value.code == 2


def test_the_command() -> None:
    command = [sys.executable, "-m", "moetier.tools.main", "replay", MIXTRAL, "--slots", "4", "--policy", "lru"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0.574" in result.stdout
