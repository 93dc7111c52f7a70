"""What a plan says of sizes and tiers is what conversion and loading come to; of what can't work it says what can."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from cgroups import memory_limit
from checkpoints import save_checkpoint
from faults import mounted
from hubs import MODEL, READ_SETTINGS, serve_hub
from prepared import Prepared
from quantised_checkpoints import quantise_mxfp4
from stores import NASTY

import moetier
from moetier.runtime.checkpoint.safetensors_folder import INDEX
from moetier.runtime.config import TierConfig
from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.machine.memory import PROCESS_BYTES, Available
from moetier.tiers.errors import BudgetError, ConfigError, MoetierError, StoreFormatError, TargetError
from moetier.tiers.text import format_bytes
from moetier.tools.commands.plan import MIN_FOR_CARDS, SHOWN_CARDS, text
from moetier.tools.main import main
from moetier.tools.plan import cold
from moetier.tools.plan import speeds as plan_speeds
from moetier.tools.plan.choices import open_choices
from moetier.tools.plan.estimate import estimate
from moetier.tools.plan.fit import MachineResources, fit_of
from moetier.tools.plan.forecast import plan
from moetier.tools.plan.speeds import DiskRate, Speeds, probe_bytes
from moetier.tools.rates.reads import RandomReads

pytestmark = pytest.mark.usefixtures("short_probes")

GB_PER_S = 1.0


def choice_of(found: dict[str, Any], bits: int, trunk_bits: int) -> dict[str, Any]:
    return next(c for c in found["choices"] if (c["bits"], c["trunk_bits"]) == (bits, trunk_bits))


def test_sizes_are_those_of_its_conversion(index_only: Path, tinymix_4bit: Path) -> None:
    found = plan(index_only, bits=[4], disk=GB_PER_S)
    choice, there = choice_of(found, 4, 16), plan(tinymix_4bit, disk=GB_PER_S)
    (converted,) = there["choices"]
    names = ("bits", "trunk_bits", "disk_bytes", "experts_bytes", "trunk_bytes", "slots", "hit_ratio", "all_resident")
    assert [choice[name] for name in names] == [converted[name] for name in names]
    files = sum(path.stat().st_size for path in tinymix_4bit.rglob("*") if path.is_file())
    assert choice["disk_bytes"] == pytest.approx(files, rel=0.03)  # the tokenizer and other small files are not in it
    assert (found["converted"], there["converted"]) == (False, True)
    assert found["source_bytes"] == json.loads((index_only / INDEX).read_text())["metadata"]["total_size"]
    assert (there["recommended"]["pull"], there["recommended"]["convert"]) == (None, None)


@pytest.mark.parametrize("ram", ["3MiB", "25%"])
def test_tiers_are_those_that_it_is_loaded_with(tinymix_4bit: Path, ram: str) -> None:
    (choice,) = plan(tinymix_4bit, ram=ram, context=512, disk=GB_PER_S)["choices"]
    model, _ = moetier.load(tinymix_4bit, ram=ram, context=512, daemon=None)
    with model.tiers:
        assert model.tiers.host.layout.slots == choice["slots"]
        assert model.tiers.host.layout.nbytes == choice["memory"]["experts_bytes"]


def test_memory_of_another_machine(tinymix_4bit: Path) -> None:
    there = plan(tinymix_4bit, memory="900TiB", ram="800TiB", context=512, disk=GB_PER_S)
    assert there["machine"]["memory_bytes"] == (900 << 40) - PROCESS_BYTES
    assert "of memory free (--memory 900TiB), no GPU" in text(there)
    assert "--memory" not in there["recommended"]["chat"]
    assert "GPU" not in text(there).replace("no GPU", ""), "no card is estimated for so small a model"
    with pytest.raises(BudgetError, match="--memory 255MiB leaves 5 MiB"):
        plan(tinymix_4bit, memory="255MiB", context=512, disk=GB_PER_S)
    with pytest.raises(ConfigError, match="is not an amount of memory"):
        plan(tinymix_4bit, memory="much", disk=GB_PER_S)


def test_the_disk_of_another_machine_is_not_this_ones(
    index_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its room is not known, unless its folder is given."""
    with mounted("tmpfs", tmp_path / "disk", "size=20m") as disk:
        monkeypatch.chdir(disk)
        try:
            here = plan(index_only, trunk_bits=[4], disk=GB_PER_S)
            there = plan(index_only, trunk_bits=[4], disk=GB_PER_S, memory="900TiB")
            given = plan(index_only, trunk_bits=[4], disk=GB_PER_S, memory="900TiB", into=disk)
            measured = text(plan(index_only, bits=[4], trunk_bits=[4], memory="900TiB"))
        finally:
            monkeypatch.undo()
    works = [[choice["works"] for choice in found["choices"]] for found in (here, there, given)]
    assert works == [[False, False, True, True, True], [True] * 5, [False, False, True, True, True]]
    assert "\n8 bits or more can't be used: A model directory with --bits 8 --trunk-bits 4 takes " in text(here)
    assert "free, 1.00 GB/s (given)\n" in text(here)
    assert "\ndisk     1.00 GB/s (given)\n" in text(there)
    assert "can't be used" not in text(there)
    assert there["machine"]["disk_free_bytes"] is None
    assert "of this machine: --disk gives another's\n" in measured


