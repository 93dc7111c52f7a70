"""The pages: they are made without a warning, their links lead somewhere, and what they list is what there is."""

from __future__ import annotations

import ast
import contextlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import published
import pytest
from daemons import running_daemon
from http_servers import ServerProcess
from packaging.requirements import Requirement
from transformers import AutoTokenizer

from moetier.tools.launch.clients import CLIENTS
from moetier.tools.main import build_parser
from moetier.tools.serve.call_syntax import syntax_of
from moetier.tools.serve.parsing import form_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_they_are_made_without_a_warning(tmp_path: Path) -> None:
    """As ``make docs`` makes them: a link between pages, or to a heading, that leads nowhere is a warning."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True, timeout=240, check=False)
    assert not done.stderr
    assert done.returncode == 0
    assert all(
        (tmp_path / "html" / page.relative_to(DOCS)).with_suffix(".html").exists() for page in DOCS.rglob("*.md")
    )


def slug(heading: str) -> str:
    """The anchor that a git forge gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


PLACEHOLDERS = {"[DIR]": "DIR", "[COMMAND]": "generate", "SHARE": "50%", "WHAT": "hits"}


def commands(page: Path) -> list[str]:
    """Lines that begin with moetier, in blocks of code, as one types them: joined where they go on."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(
        r"^    (?! )(.*)$", text, re.MULTILINE
    )
    found = [re.sub(r"^(\$ |>>> )", "", line).split("  ")[0] for line in lines]
    return [line for line in found if re.match(r"(\S*/)?moetier [a-z]", line) and "..." not in line and "|" not in line]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_commands_that_they_give_are_commands(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands(page):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
        words = list(takewhile(lambda word: word not in ("&", "&&", ">"), words))[1:]
        with contextlib.suppress(SystemExit):
            build_parser().parse_args(words)
            continue
        raise AssertionError(f"{line}\n{capsys.readouterr().err}")


def pages_for_users() -> list[Path]:
    """Return README.md, the index, and the pages that the index lists under "For users"."""
    (listed,) = re.findall(r":caption: For users\n\n(.*?)\n```", (DOCS / "index.md").read_text(), re.DOTALL)
    return [ROOT / "README.md", DOCS / "index.md", *(DOCS / f"{name}.md" for name in listed.split())]


FOR_USERS = pages_for_users()
MAX_WORDS = 25_000  # in all pages for users, tables and commands included


def test_what_a_user_has_to_read_is_short() -> None:
    counts = {name_of(page): len(page.read_text().split()) for page in FOR_USERS}
    assert sum(counts.values()) <= MAX_WORDS, counts
    assert len(counts) <= 14, "README, index, nine pages, and two for those who operate it"


MAX_WORDS_OF_A_TASK = 600  # three minutes at 200 words a minute
TASKS = {  # what a newcomer wants: the sections to read for it, by page; "": what comes before the first section
    "install": {"quickstart": ["", "Install"]},
    "find what fits": {"../README": ["Which way for me"], "choosing": ["", "For another machine"]},
    "read a plan": {"choosing": ["Reading a plan"]},
    "get a checkpoint going": {"quickstart": ["Use your own model"], "choosing": ["Without a conversion"]},
    "serve it to a client": {"serve": ["", "Clients"]},
    "serve it to colleagues": {"serve": ["", "For colleagues", "API keys"]},
    "get JSON from a server": {"serve": ["", "Structured output"]},
    "share it between two processes": {"sharing": ["", "What is shared"]},
    "find out why it is slow": {"faq": ["Why is it slow?"], "choosing": ["Reading the report"]},
}


def section(page: Path, title: str) -> str:
    """Return the text of a section with its subsections; that of the page's beginning if ``title`` is empty."""
    parts = dict(part.split("\n", 1) for part in f"\n{page.read_text()}".split("\n## ")[1:])
    return parts[title] if title else page.read_text().partition("\n## ")[0]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_takes_three_minutes_of_reading(task: str) -> None:
    counts = {
        (page, title): len(section(DOCS / f"{page}.md", title).split())
        for page, titles in TASKS[task].items()
        for title in titles
    }
    assert sum(counts.values()) <= MAX_WORDS_OF_A_TASK, counts


@pytest.mark.parametrize("page", FOR_USERS, ids=name_of)
def test_a_page_for_users_begins_with_a_command(page: Path) -> None:
    """Before the first heading of a section, and within the first lines."""
    beginning = page.read_text().partition("\n## ")[0]
    first = [line.strip() for line in beginning.splitlines() if re.match(r"    \S|import moetier", line)]
    assert any("moetier" in line or "kubectl" in line for line in first[:3]), first
    assert len(beginning.split()) < 600


@pytest.mark.parametrize("page", FOR_USERS[1:], ids=name_of)
def test_figures_are_in_the_pages_of_evidence(page: Path) -> None:
    """A measurement has a date, or a spread such as (1.5 to 1.7)."""
    found = re.findall(r"\b20\d\d-\d\d-\d\d\b|\(\d[\d.]* to \d[\d.]*\)", page.read_text())
    assert not found


