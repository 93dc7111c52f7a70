"""Conversions for programs: moetier.convert and moetier.pull, which the commands call too."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import moetier
from moetier.runtime.model.name_files import registered
from moetier.tiers.errors import CheckpointError, ConfigError
from moetier.tools.convert.options import CONVERT_OPTIONS


@pytest.mark.usefixtures("tinymix_4bit")  # so that zarr's thread is there before
def test_a_program_converts_and_the_model_has_a_name(models: Path, tmp_path: Path, tinymix: Path) -> None:
    report = moetier.convert(tinymix, tmp_path / "tiny", bits=3, fast=True)
    assert (report.bits, report.trunk_bits, report.was_complete, len(report.blocks)) == (3, 16, False, 8)
    assert registered() == {"tiny": tmp_path / "tiny"}
    assert moetier.convert(tinymix, tmp_path / "tiny", bits=3, fast=True).was_complete
    with pytest.raises(FrozenInstanceError):
        report.bits = 4  # type: ignore[misc]
    with moetier.load("tiny", daemon=None) as (model, tokenizer):
        assert tokenizer is not None
        assert model.tiers.manifest.bits == 3


def test_options_are_checked(tmp_path: Path, tinymix: Path) -> None:
    with pytest.raises(ConfigError, match="`bits` is 5"):
        moetier.convert(tinymix, tmp_path / "tiny", bits=5)
    with pytest.raises(TypeError, match="bitts"):
        moetier.pull("acme/a", bitts=4)
    with pytest.raises(CheckpointError):
        moetier.pull("not an id")


@pytest.mark.parametrize("function", [moetier.convert, moetier.pull])
def test_the_signature_and_the_documentation_have_all_options(function: object) -> None:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    for name, option in CONVERT_OPTIONS.items():
        assert parameters[name].default == option.default
        assert f"\n    {name}: " in (function.__doc__ or "")
