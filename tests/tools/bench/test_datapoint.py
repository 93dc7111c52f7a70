"""moetier bench datapoint: a model on this machine, as a block of Markdown, within a given time."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from prepared import as_python
from stores import make_plan

from moetier.tiers.errors import ConfigError
from moetier.tools.bench import datapoint, model, sandbox
from moetier.tools.bench.datapoint import beginning, block
from moetier.tools.bench.model import Work
from moetier.tools.main import main
from moetier.tools.rates.hardware import Machine

RESULT: dict[str, Any] = {
    "tokens_per_s": {"runs": [10.0, 20.0, 12.0]},
    "bound_tokens_per_s": 24.0,
    "bound_by": "disk",
    "ratio": 0.5,
    "hit_ratio": 0.75,
    "bytes_read_per_token": 1 << 20,
    "peak_bytes": 1 << 30,
    "slots": 16,
    "records": 64,
    "rounds": 3,
    "page_cache": "dropped",
    "notes": ["disk     1.00 GB/s, by preadv", "kernels  5.00 GB/s | and more"],
    "source": "random",
}


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines}


def test_a_block_has_rates_beside_bounds_and_what_they_depend_on() -> None:
    manifest, machine = make_plan(), Machine.here(threads=2)
    results = {"decoding": RESULT, "a prompt": "It took too long."}
    found = rows(block(machine, manifest, "4GiB", results, ["busy     other processes used 2.0 of 2 CPUs"]))
    assert found["busy"] == ["other processes used 2.0 of 2 CPUs"]
    assert found["decoding"] == ["12.00 (10.00 to 20.00)", "24.00", "disk", "0.50", "75.0%", "1 MiB", "1 GiB"]
    assert found["a prompt"][0] == "It took too long."
    assert found["kernels"] == ["5.00 GB/s / and more"]
    assert found["settings"][0].startswith("--ram 4GiB: 16 of 64 experts in memory; 3 rounds")
    assert machine.cpu in found["machine"][0]
    assert manifest.model in found["model"][0]


def test_as_much_is_measured_as_there_was_time_for() -> None:
    work = Work([[*range(30)]], "random", [10, *[1] * 20], measured=12)
    assert beginning(work, 21, 60.0) == work
    less = beginning(work, 7, 60.0)
    assert (less.ids, less.pieces, less.measured) == ([[*range(16)]], [10, *[1] * 6], 4)
    assert beginning(work, 2, 60.0).measured == 1
    with pytest.raises(ConfigError, match="The first 10 tokens took more than 60 s"):
        beginning(work, 1, 59.6)


def test_a_datapoint_of_a_model(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "DROP_CACHES", Path("/nonexistent/drop"))  # others use this machine's, too
    monkeypatch.setattr(sys, "executable", str(as_python(tmp_path)))
    monkeypatch.setattr(model, "DISK_SECONDS", 0.05)
    monkeypatch.setattr(model, "KERNEL_SECONDS", 0.05)
    monkeypatch.setattr(model, "UNCACHED_BYTES", 16 << 20)
    monkeypatch.setattr(datapoint, "DECODED", [16, *[1] * (datapoint.WARM + 2)])
    monkeypatch.setattr(datapoint, "ROUNDS", 1)
    assert main(["bench", "datapoint", str(tinymix_4bit), "--ram", "3520KiB", "--threads", "1"]) == 0
    found = rows(capsys.readouterr().out)
    assert "16 of 64 experts in memory; 1 rounds" in found["settings"][0]
    for part in ("decoding", "a prompt of 128 tokens"):
        rate, bound, by, *_ = found[part]
        assert float(rate) > 0
        assert float(bound) > 0
        assert by in ("disk", "kernels")
    assert re.search("GB/s, random records of 220 KiB", found["disk"][0])


def test_without_the_time_for_two_pieces_nothing_is_measured(
    tinymix_4bit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "DROP_CACHES", Path("/nonexistent/drop"))  # others use this machine's, too
    monkeypatch.setattr(sys, "executable", str(as_python(tmp_path)))
    monkeypatch.setattr(datapoint, "SECONDS", 0.0)
    assert main(["bench", "datapoint", str(tinymix_4bit), "--threads", "1"]) == 1
    said, message = capsys.readouterr()
    assert said == ""
    assert re.search(r"The first 16 tokens took more than|did not end within 1 s", message), message
    assert "bench decode" in message
