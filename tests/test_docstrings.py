"""Every public name says what it does, and every public function on tensors their shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = [
    path.parent for folder in ("tiers", "runtime", "tools") for path in sorted((ROOT / folder).rglob("__init__.py"))
]
of_each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
SHAPE = re.compile(r"\[[a-z0-9][\w\s,.*+/x-]*\]")  # [tokens, hidden]


def public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield the public functions, classes and methods of a module by name; not what functions define inside."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def takes_tensors(node: Definition) -> bool:
    """Return whether a tensor is in the signature of a function."""
    if isinstance(node, ast.ClassDef):
        return False
    annotations = [each.annotation for each in node.args.args + node.args.kwonlyargs] + [node.returns]
    return any(re.search(r"\bTensor\b", ast.unparse(each)) for each in annotations if each is not None)


@of_each_package
def test_public_names_are_documented(package: Path) -> None:
    for path in sorted(package.glob("*.py")):
        source = path.read_text()
        tree = ast.parse(source)
        assert ast.get_docstring(tree), f"{path}: the module has no docstring"
        missing = [name for name, node in public(tree) if not ast.get_docstring(node) and not is_setter(node)]
        assert not missing, f"{path}: no docstring"
        lines = source.splitlines()
        without_shapes = []
        for name, node in public(tree):
            comments = " ".join(re.findall(r"#(?! type:).*", "\n".join(lines[node.lineno - 1 : node.end_lineno])))
            if takes_tensors(node) and not SHAPE.search(f"{ast.get_docstring(node)} {comments}"):
                without_shapes.append(name)
        assert not without_shapes, f"{path}: tensors without shapes"


def is_setter(node: Definition) -> bool:
    """Return whether the property's getter has the docstring."""
    return any(ast.unparse(each).endswith(".setter") for each in node.decorator_list)


@cache
def paths() -> set[str]:
    """Return the project's modules, by their paths from its root."""
    folders = [ROOT / name for name in ("docs", "moetier", "proto", "runtime", "tests", "tiers", "tools")]
    return {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")}


@cache
def dotted_names() -> set[str]:
    return {".".join(Path(path).with_suffix("").parts).removesuffix(".__init__") for path in paths()}


# a module's path, or its dotted name within moetier, perhaps with names that it defines
REFERENCE = re.compile(r"(?P<path>(?:\w+/)*\w+\.py)|(?:moetier\.)?(?P<name>(?:tiers|runtime|tools|proto)(?:\.\w+)+)")


@of_each_package
def test_modules_that_a_text_names_exist(package: Path) -> None:
    """In docstrings and comments, between double backquotes."""
    gone = [
        f"{path}: {text}"
        for path in sorted(package.glob("*.py"))
        for text in re.findall(r"``([^`\n]+)``", path.read_text())
        if not names_what_exists(text)
    ]
    assert not gone


@of_each_package
def test_a_package_that_lists_its_modules_lists_all(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    rows = re.findall(r"^    (\w+(?:, \w+)*) {2,}\S", docstring, re.MULTILINE)
    listed = {name for row in rows for name in row.split(", ")}
    modules = {module.stem for module in package.glob("*.py")} - {"__init__"}
    assert not listed & modules or listed == modules


def names_what_exists(text: str) -> bool:
    """Return False if ``text`` is the path or the dotted name of a module that does not exist."""
    if not (named := REFERENCE.fullmatch(text)):
        return True
    if named["path"]:
        return any(f"/{each}".endswith(f"/{text}") for each in paths())
    parts = named["name"].split(".")
    known = next((size for size in range(len(parts), 0, -1) if ".".join(parts[:size]) in dotted_names()), 0)
    module = "/".join(parts[:known])
    source = next((p for p in (f"{module}.py", f"{module}/__init__.py") if p in paths()), "")
    if known < 2:
        return False
    return known == len(parts) or bool(re.search(rf"\b{parts[known]}\b", (ROOT / source).read_text()))
