"""A plan for programs: the JSON of moetier plan as a frozen report."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import transformers

import moetier
from moetier.runtime.model.name_files import register_name
from moetier.tiers.errors import ConfigError
from moetier.tools.commands.plan import PLANNED
from moetier.tools.plan.api import Plan


@pytest.mark.usefixtures("short_probes")
def test_a_plan_is_a_frozen_report_of_what_the_command_prints(tinymix: Path, models: Path) -> None:
    register_name(tinymix)
    verbosity = transformers.utils.logging.get_verbosity()
    plan = moetier.plan("tinymix", bits=[4, 3], trunk_bits=[16], disk=1.0, ram="50%", context=512)
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert (plan.model, plan.records, plan.context) == ("tinymix", 64, 512)
    assert {choice.bits for choice in plan.choices} == {3, 4}
    assert plan.recommended in plan.choices
    assert plan.recommended.works
    assert 0 < (plan.recommended.hit_ratio or 0) <= 1
    assert plan.commands[-1].startswith("moetier serve ")
    document = plan.to_json()
    assert Plan.of(document) == plan
    assert [choice["bits"] for choice in document["choices"]] == [choice.bits for choice in plan.choices]
    with pytest.raises(FrozenInstanceError):
        plan.model = "other"  # type: ignore[misc]


def test_it_has_the_options_of_the_command() -> None:
    assert {*PLANNED, "prefill_chunk"} <= {*inspect.signature(moetier.plan).parameters}


def test_options_are_checked(tinymix: Path) -> None:
    with pytest.raises(ConfigError, match="can't be 5"):
        moetier.plan(tinymix, bits=[5])


@pytest.mark.parametrize("name", ["policy", "daemon", "say", "cache", "contxt"])
def test_an_unknown_option_is_refused_before_the_source_is_read(name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        moetier.plan("/nonexistent", **{name: None})


def test_a_wrong_option_is_refused_before_the_source_is_read() -> None:
    with pytest.raises(ConfigError, match="context"):
        moetier.plan("/nonexistent", context="long")  # type: ignore[arg-type]


@pytest.mark.slow  # a process imports it all
def test_a_program_keeps_all_of_transformers() -> None:
    """The command imports it without parts that commands never use."""
    code = (
        "import moetier\n"
        "try: moetier.plan('/nonexistent')\n"
        "except moetier.MoetierError: pass\n"
        "from transformers.utils.import_utils import is_torch_distributed_available as is_there\n"
        "print(is_there())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
