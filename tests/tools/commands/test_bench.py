"""``moetier bench`` runs for real, on tiny sizes, and writes what docs/benchmarks.md says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from cgroups import memory_limit
from places import DOCS
from prepared import as_python
from stores import make_plan

from moetier.tiers.errors import BudgetError, ConfigError
from moetier.tiers.store.reader import ShardStore
from moetier.tools.bench import child as bench_child
from moetier.tools.bench import convert as bench_convert
from moetier.tools.bench import kernels as bench_kernels
from moetier.tools.bench import model as bench_model
from moetier.tools.bench import sandbox
from moetier.tools.bench.model import TABLE, Floor, RunLimits
from moetier.tools.main import main
from moetier.tools.rates import products as compute_rate

PAGE = DOCS / "benchmarks.md"
SPREAD = {"median", "min", "max", "runs"}
MIB = 1 << 20
# what is wished for is no miss; and how a token attends does not depend on how many come with it
RECORD = 225280  # bytes of a record of tinymix_4bit
UNAIDED = {"options": {"speculate": "off", "exact": True}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(sys, "executable", str(as_python(tmp_path_factory.mktemp("bin"))))
    monkeypatch.setattr(bench_model, "DISK_SECONDS", 0.1)
    monkeypatch.setattr(bench_model, "KERNEL_SECONDS", 0.05)
    monkeypatch.setattr(bench_model, "UNCACHED_BYTES", 16 * MIB)
    monkeypatch.setattr(compute_rate, "UNCACHED_BYTES", 16 * MIB)
    monkeypatch.setattr(bench_convert, "DISK_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "DROP_CACHES", Path("/nonexistent/drop"))  # others use this machine's, too


def bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    assert main(["bench", *words, "--json", str(tmp_path / "found.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def test_the_columns_of_decode_are_explained() -> None:
    page = PAGE.with_name("choosing.md").read_text().partition("## Reading a measurement")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)[1:]
    assert [name for cell in cells for name in cell.split(", ")] == [*TABLE]


def documented() -> dict[str, list[dict[str, Any]]]:
    """By command, the two examples of the docs: what is written once, and one of the results."""
    text = PAGE.read_text().partition("### What `--json` writes")[2].partition("\n## ")[0]
    found = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    common, *rest = found
    disk, kernels, model, convert = zip(rest[::2], rest[1::2], strict=True)
    pairs = {"disk": disk, "kernels": kernels, "decode": model, "prefill": model, "convert": convert}
    return {name: [common | once, result] for name, (once, result) in pairs.items()}


def check_shape(found: Any, said: Any, where: str) -> None:
    if said == "MANY":
        assert found.keys() == SPREAD, where
        assert found["min"] <= found["median"] <= found["max"]
    elif isinstance(said, dict) and where.endswith(".versions"):
        assert found.keys() >= said.keys()
    elif isinstance(said, dict):
        assert found.keys() == said.keys(), where
        for name, value in said.items():
            check_shape(found[name], value, f"{where}.{name}")
    elif isinstance(said, float):
        assert isinstance(found, float | int), where
    elif not isinstance(said, list) and found is not None:
        assert type(found) is type(said), where


def check(found: dict[str, Any]) -> list[dict[str, Any]]:
    """That it has what the docs say; returns the results, whose ratios are positive numbers."""
    common, one = documented()[found["command"]]
    check_shape(found, common, found["command"])
    for result in found["results"]:
        check_shape(result, one, "result")
        assert result["ratio"] > 0
    results: list[dict[str, Any]] = found["results"]
    return results


def test_disk(tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(tmp_path, "disk", str(tinymix_4bit), "--seconds", "0.05", "--rounds", "2")
    one, several = check(found)
    with ShardStore.open(tinymix_4bit) as store:
        assert one["record_bytes"] == store.layout(0).slot_bytes
    assert (one["depth"], several["depth"]) == (1, 4)
    assert len(one["bytes_per_s"]["runs"]) == 2
    assert one["ratio"] == pytest.approx(one["bytes_per_s"]["median"] / one["bound_bytes_per_s"]["median"])
    assert found["by"] == ("fio" if shutil.which("fio") else "preadv")
    said = capsys.readouterr().out
    assert all(word in said for word in ("machine", "GB/s", "ratio", "page cache", found["machine"]["cpu"]))


def test_without_fio_a_loop_takes_its_place_and_that_is_reported(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = bench(tmp_path, "disk", str(tinymix_4bit), "--seconds", "0.05", "--rounds", "1")
    check(found)
    assert found["by"] == "preadv"
    assert "fio" not in found["machine"]["versions"]
    assert any("fio is not installed" in note for note in found["notes"])


def test_what_fio_says_when_it_fails_is_reported(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fio").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo fio-3.0\necho no such engine >&2; exit 1\n'
    )
    (tmp_path / "fio").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["bench", "disk", str(tinymix_4bit), "--seconds", "0.05", "--rounds", "1"]) == 1
    assert "no such engine" in capsys.readouterr().err


def test_kernels_say_first_how_long_it_will_take(
    tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []

    def alternate(*_: Any) -> Any:
        said.append(capsys.readouterr())
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_kernels, "alternate", alternate)
    assert main(["bench", "kernels", str(tinymix_4bit), "--rows", "1", "--rounds", "100", "--seconds", "1"]) == 130
    ((out, err),) = said
    assert out == ""
    minutes = re.fullmatch(r"bench kernels: this takes at least (\d+) min \d+ s\n", err)
    assert minutes is not None, err
    assert int(minutes[1]) >= 3, "two projections, a second each, a hundred times"


def test_kernels_of_a_directory(tinymix_4bit: Path, tmp_path: Path) -> None:
    options = ["--rows", "1", "--rows", "20", "--seconds", "0.01", "--rounds", "2", "--threads", "1"]
    found = bench(tmp_path, "kernels", str(tinymix_4bit), *options)
    results = check(found)
    assert [(r["projection"], r["rows"]) for r in results] == [
        ("gate_up_proj", 1), ("gate_up_proj", 20), ("down_proj", 1), ("down_proj", 20),
    ]  # fmt: skip
    assert found["machine"]["threads"] == 1
    for r in results:
        # half a byte a weight and a pair of bf16 for 64 of them
        assert r["bytes"] == r["outputs"] * r["inputs"] * (1 / 2 + 4 / 64)
        assert r["bytes_per_s"]["runs"] == pytest.approx([r["bytes"] / seconds for seconds in r["seconds"]["runs"]])
        assert r["flops_per_s"] == pytest.approx(2 * r["rows"] * r["outputs"] * r["inputs"] / r["seconds"]["median"])


def test_kernels_of_usual_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "EXPERTS", {"small": (128, 64)})
    options = ["--bits", "4", "--bits", "2", "--rows", "1", "--seconds", "0.01", "--rounds", "1"]
    found = [(r["records"], r["projection"], r["bits"]) for r in check(bench(tmp_path, "kernels", *options))]
    assert found == [
        ("small, 4 bits", "gate_up_proj", 4), ("small, 4 bits", "down_proj", 4),
        ("small, 2 bits", "gate_up_proj", 2), ("small, 2 bits", "down_proj", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_kernels_have_layouts_of_all_widths(bits: Any) -> None:
    layout = bench_kernels.expert_layout(2048, 768, bits)
    assert {p.bits for p in layout.projections} == {bits}
    assert layout.weights == 3 * 2048 * 768


def test_decode(tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the experts, and all of them within a limit; two sequences."""
    with memory_limit(MIB):  # skips where there are no control groups
        pass
    (tmp_path / "ids.json").write_text(json.dumps([*range(5, 50)]))
    options = ["--tokens", "3", "--warm", "2", "--prompt", "4", "--batch", "2", "--rounds", "1", "--threads", "1"]
    options += ["--ram", "7MiB", "--limit", "900MiB", "--tokens-file", str(tmp_path / "ids.json")]
    found = bench(tmp_path, "decode", str(tinymix_4bit), *options)
    (result,) = check(found)
    assert found["tokens"] == {
        "source": str(tmp_path / "ids.json"), "sequences": 2, "before": 6, "steps": 3, "step_tokens": 2,
    }  # fmt: skip
    assert found["machine"]["threads"] == 1
    assert result["slots"] == 7 * MIB // RECORD < result["permitted_slots"] == result["records"] == 64
    bound = result["bound_s"]
    need, rates = (
        result["need_bytes"],
        {name: rate["median"] for name, rate in found["rates"].items() if "bytes" in name},
    )
    assert bound["disk"] == pytest.approx(need["missing"] / rates["disk_bytes_per_s"])
    kernels = need["experts"] / rates["experts_bytes_per_s"] + need["trunk"] / rates["trunk_bytes_per_s"]
    assert bound["kernels"] == pytest.approx(kernels)
    assert result["bound_tokens_per_s"] == pytest.approx(2 / max(bound["disk"], kernels))
    assert result["ratio"] == pytest.approx(result["tokens_per_s"]["median"] / result["bound_tokens_per_s"])
    assert 100 * MIB < result["peak_bytes"] < 900 * MIB
    assert 100 * MIB < found["idle_bytes"] < 900 * MIB
    assert 100 * MIB < result["group_peak_bytes"] <= 900 * MIB
    assert found["page_cache"] == "dropped only for the model's files: to drop all of it is not permitted"
    said, progress = capsys.readouterr()
    assert progress.startswith("bench: the memory of an idle process")
    assert "bench: round 1 of 1: the model --limit 900 MiB --ram 7MiB\n" in progress
    assert all(word in said for word in ("tokens/s", "bound", "in its group", "900 MiB", "7MiB"))
    assert said.splitlines()[-1].startswith("--limit 900 MiB --ram 7MiB: You reach ")