@pytest.mark.parametrize("tier", ["host", "daemon"])
def test_the_first_program_runs(
    tier: str, tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a daemon serves the model or not."""
    program = re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    assert 'load("tinymix-4bit"' in program
    (tmp_path / "moetier").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with contextlib.ExitStack() as running:
        if tier == "daemon":
            running.enter_context(running_daemon(tinymix_4bit, folder=tmp_path / "moetier" / "one"))
        exec(program.replace('"tinymix-4bit"', repr(str(tinymix_4bit))), {})
    text, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    assert text.startswith("KING RICHARD:\nWhat news, my lord?")
    name, ratio = last.split()
    assert name == tier
    assert 0 < float(ratio) <= 1


def test_the_program_for_structured_output_runs(tinymix_4bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = (DOCS / "python.md").read_text().partition("## Structured output")[2]
    (program,) = re.findall(r"^```python\n(.*?)^```", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    exec(program.replace('"tinymix-4bit"', repr(str(tinymix_4bit))), {})
    answers = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2
    assert all(answer.keys() == {"name"} and len(answer["name"]) <= 20 for answer in answers)


def test_the_program_for_a_server_runs(tinymix_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = re.findall(r"^```python\n(.*?)^```", (DOCS / "serve.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    server = ServerProcess(tinymix_4bit, tmp_path, ["--name", "tinymix-4bit", "--daemon", "none"], key="")
    try:
        exec(program.replace("http://localhost:8000", server.url), {})
    finally:
        server.stop()
    answer, _, person = capsys.readouterr().out.rstrip().rpartition("name=")
    assert len(answer.split()) > 10
    assert len(ast.literal_eval(person)) <= 20


SOURCES = [path for name in ("tools", "runtime", "tiers", "tests") for path in sorted((ROOT / name).rglob("*.py"))]
SOURCES.remove(Path(__file__))
DEV = ("test", "dev", "release")  # extras for those who work on moetier
EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}


def test_extras_are_installed_from_the_repository() -> None:
    """There is no moetier on an index."""
    for path in (*PAGES, *SOURCES):
        text = path.read_text()
        assert "moetier[" not in text, name_of(path)
        assert set(re.findall(r"pip install [^\n]*?\"\.\[(\w+)\]\"", text)) <= EXTRAS, name_of(path)


@pytest.mark.parametrize("name", ["tiers", "kubernetes", "ray_serve", "object_store", "daemons"])
def test_a_drawing_is_what_its_script_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "figures")
    drawn = runpy.run_path(str(DOCS / "figures" / f"{name}.py"))["picture"]()
    assert (DOCS / "figures" / f"{name}.svg").read_text() == drawn


def test_dependencies_are_all_explained_and_no_others() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    groups = {"": project["dependencies"], **extras}
    wanted = {name: {Requirement(line).name.lower() for line in lines} for name, lines in groups.items()}
    text = (DOCS / "dependencies.md").read_text()
    listed = {
        name for cell in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    }
    wanted = {name: packages - {"moetier"} for name, packages in wanted.items()}
    assert listed == set().union(*wanted.values())
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", text.partition("## Extras")[2].partition("\n## ")[0], re.MULTILINE)
    assert {
        extra: {name for name, of in rows if of == extra} for extra in extras if wanted[extra] and extra not in DEV
    } == {extra: names for extra, names in wanted.items() if names and extra not in ("", *DEV)}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[pytest.mark.slow] * (number % 2)) for number, way in enumerate(published.WAYS)],
    ids=lambda way: f"{way.model}-{way.free}",
)
def test_a_plan_says_what_the_readme_says(way: published.Way) -> None:
    """Size, experts in memory, hits, speed and least sensible memory of a row in "Which way for me"."""
    assert published.row(way) in (ROOT / "README.md").read_text()


def test_the_readme_says_what_twice_the_rate_of_products_gains() -> None:
    gains = [published.gain_of(way) for way in published.WAYS if not way.daemons]
    said = f"twice the rate it is {min(gains):.1f} to {max(gains):.1f} times as fast"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_a_plan_says_what_the_page_says_of_programs_for_coding() -> None:
    page = " ".join((DOCS / "serve.md").read_text().split())
    for said in (published.coding(8), published.coding(16), *map(published.first_prompt, CLIENTS)):
        assert said in page


def test_a_plan_says_what_the_page_says_of_a_second_machine() -> None:
    """With 26 GiB, with 56, and with both."""
    choices = published.choices_of("openai/gpt-oss-120b")
    one, other, both = (published.speed_of(published.fitted(choices, free), published.STATED) for free in (26, 56, 82))
    said = f"gpt-oss-120b gives {one:.1f} tokens/s with 26 GiB, {other:.1f} with 56 and {both:.1f} with both"
    assert said in " ".join((DOCS / "machines.md").read_text().split())


@pytest.mark.parametrize("model_id", published.CONFIGS)
def test_tool_calls_are_recognised_of_the_models_that_the_page_names(model_id: str, tinymix: Path) -> None:
    """By transformers' templates for the type of model; a tokenizer may come with a template of its own."""
    model_type = published.CONFIGS[model_id]["model_type"]
    form = form_of(
        SimpleNamespace(config=SimpleNamespace(model_type=model_type)), AutoTokenizer.from_pretrained(tinymix)
    )
    assert (form is not None and syntax_of(form.template) is not None) == ("Qwen3" in model_id)


def test_the_readme_begins_with_what_one_needs() -> None:
    """Twelve lines say its purpose, a figure with its command, where it has not run, and how to install and begin."""
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:12])
    for said in ("tokens/s", "python tests/measurements/", "Not yet run on a GPU", "git clone", "pip install"):
        assert said in head
    assert "moetier demo" in head
