"""Each thread has a name, which the docstring of ``moetier.runtime`` explains, and each lock says what it guards."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

import moetier.runtime

SOURCES = [path for name in ("proto", "tiers", "runtime", "tools") for path in sorted((ROOT / name).rglob("*.py"))]


def names(source: Path) -> Iterator[str]:
    """Yield the name of each thread that is started in a module, or the prefix for the threads of a pool."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in (
            "threading.Thread",
            "ThreadPoolExecutor",
        ):
            named = [word.value for word in node.keywords if word.arg in ("name", "thread_name_prefix")]
            named += node.args[1:2] if called == "ThreadPoolExecutor" else []
            assert named, f"{source}:{node.lineno}: a thread without a name"
            yield re.split(r"-?\{", ast.unparse(named[0]).strip("f'\""))[0]


def test_every_thread_is_in_the_list() -> None:
    started = {(name, module_of(path)) for path in SOURCES for name in names(path)}
    listed = set()
    for name, modules in re.findall(r"^ {8}(\S+) .*\((.*)\)$", moetier.runtime.__doc__ or "", re.MULTILINE):
        listed |= {(name, module) for module in re.findall(r"``([\w.]+)``", modules)}
    assert listed == started


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("runtime.")


def test_every_lock_says_what_it_guards() -> None:
    silent = []
    for path in SOURCES:
        before = ""
        for line in path.read_text().splitlines():
            is_lock = re.search(r" = threading\.(Lock|RLock|Condition)\(\)", line)
            if is_lock and "  # " not in line and not before.lstrip().startswith("# "):
                silent.append((str(path), line))
            before = line
    assert not silent
