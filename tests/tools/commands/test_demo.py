"""moetier demo converts the bundled model once, and says what happened; it needs no optional package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import ROOT

from moetier.runtime.model.name_files import registered
from moetier.tiers.store.folder import GROUP, METADATA, read_manifest
from moetier.tools.main import main

# names of modules that differ from those of their packages
MODULES = {"google-crc32c": "google_crc32c", "llama-cpp-python": "llama_cpp", "myst-parser": "myst_parser"}
LAST = (
    r"Just now: a quarter of the experts, 16 of 64, had room in memory\. Tokens used experts [\d,]+ times: "
    r"\d+% were in memory \(hits\); for the others, [\d.]+ MiB were read\.\n"
    r"Next: moetier chat (\S+) -n 64 --temperature 0.6; or, for a model of the hub: moetier plan ORG/NAME\n"
)


@pytest.fixture
def made(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the model directory that the demo makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moetier" / "demo" / "tinymix-4bit"


def optional_modules() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, rest = set[str](), [Requirement(line).name for line in project["dependencies"]]
    while rest:  # what they depend on, too
        if (name := rest.pop().lower().replace("_", "-")) not in needed:
            needed.add(name)
            required = map(Requirement, requires(name) or ())
            rest += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    extras = {Requirement(line).name for lines in project["optional-dependencies"].values() for line in lines}
    assert len(extras - needed) > 10
    return {MODULES.get(name, name.replace("-", "_")) for name in extras - needed - {"moetier"}}


@pytest.mark.slow
def test_it_needs_only_what_moetier_always_has(made: Path) -> None:
    code = (
        f"import sys; sys.modules |= dict.fromkeys({sorted(optional_modules())!r})\n"
        "from moetier.tools.main import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("First Citizen:\n")
    last = re.search(LAST + r"\Z", done.stdout)
    assert last is not None, done.stdout
    assert registered() == {last[1]: made}
    assert str(made) in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("tinymix_4bit")  # so that zarr's thread is there before
def test_the_model_is_kept_and_that_of_another_version_is_replaced(
    made: Path, capsys: pytest.CaptureFixture[str], tinymix: Path
) -> None:
    assert main(["convert", str(tinymix), str(made), "--bits", "3", "--fast"]) == 0
    capsys.readouterr()
    assert main(["demo", "def main():"]) == 0
    assert read_manifest(made / GROUP).bits == 4
    first = (made / GROUP / METADATA).stat().st_ino
    assert capsys.readouterr().out.startswith("def main():")
    assert main(["demo"]) == 0
    assert (made / GROUP / METADATA).stat().st_ino == first
    assert re.search(LAST, capsys.readouterr().out)
