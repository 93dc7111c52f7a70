"""Commands that are given a checkpoint: they use it as it is."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from checkpoints import ordinary_model
from daemons import running_daemon
from native_checkpoints import save_native
from transformers import AutoTokenizer

import moetier
from moetier.runtime.model.load import load
from moetier.runtime.stores.registry import read_manifest
from moetier.tiers.extents.table import NAME, cached
from moetier.tools.commands.plan import text
from moetier.tools.main import main
from moetier.tools.plan.forecast import plan

PROMPT = "def read_lines(path):"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["generate", *arguments, "--json", "--max-new-tokens", "12", "--temperature", "0"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_generate_gives_the_text_of_transformers_and_writes_nothing(
    tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing without a link, and one table of less than a hundredth with it."""
    tokenizer = AutoTokenizer.from_pretrained(tinymix)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = ordinary_model(tinymix).generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    before = sums(tinymix)
    found = generated(capsys, str(tinymix), PROMPT, "--exact", "--ram", "8MiB")
    assert found["text"] == expected
    assert sums(tinymix) == before
    assert main(["link", str(tinymix), "--cache"]) == 0
    assert sums(tinymix) == before
    assert cached(tinymix).stat().st_size < 0.01 * sum(path.stat().st_size for path in tinymix.glob("*.safetensors"))
    assert generated(capsys, str(tinymix), PROMPT, "--exact", "--ram", "8MiB")["text"] == expected


def test_a_daemon_serves_it_by_its_digest(tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a client that has it linked, too; the daemon itself does not import torch."""
    with running_daemon(tinymix, ram="8MiB", folder=tmp_path / "daemon") as daemon:
        assert "without a check" in daemon.log
        maps = Path(f"/proc/{daemon.pid}/maps").read_text()
        assert "libtorch" not in maps
        alone = generated(capsys, str(tinymix), PROMPT, "--exact", "--ram", "8MiB", "--daemon", "none")
        served = generated(capsys, str(tinymix), PROMPT, "--exact", "--daemon", str(daemon.folder))
        assert served["text"] == alone["text"]
        assert "daemon" in served["tiers"]
        assert main(["link", str(tinymix), "--cache"]) == 0
        assert (
            generated(capsys, str(tinymix), PROMPT, "--exact", "--daemon", str(daemon.folder))["text"] == alone["text"]
        )
    with running_daemon(tinymix, ram="8MiB", folder=tmp_path / "second") as daemon:
        assert "without a check" not in daemon.log
        assert (
            generated(capsys, str(tinymix), PROMPT, "--exact", "--daemon", str(daemon.folder))["text"] == alone["text"]
        )


def test_a_daemon_says_what_is_wrong_with_it(tinymix: Path, tmp_path: Path) -> None:
    folder = Path(copytree(tinymix, tmp_path / "cut"))
    victim = folder / "model-00002-of-00004.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with (
        pytest.raises(AssertionError, match=f"{victim.name} is truncated"),
        running_daemon(folder, folder=tmp_path / "d"),
    ):
        pass


@pytest.mark.usefixtures("short_probes")
def test_a_plan_offers_it_as_it_is(tinymix: Path) -> None:
    found = plan(tinymix, bits=[16], trunk_bits=[16], disk=1.0)
    (choice,) = found["choices"]
    assert choice["as_it_is"]
    assert choice["convert_s"] is None
    assert found["recommended"]["convert"] is None
    assert found["recommended"]["chat"] == f"moetier chat {shlex.quote(str(tinymix))}"
    assert f"moetier chat {shlex.quote(str(tinymix))}" in text(found)
    found = plan(tinymix, bits=[16, 4], trunk_bits=[16], disk=1.0)
    assert [each["as_it_is"] for each in found["choices"]] == [each["bits"] == 16 for each in found["choices"]]
    assert "With experts of 16 bits no conversion is needed: the files are used as downloaded." in text(found)


@pytest.mark.slow
@pytest.mark.usefixtures("short_probes")
def test_a_plan_for_weights_of_4_bits_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No other width is recommended, and nothing is converted. What it recommends works."""
    folder, _ = save_native(tmp_path, "gpt-oss")
    before = sums(folder)
    found = plan(folder, disk=1.0)
    best = found["recommended"]
    assert (best["bits"], best["trunk_bits"], best["native"], best["convert"]) == (4, 16, True, None)
    (choice,) = [each for each in found["choices"] if each["as_it_is"]]
    assert choice["native"]
    assert choice["convert_s"] is None
    assert choice["experts_bytes"] < 1.5 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert "No conversion is needed: the files of the checkpoint are used as downloaded." in text(found)
    assert main(["inspect", str(folder)]) == 0
    assert "4 bits (e2m1), groups of 32, e8m0 scales" in capsys.readouterr().out
    assert main(["link", str(folder), "--cache"]) == 0  # else a process of the daemon makes the table
    with running_daemon(folder, ram="8MiB", folder=tmp_path / "daemon") as daemon:
        ids = torch.arange(2, 20)[None]
        model, _ = load(folder, exact=True, daemon="none")
        served, _ = load(folder, exact=True, daemon=str(daemon.folder))
        with model.tiers, served.tiers:
            assert torch.equal(model(input_ids=ids).logits, served(input_ids=ids).logits)
    assert sums(folder) == before


def test_a_changed_file_is_one_line_of_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though experts of all blocks are in it."""
    folder, _ = save_native(tmp_path, "mxfp4")
    (file,) = folder.glob("*.safetensors")
    assert main(["link", str(folder)]) == 0
    assert f"{read_manifest(folder).record_count} experts in 1 file, " in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 0
    assert "the other bytes of 1 file, " in capsys.readouterr().out
    os.utime(file, ns=(0, 0))
    cause = f"{file} was changed or replaced: its modification time differs."
    assert main(["verify", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["bad"] == [
        {"block": None, "expert": None, "file": str(file), "cause": cause}
    ]
    assert main(["verify", str(folder)]) == 1
    said = capsys.readouterr().out
    assert said.endswith("1 bad\n")
    assert said.count(cause) == 1


def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An address is named as it was given, and nothing is fetched from it."""
    neither = "is neither the folder of a checkpoint in safetensors nor a GGUF file."
    for source, said in (
        (str(tmp_path), neither),
        (str(tinymix_4bit), "is a model directory: its experts have checksums."),
        (f"file://{tinymix_4bit}", neither),
        ("no-such-model", neither),
    ):
        assert main(["link", source]) == 1
        assert f"{source} {said}" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_the_table_lies_beside_the_checkpoint(
    tinymix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(copytree(tinymix, tmp_path / "tinymix"))
    assert main(["link", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{folder / NAME}: {read_manifest(folder).record_count} experts in 4 files"
    )
    model, _ = moetier.load(folder)
    model.tiers.close()
