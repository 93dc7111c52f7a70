"""The docstring of ``moetier.runtime`` lists all threads and locks, and what a lock guards is written only under it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


def listed(section: int) -> set[tuple[str, str]]:
    """The names in a part of the docstring, each with its module: threads are in part 0, locks in part 1."""
    part = (moetier.runtime.__doc__ or "").split("All locks, ")[section]
    lines = re.findall(r"^ {8}(\S+) .*\((.*)\)$", part, re.MULTILINE)
    return {(name, module) for name, modules in lines for module in re.findall(r"``([\w.]+)``", modules)}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("runtime.")


def test_every_thread_is_in_the_list() -> None:
    assert listed(0) == {(name, module_of(path)) for path in SOURCES for name in names(path)}


Statement = ast.Assign | ast.AnnAssign
Owner = ast.Module | ast.ClassDef


class Lock(NamedTuple):
    """A lock: an attribute of the objects of a class, or a name of a module."""

    path: Path
    owner: Owner
    attribute: str
    comment: str
    later: list[str]  # what is assigned after the lock

    @property
    def name(self) -> str:
        return f"{self.owner.name if isinstance(self.owner, ast.ClassDef) else self.path.stem}.{self.attribute}"

    @property
    def guarded(self) -> set[str]:
        """Return the fields that the lock guards, and the methods that need not take it."""
        words = {f"self.{word}" for word in re.findall(r"``(\w+)``", self.comment)}
        return words | set(self.later if "fields below" in self.comment else ())


def locks_of(path: Path) -> Iterator[Lock]:
    text = path.read_text()
    tree = ast.parse(text)
    for owner in [node for node in ast.walk(tree) if isinstance(node, Owner)]:
        body: list[ast.stmt] = [*owner.body]
        for method in [node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]:
            body += [node for node in ast.walk(method) if isinstance(node, Statement)]
        assigned = sorted((node for node in body if isinstance(node, Statement)), key=lambda node: node.lineno)
        for number, node in enumerate(assigned):
            if re.search(r"threading\.(Lock|RLock|Condition)\b(\(\)|\)$)", ast.unparse(node)):
                later = [name for other in assigned[number + 1 :] for name in targets(other)]
                yield Lock(
                    path,
                    owner,
                    targets(node)[0].removeprefix("self."),
                    comment_at(text.splitlines(), node.lineno - 1),
                    later,
                )


def targets(node: ast.AST) -> list[str]:
    """Return the fields that a statement or a call changes, such as "self._calls"."""
    changed: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        changed = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        changed = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        changed = [node.func.value]
    named = []
    for one in [part for each in changed for part in (each.elts if isinstance(each, ast.Tuple) else [each])]:
        while isinstance(one, ast.Subscript):
            one = one.value
        named.append(ast.unparse(one))
    return named


def comment_at(lines: list[str], number: int) -> str:
    if "  # " in lines[number]:
        return lines[number].partition("  # ")[2]
    first = number
    while lines[first - 1].lstrip().startswith("# "):
        first -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[first:number])


def unguarded(lock: Lock, node: ast.AST, held: bool = False) -> Iterator[int]:
    """Yield the lines that change what ``lock`` guards while the thread does not hold the lock."""
    if isinstance(node, ast.With):
        held = held or any(ast.unparse(item.context_expr) == f"self.{lock.attribute}" for item in node.items)
    if not held and any(name in lock.guarded for name in targets(node)):
        yield getattr(node, "lineno", 0)
    for child in ast.iter_child_nodes(node):
        yield from unguarded(lock, child, held)


LOCKS = [lock for path in SOURCES for lock in locks_of(path)]
CHANGES = {
    "add",
    "append",
    "clear",
    "count",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "popleft",
    "remove",
    "update",
}


def test_every_lock_is_in_the_list_and_says_what_it_guards() -> None:
    assert listed(1) == {(lock.name, module_of(lock.path)) for lock in LOCKS}
    assert not [lock for lock in LOCKS if not re.search("guards:? |[Hh]eld while ", lock.comment)]


def test_what_a_lock_guards_is_changed_only_under_it() -> None:
    wrong = [
        f"{lock.path}:{line} changes what {lock.name} guards"
        for lock in LOCKS
        for method in lock.owner.body
        if isinstance(lock.owner, ast.ClassDef) and isinstance(method, ast.FunctionDef) and method.name != "__init__"
        if f"self.{method.name}" not in lock.guarded
        and f"holds ``{lock.attribute}``" not in (ast.get_docstring(method) or "")
        for line in unguarded(lock, method)
    ]
    assert not wrong
