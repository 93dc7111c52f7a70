"""How moetier is installed: an editable install, a wheel, a source tree; and what a wheel holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from environments import BUILD, environment, install

ROOT = Path(__file__).parent.parent
PACKAGES = {"moetier": "moetier"} | {f"moetier/{name}": name for name in ("proto", "tiers", "runtime", "tools")}
# the files of releases before hatchling, in so far as they say what is installed where
FORMER = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "moetier"
version = "0.1.0"
[tool.setuptools]
packages = ["moetier", "moetier.proto", "moetier.tiers", "moetier.runtime", "moetier.tools", "moetier.assets"]
[tool.setuptools.package-dir]
"moetier" = "moetier"
"moetier.proto" = "proto"
"moetier.tiers" = "tiers"
"moetier.runtime" = "runtime"
"moetier.tools" = "tools"
"moetier.assets" = "tests/assets"
"""
LOOK = """
import importlib.util, json, sys
from importlib.resources import files
import moetier, moetier.assets, moetier.proto, moetier.runtime.wire.address, moetier.tiers.layout, moetier.tools
assert (files("moetier.assets") / "tinymix" / "config.json").is_file()
others = ("proto", "tiers", "runtime", "tools", "tests", "docs", "helpers", "assets", "src", *(
    f"moetier.{name}" for name in ("moetier", "tests", "docs", "src")
))
specs = {name: importlib.util.find_spec(name) for name in others}
places = {name: [spec.origin, *(spec.submodule_search_locations or ())] for name, spec in specs.items() if spec}
packages = ("", ".assets", ".proto", ".runtime", ".tiers", ".tools")
print(json.dumps({"package": [sys.modules["moetier" + name].__file__ for name in packages], "others": places}))
"""