def test_what_decode_has_measured_is_printed_if_it_is_stopped(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second round, by SIGTERM as by Ctrl-C."""

    def say(line: str) -> None:
        print(line, file=sys.stderr)
        if line.startswith("round 2 of 3"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(bench_model, "_say", say)
    before = signal.getsignal(signal.SIGTERM)
    options = ["--tokens", "2", "--warm", "1", "--prompt", "4", "--json", str(tmp_path / "found.json")]
    assert main(["bench", "decode", str(tinymix_4bit), *options]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    said, progress = capsys.readouterr()
    assert re.search(r"^3 rounds take about \d+.*; Ctrl-C prints", progress, re.MULTILINE)
    assert "rounds   3, interrupted in round 2: median (least to most)\n" in said
    assert said.splitlines()[-1].startswith("You reach ")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("interrupted_in") == 2
    (result,) = check(found)
    assert len(result["tokens_per_s"]["runs"]) == 1


def test_more_tokens_than_the_context_has_are_not_measured(tinymix_4bit: Path) -> None:
    work = {"directory": str(tinymix_4bit), "ids": [[5] * 2049], "pieces": [2049], "measured": 1}
    with pytest.raises(ConfigError, match=r"needs 2,049 tokens, but the model's maximum context is 2,048"):
        bench_child.model(work)


@pytest.mark.slow
def test_prefill(tinymix_4bit: Path, tmp_path: Path) -> None:
    found = bench(tmp_path, "prefill", str(tinymix_4bit), "--tokens", "24", "--rounds", "1")
    (result,) = check(found)
    assert found["tokens"]["source"] == "random, seed 0"
    assert (found["tokens"]["before"], found["tokens"]["steps"], found["tokens"]["step_tokens"]) == (8, 1, 24)
    assert result["tokens_per_s"]["median"] == pytest.approx(24 / result["step_s"]["median"])
    assert (result["limit_bytes"], result["group_peak_bytes"]) == (None, None)
    assert result["slots"] == result["permitted_slots"] == 64


def test_convert(tinymix: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    found = bench(tmp_path, "convert", str(tinymix), "--rounds", "1", "--into", str(into))
    hqq, fast = check(found)
    assert (hqq["way"], fast["way"]) == ("hqq", "fast")
    assert hqq["weights"] == 64 * 3 * 256 * 512
    assert hqq["weights_per_s"]["median"] == pytest.approx(hqq["weights"] / hqq["seconds"]["median"])
    rate = found["rates"]["disk_bytes_per_s"]["median"]
    assert hqq["bound_weights_per_s"] == pytest.approx(rate * hqq["weights"] / hqq["source_bytes"])
    assert fast["fast_times_as_fast"] == 1
    assert not any(into.iterdir())


def test_why_a_conversion_fails_is_reported(tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of moetier convert."""
    source = Path(shutil.copytree(tinymix, tmp_path / "source"))
    (source / "config.json").unlink()
    assert main(["bench", "convert", str(source)]) == 1
    cause, fix = capsys.readouterr().err.splitlines()[-2:]
    assert cause.startswith(f"moetier: {source} ")
    assert "config.json" in cause
    assert fix.startswith("  ")


def test_a_child_feeds_what_it_is_told_and_tells_the_experts(tinymix_4bit: Path) -> None:
    """One piece or many: the same experts, all of them among the block's, and of each piece its own."""
    work = {"directory": str(tinymix_4bit), "ids": [[5, 6, 7, 8, 9, 10]], "record": True} | UNAIDED
    work["ram"] = 63 * RECORD  # without room for all of them, none is read that no token needs
    whole = bench_child.model(work | {"pieces": [6], "measured": 1})
    parts = bench_child.model(work | {"pieces": [3, 1, 1, 1], "measured": 3})
    assert len(parts["seconds"]) == 3
    assert [len(step) for step in parts["used"]] == [8] * 4
    assert all(len(experts) == 2 for step in parts["used"][1:] for experts in step)
    for block in range(8):
        assert whole["used"][0][block] == sorted({e for step in parts["used"] for e in step[block]})
    # the last three steps want two experts of each block, of which some were there already
    assert parts["hits"] + parts["misses"] == 3 * 8 * 2
    assert whole["misses"] == sum(map(len, whole["used"][0]))
    assert whole["bytes_read"] == whole["misses"] * RECORD


def test_a_trunk_without_its_embeddings(tinymix: Path, tinymix_4bit: Path) -> None:
    import torch

    found = bench_child.model({"directory": str(tinymix_4bit), "ids": [[5]], "pieces": [1], "measured": 1})
    config = json.loads((tinymix / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    stored = sum(path.stat().st_size for path in tinymix_4bit.glob("trunk-*.safetensors"))
    embeddings = config["vocab_size"] * config["hidden_size"] * torch.bfloat16.itemsize
    assert found["trunk_bytes"] == pytest.approx(stored - embeddings, abs=40_000)  # a header, and rotary buffers


def test_what_a_limit_permits() -> None:
    """What it leaves beside trunk, context and an idle process; without one there is nothing to compute."""
    plan = make_plan()
    size = plan.layout(0).slot_bytes
    floor = Floor(plan, [], trunk_bytes=3_000, kv_bytes=200, idle_bytes=10_000)
    assert floor.slots(RunLimits(None, "1GiB"), {"records": 5}) == {"records": 5}
    assert floor.slots(RunLimits(13_200 + 4 * size, None), {"records": 3}) == {"records": 4}
    floor.check([RunLimits(None, None), RunLimits(13_200 + 2 * size, None)])  # a token's experts of a block
    with pytest.raises(BudgetError, match=f"--limit of {13_200 + 2 * size} bytes"):
        floor.check([RunLimits(13_199 + 2 * size, None)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["disk", "{here}"], ["experts.zarr"]),
        (["decode", "{store}", "--json", "{here}/no/x.json"], ["no folder"]),
        (["decode", "{store}", "--tokens-file", "{here}/no.json"], ["no.json", "token ids"]),
        (["convert", "{here}"], ["no safetensors"]),
        (["decode", "{store}", "--prompt-file", "{here}/no.txt"], ["no.txt can't be tokenised", "No such file"]),
        (["decode", "{store}", "--prompt-file", "{here}/empty.txt"], ["empty.txt gives no tokens"]),
    ],
)
def test_what_cannot_be_measured_is_reported(
    tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert main(["bench", *(word.format(here=tmp_path, store=tinymix_4bit) for word in words)]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in said), message
    assert "Traceback" not in message
