"""Virtual environments with another moetier than that of the tests, or with other versions of some packages, and with
all else that the tests have.

``python tests/helpers/environments.py FOLDER REQUIREMENT ...`` makes one with the moetier of this source tree.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

INSTALL_SECONDS = 900

# python -c BUILD sdist|wheel FOLDER, where a pyproject.toml is
BUILD = """
import sys, tomllib
from importlib import import_module
from pathlib import Path
backend = import_module(tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["build-backend"])
Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
getattr(backend, f"build_{sys.argv[1]}")(sys.argv[2])
"""


def environment(folder: Path) -> Path:
    """Make a virtual environment without moetier in ``folder``, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # files *.pth of these folders are not read: an editable moetier in one of them stays out of sight
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(packages))
    return folder / "bin" / "python"


def install(python: Path, *what: str, network: bool = False) -> None:
    """Install with pip, without dependencies."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += [*([] if network else ["--no-index"]), "--no-deps", "--no-build-isolation", *what]
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def with_packages(folder: Path, packages: Sequence[str], *, sees_ours: bool = False) -> Path:
    """Return the Python of an environment of packages from PyPI, which is kept in ``folder``.

    Skips the test if pip can't install them. ``sees_ours``: whether the packages of the tests can be imported, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ready, python = folder / "installed", folder / "environment" / "bin" / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists() or ready.read_text() != str(packages):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "environment"], check=True)
            if sees_ours:
                (site,) = folder.glob("environment/lib/python*/site-packages")
                paths = [path for path in sys.path if path.endswith("site-packages")]
                (site / "ours.pth").write_text("\n".join(paths))
            command = [python, "-m", "pip", "install", "--quiet", *packages]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                pytest.skip(f"pip did not install {', '.join(packages)} in {INSTALL_SECONDS} seconds")
            if done.returncode:
                pytest.skip(f"pip can't install {', '.join(packages)}: {done.stderr.strip()[-200:]}")
            ready.write_text(str(packages))
    return python


def main() -> None:
    folder, *requirements = sys.argv[1:]
    python = environment(Path(folder))
    install(python, "--editable", str(Path(__file__).parents[2]))
    install(python, *requirements, network=True)


if __name__ == "__main__":
    main()