@dataclass
class Installed:
    """A clone of the repository, and an interpreter for each way to get at its package."""

    clone: Path
    wheel: Path
    pythons: dict[str, Path]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """A clone without its history and with empty shards of tinymix, which take long to compress."""
    pytest.importorskip("hatchling")
    base = tmp_path_factory.mktemp("installed")
    clone = base / "parent" / "moetier"
    clone.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name[0] != "." and path.name not in ("build", "dist"):
            shutil.copytree(path, clone / path.name, symlinks=True, ignore=ignored)
        elif path.suffix in (".md", ".toml") or path.name in ("LICENSE", ".gitignore"):
            shutil.copy(path, clone)
    for shard in (ROOT / "tests/assets/tinymix").glob("*.safetensors"):
        (clone / shard.relative_to(ROOT)).touch()

    pythons = {way: environment(base / way) for way in ("nothing", "editable", "wheel")}
    install(pythons["editable"], "--editable", str(clone))

    made = base / "made"
    subprocess.run([sys.executable, "-c", BUILD, "sdist", str(made)], cwd=clone, check=True, capture_output=True)
    (sdist,) = made.glob("*.tar.gz")
    shutil.unpack_archive(sdist, base / "unpacked", filter="data")
    (unpacked,) = (base / "unpacked").iterdir()
    subprocess.run([sys.executable, "-c", BUILD, "wheel", str(made)], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = made.glob("*.whl")
    install(pythons["wheel"], str(wheel))
    yield Installed(clone, wheel, pythons)
    shutil.rmtree(base)


def look(python: Path, folder: Path, **environ: str) -> dict[str, list[str]]:
    """Where the package and its parts come from in ``folder``, and what else of the clone could be imported."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environ
    seen = subprocess.run(
        [python, "-c", LOOK], cwd=folder, env=environ, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(seen)


def of_the_clone(installed: Installed, seen: dict[str, list[str]]) -> set[str]:
    """The names beside ``moetier`` that lead into the clone."""
    return {
        name
        for name, places in seen["others"].items()
        for place in places
        if place and Path(place).resolve().is_relative_to(installed.clone)
    }


@pytest.mark.parametrize("folder", ["clone", "parent", "elsewhere"])
@pytest.mark.parametrize("way", ["editable", "wheel"])
def test_the_package_is_found_in_every_folder(installed: Installed, way: str, folder: str, tmp_path: Path) -> None:
    """In the clone its own code is found; beside it, where the folder of the clone has the package's name, and
    elsewhere, it is what was installed."""
    place = {"clone": installed.clone, "parent": installed.clone.parent, "elsewhere": tmp_path}[folder]
    seen = look(installed.pythons[way], place)
    home = installed.clone if way == "editable" or folder == "clone" else installed.pythons[way].parents[1] / "lib"
    assert all(Path(file).is_relative_to(home) for file in seen["package"])
    if folder != "clone":  # there they are folders of the current directory
        assert not of_the_clone(installed, seen)


def test_a_source_tree_serves_without_an_install(installed: Installed, tmp_path: Path) -> None:
    python = installed.pythons["nothing"]
    look(python, installed.clone)
    look(python, tmp_path, PYTHONPATH=str(installed.clone))
    assert not of_the_clone(installed, look(python, tmp_path, PYTHONPATH=str(installed.clone / "src")))


def test_an_editable_install_shows_no_file_twice(installed: Installed) -> None:
    """Each module has one name: the folder that is put on the path has the package alone, and the package has each
    file once."""
    folder = installed.clone / "src"
    assert [path.name for path in folder.iterdir()] == ["moetier"]
    files = [Path(base, name) for base, _, names in os.walk(folder, followlinks=True) for name in names]
    assert len({path.resolve() for path in files}) == len(files) > 100


@pytest.mark.slow
def test_an_editable_install_made_with_setuptools_is_replaced(installed: Installed, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    python = environment(tmp_path / "former")
    (site,) = (tmp_path / "former").glob("lib/python*/site-packages")
    before = set(site.iterdir())
    former = tmp_path / "former-clone"
    shutil.copytree(installed.clone, former, symlinks=True)
    links = [path for path in (former / "moetier").iterdir() if path.is_symlink()]
    for link in links:
        link.unlink()
    (former / "pyproject.toml").write_text(FORMER)
    install(python, "--editable", str(former))
    assert list(site.glob("__editable__*")), "it has a finder and a .pth file for it"

    install(python, "--editable", str(installed.clone))
    assert {path.name for path in set(site.iterdir()) - before} == {"_moetier.pth", "moetier-0.1.0.dist-info"}
    assert all(Path(file).is_relative_to(installed.clone) for file in look(python, tmp_path)["package"])


def test_the_wheel_carries_the_code_the_types_and_the_model(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    for package, folder in PACKAGES.items():
        expected = {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert expected <= names
    assert "moetier/tools/plan/hit_curves.json" in names
    page = {f"moetier/tools/serve/web/{path.name}" for path in (ROOT / "tools/serve/web").iterdir()}
    assert {name for name in names if name.startswith("moetier/tools/serve/web/")} == page
    assert {"moetier/py.typed", "moetier/proto/expert_store.proto", "moetier/proto/expert_store_pb2.pyi"} <= names
    assets = ROOT / "tests/assets"
    carried = {*(assets / "tinymix").rglob("*"), *(assets / "texts").rglob("*"), assets / "__init__.py"}
    expected = {
        f"moetier/assets/{path.relative_to(assets)}" for path in carried if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if name.startswith("moetier/assets/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"moetier"}


@pytest.mark.slow  # mypy reads the types of torch
def test_types_are_seen_through_an_editable_install(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("import moetier\nmoetier.load(3)\nmoetier.no_such_name\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(installed.pythons["editable"]), "user.py"]
    said = subprocess.run(command, cwd=tmp_path, check=False, stdout=subprocess.PIPE, text=True).stdout
    assert 'Argument 1 to "load" has incompatible type "int"' in said
    assert "import-untyped" not in said
    assert "import-not-found" not in said
