"""The docstring of ``moetier.tiers.errors`` has the tree of all errors, and each keeps its two lines."""

from __future__ import annotations

import ast
import pickle
import re

import pytest
from places import ROOT

from moetier.tiers import errors
from moetier.tiers.errors import ChecksumError, MoetierError

SOURCES = [path for name in ("tiers", "runtime", "tools") for path in sorted((ROOT / name).rglob("*.py"))]
HOME = "tiers.errors"


def listed() -> set[tuple[str, str, str]]:
    """Return the errors of the docstring's tree, each with its base and its module."""
    lines = re.findall(r"^([ │├└─]*)(\w+Error)( .*)?$", errors.__doc__ or "", re.MULTILINE)
    above, tree = list[str](), set()
    for indent, name, text in lines:
        depth = len(indent) // 4
        module = re.search(r"\(([\w.]+)\)$", text)
        if depth:
            tree.add((name, above[depth - 1], module[1] if module else HOME))
        above[depth:] = [name]
    return tree


def defined() -> set[tuple[str, str, str]]:
    """Return the errors of the source that are MoetierErrors, each with its base and its module."""
    classes = {
        (node.name, ast.unparse(base), ".".join(path.relative_to(ROOT).with_suffix("").parts))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    names = {"MoetierError"}
    while new := {name for name, base, _ in classes if base in names} - names:
        names |= new
    return {entry for entry in classes if entry[1] in names}


def test_all_errors_are_in_the_tree() -> None:
    assert listed() == defined()


@pytest.mark.parametrize("copy", [lambda error: error.fresh(), lambda error: pickle.loads(pickle.dumps(error))])
def test_a_copy_has_class_cause_and_fix_and_no_traceback(copy: object) -> None:
    try:
        raise ChecksumError("A record is damaged.", "Convert again.")
    except MoetierError as raised:
        again = copy(raised)  # type: ignore[operator]
    assert (type(again), again.cause, again.fix) == (ChecksumError, "A record is damaged.", "Convert again.")
    assert str(again) == "A record is damaged.\nConvert again."
    assert again.__traceback__ is None
