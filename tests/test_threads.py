"""The docstring of ``moetier.runtime`` lists all threads and locks, and what a lock guards is written only under it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from places import ROOT

import moetier.runtime

SOURCES = [
    path
    for name in ("proto", "tiers", "runtime", "tools")
    for path in sorted((ROOT / name).rglob("*.py"))
    if path != ROOT / "tiers" / "threads.py"
]


def names(source: Path) -> Iterator[str]:
    """Yield the name of each thread that is started in a module, or the prefix for the threads of a pool."""
    text = source.read_text()
    for node in ast.walk(ast.parse(text)) if "Thread" in text or "start_thread" in text else ():
        if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in (
            "start_thread",
            "threading.Thread",
            "ThreadPoolExecutor",
        ):
            named = [word.value for word in node.keywords if word.arg in ("name", "thread_name_prefix")]
            named += node.args[1:2] if called == "ThreadPoolExecutor" else node.args[:1]
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
Function = ast.FunctionDef | ast.AsyncFunctionDef


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
        """The fields that the lock guards: those that its comment names after "guards", up to the end of the clause."""
        clause = "".join(re.findall(r"guards:?([^.;]*)", self.comment))
        fields = set(re.findall(r"``(\w+)``", clause))
        return fields | set(self.later if "fields below" in clause else ())

    @property
    def exempt(self) -> set[str]:
        """The methods that need not take the lock: the comment names them after the fields."""
        return set(re.findall(r"``(\w+)``", self.comment)) - self.guarded

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The text before the names of the lock and of its fields, such as ``self.``, in code that uses them."""
        return ("",) if isinstance(self.owner, ast.Module) else ("self.",)

    def functions(self) -> Iterator[tuple[Function, bool]]:
        """Yield the functions that may change what the lock guards, and whether they need not take it."""
        for node in outermost_functions(self.owner):
            holds = f"holds ``{self.attribute}``" in (ast.get_docstring(node) or "")
            if node.name != "__init__":
                yield node, holds or node.name in self.exempt


def outermost_functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from outermost_functions(node)


def locks_of(path: Path) -> Iterator[Lock]:
    text = path.read_text()
    if "threading." not in text:
        return
    tree = ast.parse(text)
    for owner in [node for node in ast.walk(tree) if isinstance(node, Owner)]:
        body: list[ast.stmt] = [*owner.body]
        for method in [node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]:
            body += [node for node in ast.walk(method) if isinstance(node, Statement)]
        assigned = sorted((node for node in body if isinstance(node, Statement)), key=lambda node: node.lineno)
        for number, node in enumerate(assigned):
            if re.search(r"threading\.(Lock|RLock|Condition)\b(\(\)|\)$)", ast.unparse(node)):
                later = [name.removeprefix("self.") for other in assigned[number + 1 :] for name in targets(other)]
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


def writes(lock: Lock, node: ast.AST, held: bool = False) -> Iterator[tuple[str, bool, int]]:
    """Yield each change of what ``lock`` guards: the field, whether the thread holds the lock, and the line."""
    if isinstance(node, ast.With):
        taken = {ast.unparse(item.context_expr) for item in node.items}
        held = held or any(f"{prefix}{lock.attribute}" in taken for prefix in lock.prefixes)
    elif isinstance(node, Function):  # a function in a function runs later, when the lock may be free
        held = False
    for name in targets(node):
        for prefix in lock.prefixes:
            if name.removeprefix(prefix) in lock.guarded and name.startswith(prefix):
                yield name.removeprefix(prefix), held, getattr(node, "lineno", 0)
    for child in ast.iter_child_nodes(node):
        yield from writes(lock, child, held)


@functools.cache
def locks() -> tuple[Lock, ...]:
    return tuple(lock for path in SOURCES for lock in locks_of(path))


CHANGES = {
    "add",
    "append",
    "clear",
    "count",
    "count_wait",
    "difference_update",
    "discard",
    "extend",
    "insert",
    "move_to_end",
    "pop",
    "popitem",
    "popleft",
    "remove",
    "setdefault",
    "update",
}
# fields of which no change can be seen here, and why
UNSEEN = {
    "CachedStore._fetched": "``_count`` gets it as an argument, and holds the lock",
    "CachedStore._from_cache": "``_count`` gets it as an argument, and holds the lock",
    "FetchCalls._leased": "``_counted`` changes a dictionary in it",
    "MirroredStore._copies": "each copy changes in its own methods",
    "compute._memory": "compiled code writes it",
}


def test_every_lock_is_in_the_list_and_says_what_it_guards() -> None:
    assert listed(1) == {(lock.name, module_of(lock.path)) for lock in locks()}
    assert not [lock for lock in locks() if not re.search("guards:? |[Hh]eld while ", lock.comment)]
    assert not [lock for lock in locks() if "guards" in lock.comment and not lock.guarded]


def test_what_a_lock_guards_is_changed_only_under_it() -> None:
    wrong, seen = list[str](), set[str]()
    for lock in locks():
        name = lock.name.rpartition(".")[0]
        for function, is_exempt in lock.functions():
            for field, held, line in writes(lock, function):
                seen.add(f"{name}.{field}")
                if not held and not is_exempt:
                    wrong.append(f"{lock.path}: {function.name}, line {line}, changes {field} without {lock.name}")
    assert not wrong
    guarded = {f"{lock.name.rpartition('.')[0]}.{field}" for lock in locks() for field in lock.guarded}
    assert guarded - seen == UNSEEN.keys(), "a change of each field must be seen, or the field be in UNSEEN"


def test_a_change_without_the_lock_is_found(tmp_path: Path) -> None:
    """Also one of a global, and one in a function that is only defined under the lock."""
    source = tmp_path / "source.py"
    source.write_text(
        "import threading\n"
        "_lock = threading.Lock()  # guards: ``_table``\n"
        "_table = {}\n"
        "def put(key):\n"
        "    _table[key] = 1\n"
        "    with _lock:\n"
        "        _table.clear()\n"
        "class Counts:\n"
        "    def __init__(self):\n"
        "        self._lock = threading.Lock()  # guards: ``hits``; ``reset`` does not take it\n"
        "        self.hits = 0\n"
        "    def reset(self):\n"
        "        self.hits = 0\n"
        "    def count(self):\n"
        "        with self._lock:\n"
        "            self.hits += 1\n"
        "            def later():\n"
        "                self.hits += 1\n"
    )
    found = [
        (lock.name, field, held or is_exempt, line)
        for lock in locks_of(source)
        for function, is_exempt in lock.functions()
        for field, held, line in writes(lock, function)
    ]
    assert sorted(found) == [
        ("Counts._lock", "hits", False, 18),
        ("Counts._lock", "hits", True, 13),
        ("Counts._lock", "hits", True, 16),
        ("source._lock", "_table", False, 5),
        ("source._lock", "_table", True, 7),
    ]
