"""Virtual environments with another moetier than that of the tests, or with other versions of some packages, and with
all else that the tests have.

``python tests/helpers/environments.py FOLDER REQUIREMENT ...`` makes one with the moetier of this source tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    folder, *requirements = sys.argv[1:]
    python = environment(Path(folder))
    install(python, "--editable", str(Path(__file__).parents[2]))
    install(python, *requirements, network=True)


if __name__ == "__main__":
    main()
