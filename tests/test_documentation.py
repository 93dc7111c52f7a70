"""The pages: they are made without a warning, their links lead somewhere, and what they list is what there is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BESIDE_DOCS = sorted(ROOT.glob("*.md"))


def test_they_are_made_without_a_warning(tmp_path: Path) -> None:
    """As ``make docs`` makes them: a link between pages, or to a heading, that leads nowhere is a warning."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True, timeout=240, check=False)
    assert not done.stderr
    assert done.returncode == 0
    assert all(
        (tmp_path / "html" / page.relative_to(DOCS)).with_suffix(".html").exists() for page in DOCS.rglob("*.md")
    )
    api = (tmp_path / "html" / "api.html").read_text()
    assert all(f'id="moetier.{name}"' in api for name in ("load", "register", "MoetierError"))


def slug(heading: str) -> str:
    """The anchor that a git forge gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*BESIDE_DOCS, *sorted(DOCS.rglob("*.md"))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere_in_the_repository_too(page: Path) -> None:
    """What Sphinx does not look at: pages beside docs/, and links as a git forge follows them."""
    text = re.sub(r"^(```+).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text((DOCS / "conf.py").read_text())
    (tmp_path / "index.md").write_text("# A page\n\n[a](b.md) [c](#d)\n")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    done = subprocess.run(
        [*command, tmp_path, tmp_path / "html"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert re.findall(r"target not found: '(.*?)'", done.stderr) == ["b.md", "d"]


def test_dependencies_are_all_explained_and_no_others() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    groups = {"": project["dependencies"], **extras}
    wanted = {name: {Requirement(line).name.lower() for line in lines} for name, lines in groups.items()}
    text = (DOCS / "dependencies.md").read_text()
    listed = {
        name for cell in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    }
    assert listed == set().union(*wanted.values())
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", text.partition("## Extras")[2].partition("\n## ")[0], re.MULTILINE)
    assert {extra: {name for name, of in rows if of == extra} for extra in extras if extra != "dev"} == {
        extra: names for extra, names in wanted.items() if extra not in ("", "dev")
    }
