"""What an installed moetier holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"moetier": "moetier"} | {f"moetier/{name}": name for name in ("proto", "tiers", "runtime", "tools")}


def test_the_wheel_carries_the_code_the_types_and_the_model(tmp_path: Path) -> None:
    source = (
        tmp_path / "source"
    )  # a copy: setuptools keeps what it built, and would put stale files into the next wheel
    for name in (*FOLDERS.values(), "tests/assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"  # as pip and build call it
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("moetier-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    for package, folder in FOLDERS.items():
        expected = {f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        assert expected <= names
    assert "moetier/tools/hit_curves.json" in names
    assert {"moetier/py.typed", "moetier/proto/expert_store.proto", "moetier/proto/expert_store_pb2.pyi"} <= names
    for path in (ROOT / "tests/assets/tinymix").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"moetier/assets/{path.relative_to(ROOT / 'tests/assets')}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"moetier"}
