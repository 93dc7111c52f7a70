"""How a choice fits: which memory and which disk it takes, and what is said if they are too small."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import mounted

from moetier.runtime.config import TierConfig
from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.devices.cuda import Cuda
from moetier.runtime.machine.memory import Available
from moetier.tiers.errors import BudgetError, DiskSpaceError
from moetier.tools.commands.plan import text
from moetier.tools.plan.choices import open_choices
from moetier.tools.plan.fit import MachineResources, fit_of
from moetier.tools.plan.forecast import plan

pytestmark = pytest.mark.usefixtures("short_probes")


GB_PER_S = 1.0


def choice_of(found: dict[str, Any], bits: int, trunk_bits: int) -> dict[str, Any]:
    return next(c for c in found["choices"] if (c["bits"], c["trunk_bits"]) == (bits, trunk_bits))


def test_memory_is_a_sum(index_only: Path) -> None:
    found = plan(index_only, device="cpu", context=4096, disk=GB_PER_S)
    assert len(found["choices"]) == 15
    for choice in found["choices"]:
        memory = dict(choice["memory"])
        assert memory.pop("process_bytes") == sum(memory.values())
        assert choice["decode"]["seconds"] == pytest.approx(1 / choice["decode"]["tokens_per_s"])
    longer = plan(index_only, device="cpu", bits=[4], context=8192, disk=GB_PER_S)
    once, twice = (choice_of(each, 4, 16)["memory"]["kv_cache_bytes"] for each in (found, longer))
    assert twice == 2 * once


def test_8_bits_are_recommended_where_all_experts_stay_in_memory(index_only: Path) -> None:
    found = plan(index_only, disk=GB_PER_S)
    assert (found["recommended"]["bits"], found["recommended"]["trunk_bits"]) == (8, 8)
    assert "--bits 8 --trunk-bits 8" in found["recommended"]["convert"]
    assert "More memory would not help" in text(found)
    less = plan(index_only, ram="8MiB", context=256, disk=GB_PER_S)
    assert (less["recommended"]["bits"], less["recommended"]["trunk_bits"]) == (4, 8)
    assert less["recommended"]["chat"] == "moetier chat tinymix-4bit --ram 8MiB --context 256"
    assert "caching" not in text(less).lower()


def test_too_few_slots_are_reported_to_cache_nothing(tinymix_4bit: Path) -> None:
    found = plan(tinymix_4bit, ram="2MiB", context=256, disk=GB_PER_S)
    (choice,) = found["choices"]
    assert choice["streams"]
    assert choice["slots"] < 16
    assert f"Caching hardly helps: {choice['slots']} slots are fewer than the 16 experts" in text(found)


def test_a_disk_that_is_full_names_what_fits(index_only: Path, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=20m") as disk:
        with pytest.raises(DiskSpaceError, match=r"--bits 8.*takes .* MiB in .* are free") as caught:
            plan(index_only, bits=[16, 8], into=disk, disk=GB_PER_S)
        assert caught.value.fix.startswith("--bits 4 --trunk-bits 8 works.")
        found = plan(index_only, into=disk, trunk_bits=[4], disk=GB_PER_S)
        assert [choice["works"] for choice in found["choices"]] == [False, False, True, True, True]
        assert found["recommended"]["bits"] == 4
        assert " no " in text(found)


def test_what_is_downloaded_takes_disk_too(index_only: Path, tmp_path: Path) -> None:
    model_choices = open_choices(index_only)
    assert model_choices.headers is not None
    cpu = Cpu()
    resources = MachineResources(
        Available(8 << 30, "this machine"), cpu, None, disk_free=60 << 20, idle_bytes=0, into=tmp_path
    )
    for on_hub, problem in ((False, None), (True, "A model directory with --bits 4, and files of the checkpoint")):
        headers = replace(model_choices.headers, on_hub=on_hub)
        (choice,) = model_choices.chosen([4], [16])
        passing = replace(model_choices, headers=headers, passing_bytes=50 << 20)
        fit = fit_of(passing, choice, TierConfig.of(), resources, cpu.kernels())
        assert fit.works == (problem is None)
        assert problem is None or (fit.problem is not None and fit.problem.cause.startswith(problem))


def test_a_context_that_is_too_long_names_one_that_is_not(index_only: Path) -> None:
    with pytest.raises(BudgetError, match=r"a context of 100000000 tokens .* need .* leaves") as caught:
        plan(index_only, bits=[4], context=100_000_000, disk=GB_PER_S)
    assert "--context " in caught.value.fix
    assert "works." in caught.value.fix


@pytest.mark.parametrize(
    ("host", "device", "words", "fix"),
    [
        (8 << 30, 20 << 20, r"trunk \(.*, a context of 256 .* need .*; cuda:0 leaves 20 MiB", "--device cpu"),
        (10 << 20, 8 << 30, r"With --bits 4, the experts .* of the host's memory; this machine", "raise the"),
        (10 << 20, 10 << 20, "of the host's memory; this machine leaves 10 MiB", "Free some memory"),
        (8 << 30, 8 << 30, "", ""),
    ],
)
def test_with_a_gpu_it_is_reported_whose_memory_is_too_little(
    index_only: Path, host: int, device: int, words: str, fix: str
) -> None:
    """On a GPU of so many free bytes, of which nothing but their number is asked."""
    model_choices = open_choices(index_only)
    (choice,) = model_choices.chosen([4], [16])
    there = Available(device, "cuda:0")
    resources = MachineResources(Available(host, "this machine"), Cuda("cuda:0"), there, 60 << 30, 0, Path())
    fit = fit_of(model_choices, choice, TierConfig.of(), resources, Cpu().kernels())
    if not words:
        assert fit.problem is None
        assert sum((fit.device_slots or {}).values()) == choice.manifest.record_count
        return
    assert fit.problem is not None
    assert re.search(words, fit.problem.cause), fit.problem.cause
    assert fix in fit.problem.fix
    assert (fit.slot_count, fit.device_slots) == (0, None)


def test_a_budget_out_of_bounds_says_its_bounds(tinymix_4bit: Path) -> None:
    with pytest.raises(BudgetError, match="too small") as caught:
        plan(tinymix_4bit, ram="100KiB", disk=GB_PER_S)
    assert caught.value.fix.startswith("Give `ram` from ")
