"""Prompts that a client changes near their beginnings are noticed, once; other prompts are not."""

from __future__ import annotations

import pytest

from moetier.tools.serve.early_difference import MAX_USERS, EarlyDifference

TOOLS = [*range(1000, 4000)]


def prompt(header: list[int], *turns: int) -> list[int]:
    return [1, 2, 3, *header, *TOOLS, *turns]


def noted(caplog: pytest.LogCaptureFixture, *prompts: tuple[str, list[int]]) -> int:
    """The number of lines in the log."""
    caplog.clear()
    differences = EarlyDifference()
    for user, ids in prompts:
        differences.note(user, ids)
    return len(caplog.records)


def test_a_header_that_changes_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [("", prompt([7, number], *range(number))) for number in range(20, 25)]
    assert noted(caplog, *prompts) == 1
    assert "differ from token 4 on" in caplog.text
    longer = [("", prompt([7] * number)) for number in (3, 9)]
    assert noted(caplog, *longer) == 1, "the header may have another length"


def test_other_prompts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    first, title = prompt([7], 5), [9, *range(5000, 5600)]
    assert noted(caplog, ("", first), ("", title), ("", prompt([7], 5, 6, 7)), ("", [*title, 3])) == 0
    assert noted(caplog, ("anna", first), ("bert", prompt([8], 5))) == 0, "of two clients"
    assert noted(caplog, ("", [1, 5, 6]), ("", [1, 7, 6])) == 0, "too short to matter"
    late = [*TOOLS, 5, *range(500)], [*TOOLS, 6, *range(500)]
    assert noted(caplog, *(("", ids) for ids in late)) == 0


def test_no_more_clients_are_remembered_than_a_few(caplog: pytest.LogCaptureFixture) -> None:
    others = [(f"user {number}", prompt([number])) for number in range(MAX_USERS)]
    assert noted(caplog, ("", prompt([7])), *others, ("", prompt([8]))) == 0