def test_what_the_machine_permits_is_reported_beside_less(tinymix_4bit: Path) -> None:
    """With --ram, what would be without; unless that is no more."""
    found = plan(tinymix_4bit, ram="3MiB", context=512, disk=GB_PER_S)
    whole = plan(tinymix_4bit, context=512, disk=GB_PER_S)
    assert found["without_ram"]["slots"] == whole["choices"][0]["slots"] == 64
    assert re.search(
        r"^Without --ram, all 64 experts have room in memory: [\d.]+ tokens/s\.$", text(found), re.MULTILINE
    )
    assert whole["without_ram"] is None
    assert "Without --ram" not in text(whole)
    assert plan(tinymix_4bit, ram="800TiB", context=512, disk=GB_PER_S)["without_ram"] is None


def test_speeds_of_a_busy_machine_are_reported_to_be_too_low(tinymix_4bit: Path) -> None:
    found = plan(tinymix_4bit, disk=GB_PER_S)
    for others, said in (
        (0.0, "Speeds are those of this moment."),
        (1e3, "without them it may be twice as fast. Run it again then."),
    ):
        assert said in text(found | {"machine": found["machine"] | {"cpus_of_others": others}})


def test_for_people_it_is_a_table_of_100_columns(index_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(index_only), "--trunk-bits", "4", "--disk", "1.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("experts", "16 bits", "8 bits", "4 bits", "3 bits", "2 bits"))]
    assert len(table) == 6
    assert max(map(len, table)) <= 100
    assert lines[-3].endswith("tinymix-8bit --bits 8 --trunk-bits 4")
    assert lines[-2:] == ["moetier chat tinymix-8bit", "moetier serve tinymix-8bit --parallel 1"]


@pytest.mark.usefixtures("short_probes")
def test_a_cache_is_recommended_by_its_address(tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the name of its folder is, other words stay as they are."""
    monkeypatch.chdir(tinymix_4bit)
    start = {"address": "s3://bucket/m", "bytes_per_s": 5e6}
    start |= {"trunk_bytes": 10 << 20, "trunk_s": 2.0, "experts_bytes": 0, "experts_s": 0.0}
    monkeypatch.setattr(cold, "cold_start", lambda _: start)
    found = plan(".", ram="0.005GiB", disk=GB_PER_S, cache=[("store_cache", Path("my cache"))])
    words = shlex.split(found["recommended"]["chat"])
    assert words == ["moetier", "chat", "s3://bucket/m", "--store-cache", "my cache", "--ram", "0.005GiB"]
    assert found["source"] == "s3://bucket/m"
    assert "\ncold     s3://bucket/m, 5 MB/s: the trunk (10 MiB) in 2 s\n" in text(found), "experts are here"


def test_a_gpu_has_its_share_and_cards_are_named_for_a_large_model(tinymix_4bit: Path) -> None:
    found = plan(tinymix_4bit, disk=GB_PER_S)
    card = {"card": SHOWN_CARDS[0], "tokens_per_s_at_most": 40.0, "slots": 1_000}
    (choice,) = found["choices"]
    large = choice | {"disk_bytes": MIN_FOR_CARDS, "device_slots": 12, "cards": [card, card | {"card": "another"}]}
    lines = text(found | {"choices": [large]}).splitlines()
    assert "12 of them fit into the GPU's memory." in lines
    said = f"{SHOWN_CARDS[0]} 40, with 1,000 experts in its memory."
    assert f"On a GPU at most, in tokens/s, by data sheets and not measured: {said}" in lines


def test_a_size_without_its_unit_is_asked_about(index_only: Path) -> None:
    with pytest.raises(ConfigError, match="16 bytes") as caught:
        plan(index_only, memory="16")
    assert caught.value.fix == "Did you mean 16GiB?"


@pytest.mark.parametrize("parallel", [0, -1, 1.5, "2", True, None])
def test_a_plan_is_for_one_request_or_more(parallel: Any, index_only: Path) -> None:
    with pytest.raises(ConfigError, match="`parallel` is"):
        plan(index_only, parallel=parallel)


def test_keys_and_values_of_several_requests_are_counted(index_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(index_only), "--bits", "4", "--context", "256", "--disk", "1.5"]
    assert main([*words, "--parallel", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = "tinymix-4bit --context 256"
    assert lines[-2:] == [f"moetier chat {options}", f"moetier serve {options} --parallel 3"]
    one, three = (
        plan(index_only, bits=[4], context=256, parallel=parallel, disk=GB_PER_S)["choices"][0]["memory"]
        for parallel in (1, 3)
    )
    assert three["kv_cache_bytes"] == 3 * one["kv_cache_bytes"]
    kept = format_bytes(three["kv_cache_bytes"])
    assert any(
        line.startswith(f"context  256 tokens: {kept} of keys and values, shared by 3 requests; ") for line in lines
    )


def test_code_that_a_checkpoint_names_is_left_alone_and_said(index_only: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(index_only, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.X"}}
    (source / "config.json").write_text(json.dumps(config))
    assert plan(source, bits=[4], disk=GB_PER_S)["recommended"]["convert"].endswith("--ignore-code")


OF_HUB = """
import json, os, sys
from pathlib import Path
from moetier.tools.plan import speeds
from moetier.tools.commands.plan import text
from moetier.tools.plan.forecast import plan
speeds.KERNEL_SECONDS, speeds.UNCACHED_BYTES, speeds.QUANTISED_WEIGHTS = 0.0, 1 << 20, 1 << 16
asked = {"bits": [4], "trunk_bits": [8], "disk": 1.0, "context": 256, "ram": "1MiB"}
found = [plan(sys.argv[1], **asked), plan(sys.argv[1], into=Path(sys.argv[2]), **asked)]
print(json.dumps([each | {"last": text(each).splitlines()[-3:]} for each in found]))
"""


def test_of_a_hub_id_it_recommends_pull_and_looks_at_the_disk_of_pulled_models(
    scripts: Prepared, tmp_path: Path
) -> None:
    """Unless it is said where the model is to be."""
    source = save_checkpoint(tmp_path / "source")
    with (
        serve_hub({path.name: path.read_bytes() for path in source.iterdir()}, tmp_path / "hub") as hub,
        mounted("tmpfs", tmp_path / "data", "size=300m") as data,
    ):
        environment = hub.settings | {"XDG_DATA_HOME": str(data / "not" / "yet")}
        result = scripts.run(READ_SETTINGS + OF_HUB, MODEL, tmp_path, environment=environment)
        assert result.returncode == 0, result.stderr
        assert not list(data.iterdir())
    pulled, converted = json.loads(result.stdout)
    assert pulled["machine"]["disk_folder"] == str(data)
    assert 0 < pulled["machine"]["disk_free_bytes"] <= 300 << 20
    options = "--ram 1MiB --context 256"
    assert pulled["last"] == [
        f"moetier pull {MODEL} --bits 4 --trunk-bits 8",
        f"moetier chat {MODEL}:4bit-trunk8bit {options}",
        f"moetier serve {MODEL}:4bit-trunk8bit {options} --parallel 1",
    ]
    assert pulled["recommended"]["convert"] is None
    assert converted["machine"]["disk_folder"] == str(tmp_path)
    folder = tmp_path / f"{MODEL.rpartition('/')[2]}-4bit"
    assert converted["last"] == [
        f"moetier convert {MODEL} {folder} --bits 4 --trunk-bits 8",
        f"moetier chat {folder} {options}",
        f"moetier serve {folder} {options} --parallel 1",
    ]
    assert converted["recommended"]["pull"] is None


def test_weights_that_may_be_kept_are_reported_without_their_headers(index_only: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(index_only, tmp_path / "source"))
    assert "--bits native" not in text(plan(source, bits=[4], disk=GB_PER_S))
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (source / "config.json").write_text(json.dumps(config))
    said = text(plan(source, bits=[4], disk=GB_PER_S))
    assert "weights are quantised (mxfp4): convert and pull keep them with --bits native" in said
    config["quantization_config"] = {"bits": 4}  # convert takes the weights for what their types say
    (source / "config.json").write_text(json.dumps(config))
    assert "--bits native" not in text(plan(source, bits=[4], disk=GB_PER_S))


BAD = {  # choices that don't work, the smallest first -> what is said of them
    ("8 bits", "16 bits"): "8 bits or more",
    ("16 bits",): "16 bits",
    ("4 bits", "4 bits, native", "8 bits", "16 bits"): "4 bits or more",
    ("4 bits", "8 bits", "16 bits"): "4 bits and 8 bits and 16 bits",  # native ones have 4 bits, and work
    ("4 bits, native", "16 bits"): "4 bits, native and 16 bits",
}


def test_choices_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """The reason is that of the smallest of them."""
    source = save_checkpoint(tmp_path / "source", "gpt_oss", shards=1)
    quantise_mxfp4(source)
    found = plan(source, trunk_bits=[16], disk=GB_PER_S)
    names = [f"{each['bits']} bits" + (", native" if each["native"] else "") for each in found["choices"]]
    assert set(names) == {"16 bits", "8 bits", "4 bits", "4 bits, native", "3 bits", "2 bits"}
    for bad, said in BAD.items():
        works = [{"works": name not in bad, "problem": f"No room for {name}."} for name in names]
        choices = [each | state for each, state in zip(found["choices"], works, strict=True)]
        best = next(each for each in choices if each["works"])
        recommended = found["recommended"] | {key: best[key] for key in ("bits", "native")}
        lines = text(found | {"choices": choices, "recommended": recommended}).splitlines()
        assert [line for line in lines if "can't be used" in line] == [f"{said} can't be used: No room for {bad[0]}."]


def test_a_default_context_is_no_longer_than_the_models(index_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(index_only, bits=[4], disk=GB_PER_S)
    assert found["context"] == json.loads((index_only / "config.json").read_text())["max_position_embeddings"] == 2048
    assert "--context" not in found["recommended"]["serve"], "serve has the same default"
    assert plan(index_only, bits=[4], context=4096, disk=GB_PER_S)["context"] == 4096


def test_a_trunk_that_is_quantised_takes_its_time_too(index_only: Path) -> None:
    """Where quantising takes longer than the disk does, the time is in proportion to the weights of both."""
    cpu = Cpu()
    model_choices = open_choices(index_only)
    resources = MachineResources(
        Available(8 << 30, "this machine"), cpu, None, disk_free=60 << 30, idle_bytes=0, into=Path()
    )
    rate = DiskRate(1e12, 1e12, 4)
    speeds = Speeds(rate, "given", None, dict.fromkeys((2, 3, 4, 8), 1000000.0), workers=2)
    times = {}
    for trunk_bits in (16, 4):
        (choice,) = model_choices.chosen([4], [trunk_bits])
        fit = fit_of(model_choices, choice, TierConfig.of(), resources, cpu.kernels())
        found = estimate(model_choices, [fit], fit, resources, speeds, options=[])
        times[trunk_bits] = found["choices"][0]["convert_s"]
    weights = sum(layout.weights for layout in choice.matrices)
    assert weights > 1_000_000
    assert times[4] - times[16] == pytest.approx(weights / 2e6)


def test_the_store_alone_is_no_model_directory(tinymix_4bit: Path) -> None:
    with pytest.raises(StoreFormatError, match="has only the experts of a model") as caught:
        plan(tinymix_4bit / "experts.zarr", disk=GB_PER_S)
    assert caught.value.fix == f"Give the model directory: {tinymix_4bit}"


def test_memory_is_what_the_control_group_leaves(index_only: Path, scripts: Prepared) -> None:
    code = """
import os, sys
from pathlib import Path
from moetier.tools import main
from moetier.tools.plan import speeds
group, model = sys.argv[1:]
Path(group, "cgroup.procs").write_text(str(os.getpid()))
speeds.KERNEL_SECONDS, speeds.UNCACHED_BYTES = 0.0, 1 << 20
main.main(["plan", model, "--bits", "4", "--trunk-bits", "16", "--disk", "1", "--json"])
"""
    with memory_limit(900 << 20) as group:
        result = scripts.run(code, group.folder, index_only)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["machine"]["memory_limiter"].startswith("the control group")
    assert found["machine"]["memory_bytes"] < 900 << 20


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bits": [5]}, ConfigError),
        ({"trunk_bits": [3]}, ConfigError),
        ({"disk": 0.0}, ConfigError),
        ({"context": 0}, ConfigError),
        ({"into": Path("/nonexistent")}, TargetError),
        ({"ram": "much"}, ConfigError),
        ({"device": "cpu", "device_memory": "1GiB"}, ConfigError),
    ],
)
def test_mistakes(index_only: Path, options: dict[str, Any], error: type[MoetierError]) -> None:
    with pytest.raises(error):
        plan(index_only, **({"disk": GB_PER_S} | options))


def test_a_model_directory_has_one_choice(tinymix_4bit: Path) -> None:
    with pytest.raises(ConfigError, match="converted already, with experts of 4 bits and a trunk of 16"):
        plan(tinymix_4bit, bits=[8], disk=GB_PER_S)


def test_the_disk_is_probed_in_a_file_that_goes(
    index_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_speeds, "FILE_BYTES", 4 << 20)
    found = plan(index_only, bits=[4], trunk_bits=[4], into=tmp_path)
    assert found["machine"]["disk"]["all"] > 0
    assert found["machine"]["disk_by"].endswith("on a temporary file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "size"), [(1 << 20, 16 << 20), (20 << 20, 20 << 20), (1 << 40, 24 << 20)])
def test_what_is_written_for_a_probe_is_no_larger_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: int, size: int
) -> None:
    monkeypatch.setattr(plan_speeds, "FILE_BYTES", 24 << 20)
    assert probe_bytes(model, free=1 << 40) == size
    with RandomReads.of_new_file(tmp_path, size, 1 << 20) as reads:
        assert [path.stat().st_size for path in reads.files] == [size]
    assert not list(tmp_path.iterdir())


def test_a_terminal_is_told_what_takes_its_time(index_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    plan(index_only, bits=[4], trunk_bits=[16], disk=GB_PER_S, say=said.append)
    assert said == [f"reading the configuration of {index_only}", "measuring this machine for some seconds"]
    assert main(["plan", str(index_only), "--bits", "4", "--trunk-bits", "16", "--disk", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_a_name_is_told_in_what_can_be_read(index_only: Path) -> None:
    found = plan(index_only, context=256, disk=GB_PER_S) | {"model": NASTY}
    assert text(found).startswith("model    x?[31m?]0;owned??y: ")
