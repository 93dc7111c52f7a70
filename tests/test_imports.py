"""Imports go one way (docs/architecture.md); heavy libraries stay where they belong."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# the layers of docs/architecture.md: a module imports from layers before its own, and from its own where it says so
LAYERS = {
    "proto": ("proto",),
    "tiers": ("tiers",),
    "runtime": ("proto", "tiers", "runtime"),
    "tools": ("proto", "tiers", "runtime", "tools", "assets"),
    "moetier": ("tiers", "runtime", "tools"),
}

# within tiers: each level imports from those above it alone
LEVELS = (
    {"fields"},
    {"keys", "errors", "stats", "stream", "interrupts"},
    {"bands", "checksum", "hqq", "manifest", "monitor", "slots", "planes", "pairs", "order"},
    {"source", "policy", "wishes", "heads", "usage", "quantize", "plan", "budget", "shard"},
    {"directory", "demands", "views", "promoter", "allocation", "page_locks", "device_pool", "folder", "durable"},
    {"arena", "early", "turns", "waiting", "hotset", "open_shard", "copies", "visit"},
    {"loads", "recovery", "trunk", "digest", "writer", "device_slots"},
    {"ledger", "store"},
    {"parties", "scrub"},
    {"session", "loaders", "timekeeper", "intake"},
    {"host", "device"},
    {"learner"},
)

# library -> the only modules that may import it
HOMES = {
    "torch": {
        *(
            "tiers/hqq",
            "tiers/bands",
            "tiers/planes",
            "tiers/pairs",
            "tiers/quantize",
            "tiers/views",
            "tiers/stream",
            "tiers/device",
        ),
        *(
            "tiers/device_pool",
            "tiers/device_slots",
            "tiers/promoter",
            "tiers/allocation",
            "tiers/page_locks",
            "tiers/copies",
        ),
        *("runtime/", "tools/"),
    },
    "transformers": {
        *("runtime/registration", "runtime/attention", "runtime/growing", "runtime/generate", "runtime/streamer"),
        "tools/",
    },
    "zarr": {"tiers/writer"},
    "crc32c": {"tiers/checksum"},
    "google_crc32c": set(),  # it holds the GIL
    "matplotlib": {"tools/figures", "tools/plot", "tools/plot_resident"},
    "textual": {"tools/top_app", "tools/top_widgets"},
    "rich": {"tools/top_app", "tools/top_heat", "tools/top_parts", "tools/top_widgets"},
    "psutil": {"runtime/memory"},
    "fastapi": {"tools/serve_app", "tools/serve_handlers", "tools/serve_refusal"},
    "starlette": {"tools/serve_app"},
    "uvicorn": {"tools/serve_listen"},
    "openai": {"tools/serve_handlers"},
    "pydantic": {"tools/serve_request"},
    "pydantic_core": {"tools/serve_request"},
    "prometheus_client": {"runtime/metrics", "runtime/metrics_server", "tools/serve_metrics"},
    "llvmlite": {
        "runtime/attending",
        "runtime/emit",
        "runtime/gemv",
        "runtime/native",
        "runtime/normal",
        "runtime/product",
        "runtime/rounding",
        "runtime/tile",
    },
    "grpc": {
        "proto/expert_store_pb2_grpc",
        *("runtime/channel", "runtime/status", "runtime/link", "runtime/lines", "runtime/visit"),
        *("runtime/transfer", "runtime/failures"),
        *("runtime/fetch", "runtime/caller", "runtime/service", "runtime/servers", "runtime/life"),
        "runtime/health",
    },
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


def siblings(path: Path) -> set[str]:
    """Modules of its own package that a module imports."""
    names = (rest.split(".") for top, rest in imports(path) if top == "moetier")
    return {name[1] for name in names if len(name) > 1 and name[0] == path.parent.name}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package, place = path.parent.name, f"{path.parent.name}/{path.stem}"
    for top, rest in imports(path):
        if top == "moetier" and rest:
            assert rest.split(".")[0] in LAYERS[package], f"{place} must not import moetier.{rest}"
        elif top in HOMES:
            assert any(place == home or (home.endswith("/") and place.startswith(home)) for home in HOMES[top]), (
                f"{place} must not import {top}"
            )


def test_tiers_are_built_in_levels() -> None:
    below: set[str] = set()
    for level in LEVELS:
        for name in level:
            assert siblings(ROOT / f"tiers/{name}.py") <= below, f"tiers/{name} imports what is not below it"
        below |= level
    assert below == {path.stem for path in (ROOT / "tiers").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("package", ["runtime", "tools"])
def test_no_imports_in_a_circle(package: str) -> None:
    graph = {path.stem: siblings(path) for path in (ROOT / package).glob("*.py")}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) >= graph.keys()


def test_importing_moetier_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import moetier, sys; print([m for m in ('torch', 'transformers', 'zarr', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_daemon_blocks_signals_before_a_library_begins_threads() -> None:
    import subprocess
    import sys

    code = "import moetier.tools.daemon, moetier.runtime.daemon, sys; print({'numpy', 'grpc'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_public_names_are_what_is_said() -> None:
    import moetier

    assert sorted(moetier.__all__) == dir(moetier) == ["MoetierError", "__version__", "load", "register"]
    for name in moetier.__all__:
        assert getattr(moetier, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(moetier, "nothing")  # noqa: B009 - mypy would refuse moetier.nothing
