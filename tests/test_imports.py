"""Imports go one way (docs/architecture.md); heavy libraries stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# the layers of docs/architecture.md: a module imports from layers before its own, and from its own where it says so
LAYERS = {
    "tiers": ("tiers",),
    "runtime": ("tiers", "runtime"),
    "tools": ("tiers", "runtime", "tools", "assets"),
    "moetier": ("tiers", "runtime"),
}

# within tiers: who may import whom
NOUNS = {"keys", "errors", "stats"}
PARTS = NOUNS | {
    "manifest",
    "source",
    "policy",
    "slots",
    "arena",
    "quantize",
    "hqq",
    "planes",
    "pairs",
    "stream",
    "budget",
    "ledger",
    "monitor",
    "views",
    "shard",
    "folder",
    "durable",
}
TIERS_MAY_IMPORT = dict.fromkeys(PARTS, PARTS) | {
    "keys": set(),
    "errors": set(),
    "stats": set(),
    "store": PARTS,
    "writer": PARTS,
    "host": PARTS,
    "device": PARTS,
}

# library -> the only modules that may import it
HOMES = {
    "torch": {
        "tiers/device",
        "tiers/quantize",
        "tiers/hqq",
        "tiers/planes",
        "tiers/pairs",
        "tiers/stream",
        "tiers/views",
        "runtime/",
        "tools/",
    },
    "transformers": {
        "runtime/registration",
        "runtime/gates",
        "runtime/generate",
        "runtime/streamer",
        "tools/",
    },
    "zarr": {"tiers/store", "tiers/writer"},
    "grpc": {"runtime/service", "runtime/client", "runtime/daemon"},
    "psutil": {"runtime/memory"},
}


def modules() -> list[Path]:
    return [path for package in LAYERS for path in sorted((ROOT / package).glob("*.py"))]


def imports(path: Path) -> list[tuple[str, str]]:
    """(top-level package, rest) of each import, those inside functions too; relative ones made absolute."""
    package = path.parent.name
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level == 1:
                base = f"moetier.{base}" if package == "moetier" else f"moetier.{package}.{base}".rstrip(".")
            assert node.level <= 1, f"{path}: import other packages by their full name"
            names = [base] if node.module else [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            found.append((top, rest))
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package, module = path.parent.name, path.stem
    for top, rest in imports(path):
        if top == "moetier":
            target_package, _, target = rest.partition(".")
            if not target_package or target_package == "errors":
                continue
            assert target_package in LAYERS[package], f"{package} must not import moetier.{rest}"
            if package == "tiers" and module != "__init__":
                allowed = TIERS_MAY_IMPORT[module]
                assert target.partition(".")[0] in allowed - {module}, f"tiers/{module} must not import {rest}"
        elif top in HOMES:
            place = f"{package}/{module}"
            assert any(place == home or (home.endswith("/") and place.startswith(home)) for home in HOMES[top]), (
                f"{place} must not import {top}"
            )


def test_importing_moetier_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import moetier, sys; print([m for m in ('torch', 'transformers', 'zarr', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_what_is_said() -> None:
    import moetier

    assert sorted(moetier.__all__) == dir(moetier) == ["MoetierError", "load", "register"]
    for name in moetier.__all__:
        assert getattr(moetier, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(moetier, "nothing")  # noqa: B009 - mypy would refuse moetier.nothing
