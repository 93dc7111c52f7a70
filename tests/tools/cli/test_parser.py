"""What commands say with --help, and which addresses of the hub they take."""

from __future__ import annotations

import shlex
from itertools import takewhile

import pytest

from moetier.tools.cli.parser import walk
from moetier.tools.main import build_parser, main

COLUMNS = 100
COMMANDS = [path for path, _ in walk(build_parser())]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "moetier")
def test_a_command_has_help_and_examples(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every argument is explained, no line is over 100 columns, and the examples are command lines that are taken."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*path, "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {' '.join(['moetier', *path])} ")
    assert max(map(len, text.splitlines())) <= COLUMNS
    parser = dict(walk(build_parser()))[path]
    assert parser.description is not None
    assert parser.description[0].isupper()
    assert parser.description.endswith(".")
    assert [action.dest for action in parser._actions if action.metavar != "COMMAND" and not action.help] == (
        ["what"] if path in (("bench",), ("cache",), ("config",)) else []
    )
    examples = [line for line in text.splitlines() if line.startswith("  moetier ")]
    assert len(examples) >= (2 if path in (("generate",), ("chat",), ("serve",)) else 1)
    for line in examples:
        words = list(takewhile(lambda word: word not in ("<", ">"), shlex.split(line, comments=True)))
        if "--help" not in words:
            assert build_parser().parse_args(words[1:])


@pytest.mark.parametrize("path", [path for path, parser in walk(build_parser()) if parser._subparsers])
def test_without_a_command_help_is_printed(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(path)
    assert not stop.value.code
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: {' '.join(['moetier', *path])} ")
    assert said.err == ""


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_the_options_that_everyone_needs_come_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = capsys.readouterr().out.partition("options:")[2].partition("\n\n")[0]
    assert "\n  --ram SIZE " in options
    assert not any(f"\n  {name} " in options for name in ("--policy", "--token-file", "--speculate"))


@pytest.mark.parametrize("words", [["pull"], ["plan"], ["chat"], ["convert"]])
@pytest.mark.parametrize(
    "page", ["https://huggingface.co/acme/tiny-1.5", "http://www.hf.co/acme/tiny-1.5/tree/main?x=1#usage"]
)
def test_the_address_of_a_page_on_the_hub_means_its_model(words: list[str], page: str) -> None:
    more = ["DST"] if words == ["convert"] else []
    given = vars(build_parser().parse_args([*words, page, *more]))
    assert "acme/tiny-1.5" in given.values()


@pytest.mark.parametrize("path", ["acme/tiny/blob/main/x.gguf", "datasets/squad", "docs/transformers"])
def test_another_address_of_the_hub_is_not_changed(path: str) -> None:
    address = f"https://huggingface.co/{path}"
    assert build_parser().parse_args(["pull", address]).id == address
