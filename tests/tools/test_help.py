"""What each command says with --help, word for word. ``make golden`` writes the files anew."""

from __future__ import annotations

import pytest
from help_texts import GOLDEN, PAGE, all_commands, file_of, help_of, page, words


@pytest.mark.parametrize("path", all_commands(), ids=lambda path: " ".join(path) or "moetier")
def test_help_is_as_it_was(path: tuple[str, ...]) -> None:
    assert file_of(path).exists(), "make golden"
    assert words(help_of(path)) == words(file_of(path).read_text()), "make golden, if it is meant"


def test_no_file_is_left_of_a_command_that_is_gone() -> None:
    assert set(GOLDEN.glob("*.txt")) == {file_of(path) for path in all_commands()}, "make golden"


def test_the_page_shows_all_of_them() -> None:
    assert PAGE.read_text() == page(), "make golden"
