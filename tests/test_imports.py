"""Imports go one way (docs/architecture.md); heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# a package imports from the lines above its own, and from itself; packages of one line never import each other
ORDER = (
    {"proto", "tiers"},
    {"tiers.cache", "tiers.headers", "tiers.quant"},
    {"tiers.store"},
    {"tiers.arena", "tiers.device", "tiers.extents", "tiers.objects", "runtime.wire"},
    {"tiers.host", "runtime"},
    {"runtime.libraries", "runtime.machine"},
    {"runtime.kernels.jit"},
    {"runtime.kernels.codings"},
    {"runtime.kernels.products"},
    {"runtime.kernels.experts", "runtime.kernels.layer", "runtime.kernels.quantise"},
    {"runtime.kernels"},
    {"runtime.devices"},
    {"runtime.moe"},
    {"runtime.formats"},
    {"runtime.checkpoint", "runtime.speculation"},
    {"runtime.stores"},
    {"runtime.trace", "runtime.client", "runtime.daemon"},
    {"runtime.model"},
    {"runtime.generation"},
    {"runtime.engine.pages"},
    {"runtime.engine"},
    {"tools.cli"},
    {"tools.serve.protocols"},
    {"tools", "tools.chat", "tools.convert", "tools.rates", "tools.top", "tools.traces"},
    {"tools.quality", "tools.synthetic"},
    {"tools.bench", "tools.plan"},
    {"tools.doctor", "tools.launch", "tools.serve"},
    {"tools.ray"},
    {"tools.commands"},
)

# library -> the packages that may import it, or single modules
HOMES = {
    "torch": {"tiers.device", "tiers.quant", "runtime", "tools"},
    "transformers": {"runtime", "tools"},
    "zarr": {"tiers.store.writer"},
    "crc32c": {"tiers.store.checksum"},
    "gguf": {"runtime.checkpoint.gguf_file", "runtime.formats.gguf"},
    "google_crc32c": set(),  # it holds the GIL
    "hqq": set(),  # only tests need it
    "matplotlib": {"tools.traces", "tools.commands.plot"},
    "textual": {"tools.top"},
    "rich": {"tools.top"},
    "psutil": {"runtime.machine.memory"},
    "starlette": {"tools.serve", "tools.ray.session_ids"},
    "ray": {"tools.ray"},
    "uvicorn": {"tools.serve"},
    "pydantic": {"tools.serve", "runtime.engine.type_schema"},
    "pydantic_core": {"tools.serve"},
    "llguidance": {"runtime.engine"},
    "prometheus_client": {"runtime.daemon", "tools.serve"},
    "llvmlite": {"runtime.kernels"},
    "triton": {"runtime.kernels.triton_experts"},
    "obstore": {"tiers.objects.client", "tiers.objects.aws_profile"},
    "boto3": {"tiers.objects.aws_profile"},
    "grpc": {"proto", "runtime.wire", "runtime.client", "runtime.daemon"},
}


def modules() -> dict[str, Path]:
    """Every module by its name within moetier; a package is named as its folder."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ("proto", "tiers", "runtime", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"} | {"proto"}


def package_of(name: str) -> str:
    return name if name in PACKAGES else name.rpartition(".")[0]


@functools.cache
def imports(name: str) -> tuple[str, ...]:
    """Return the absolute names that a module imports, also inside functions: those of this project without
    ``moetier.``."""
    return tuple(_imports(name))


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{name}: import other packages by their full name"
            base = f"moetier.{package_of(name)}" if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for each in found:
            ours = each.removeprefix("moetier.")
            yield next((known for known in (ours, ours.rpartition(".")[0]) if known in MODULES), each)


def test_every_package_has_its_place() -> None:
    assert set().union(*ORDER) == PACKAGES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_imports_go_one_way(package: str) -> None:
    at = next(line for line, packages in enumerate(ORDER) if package in packages)
    allowed = {package}.union(*ORDER[:at])
    wrong = []
    for name in MODULES:
        for each in imports(name) if package_of(name) == package else ():
            library = each.partition(".")[0]
            if each in MODULES:
                wrong += [f"{name} must not import {each}"] * (package_of(each) not in allowed)
            elif library in HOMES and not any(f"{name}.".startswith(f"{home}.") for home in HOMES[library]):
                wrong.append(f"{name} must not import {library}")
    assert not wrong


def test_no_imports_in_a_circle() -> None:
    graph = {name: {each for each in imports(name) if each in MODULES} - {name} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises CycleError


def test_importing_moetier_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import moetier, sys; print([m for m in ('torch', 'transformers', 'zarr', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_daemon_blocks_signals_before_a_library_begins_threads() -> None:
    import subprocess
    import sys

    names = "moetier.tools.commands.daemon, moetier.runtime.daemon.entry"
    code = f"import {names}, sys; print({{'numpy', 'grpc'}} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_daemon_does_without_torch() -> None:
    import subprocess
    import sys

    names = "moetier.runtime.daemon.process, moetier.runtime.daemon.compute"
    code = f"import {names}, sys; print({{'torch', 'transformers'}} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_public_names_are_what_is_reported() -> None:
    import moetier

    assert (
        sorted(moetier.__all__)
        == dir(moetier)
        == [
            *("Engine", "Grammar", "GrammarCompiler", "GrammarProcessor", "MoetierError", "Request"),
            *("__version__", "convert", "load", "plan", "pull", "register"),
        ]
    )
    for name in moetier.__all__:
        assert getattr(moetier, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(moetier, "nothing")  # noqa: B009 - mypy would refuse moetier.nothing
