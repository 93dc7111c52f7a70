"""Each line of the tables of formats and containers names a class, which is imported only when it is needed."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from moetier.runtime.checkpoint.containers import FILES, FOLDER, Container
from moetier.runtime.formats.registry import FORMATS, MARKS, Format, format_of
from moetier.runtime.formats.tensors import StoredTensor


@pytest.mark.parametrize("place", sorted({*FORMATS.values()}))
def test_a_line_names_a_format(place: str) -> None:
    module, name = place.split(":")
    made = getattr(import_module(module), name)({}, {}, {})
    assert isinstance(made, Format)


@pytest.mark.parametrize("place", sorted({FOLDER, *FILES.values()}))
def test_a_line_names_a_container(place: str) -> None:
    module, name = place.split(":")
    assert issubclass(getattr(import_module(module), name), Container)


def test_marks_name_formats() -> None:
    assert {*MARKS.values()} <= FORMATS.keys()


def test_only_the_format_of_the_checkpoint_is_imported() -> None:
    code = """
import sys
from moetier.runtime.formats.registry import format_of
print(type(format_of({}, {}, {})).__name__, type(format_of({}, {"quant_method": "awq"}, {})).__name__)
print({"moetier.runtime.formats.hqq", "moetier.runtime.formats.scaled", "hqq"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["Plain Awq", "set()"]


def test_a_tensors_name_tells_the_format() -> None:
    tensors = {"a.W_q": StoredTensor("a.W_q", "U8", (), Path("x"), 0)}
    assert type(format_of(tensors, None, {})).__name__ == "Hqq"
