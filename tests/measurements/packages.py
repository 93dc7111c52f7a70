"""Count the packages of a fresh environment with moetier, and their megabytes.

    python tests/measurements/packages.py                 the base; then with each extra that is named, such as
    python tests/measurements/packages.py serve gguf      the base, with `serve`, and with `gguf`

It makes an environment in a temporary folder for each, and downloads what pip does not have. Where torch comes from
decides most of the size: name an index of its CPU builds (PIP_EXTRA_INDEX_URL) for machines without a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def measured(extra: str, folder: Path) -> tuple[int, float]:
    """Return the number of packages that pip lists in an environment in ``folder``, and its megabytes."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin/python", "-m", "pip", "--disable-pip-version-check"]
    wanted = f"{ROOT}[{extra}]" if extra else str(ROOT)
    subprocess.run([*pip, "install", "--quiet", wanted], check=True)
    listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return len(json.loads(listed.stdout)), size / 1e6


def main(extras: list[str]) -> None:
    """Print a line for the base, and for each of ``extras``."""
    for extra in ["", *extras]:
        with tempfile.TemporaryDirectory() as folder:
            count, megabytes = measured(extra, Path(folder))
        print(f"{extra or 'base'}: {count} packages, {megabytes:,.0f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
