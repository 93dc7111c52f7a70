from __future__ import annotations

import stat
from pathlib import Path

import pytest

from moetier.tiers.errors import ConfigError
from moetier.tools.chat.state import (
    MAX_CONVERSATIONS,
    MAX_LINES,
    KeptConversation,
    LineHistory,
    last_conversation,
    messages_text,
    read_messages,
    state_folder,
)

SAID = [{"role": "user", "content": "Chi è?\n"}, {"role": "assistant", "content": "Un'anima."}]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "moetier/chat"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local/state/moetier/chat"


def test_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    """Two chats add to one file; neither has to end for that."""
    folder = tmp_path / "a/b"
    one, other = LineHistory(folder), LineHistory(folder)
    one.add("first")
    other.add("two\nlines\tè")
    one.add("third")
    later = LineHistory(folder)
    assert later.lines == ["first", "two\nlines\tè", "third"]
    assert mode(folder / "lines") == 0o600
    assert mode(folder) == 0o700


def test_lines_are_kept_though_another_chat_cuts_the_file(tmp_path: Path) -> None:
    first = LineHistory(tmp_path)
    for number in range(2 * MAX_LINES + 1):
        first.add(str(number))
    LineHistory(tmp_path)  # cuts the file
    first.add("last")
    assert LineHistory(tmp_path).lines[-2:] == [str(2 * MAX_LINES), "last"]


def test_old_lines_go_when_there_are_many(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("".join(f"{number}\n" for number in range(3 * MAX_LINES)) + "cut by a crash")
    (tmp_path / "lines").chmod(0o644)
    history = LineHistory(tmp_path)
    history.add("new")
    assert history.lines == [str(number) for number in range(2 * MAX_LINES, 3 * MAX_LINES)]
    again = LineHistory(tmp_path)
    assert again.lines == [*history.lines[1:], "new"]
    assert mode(tmp_path / "lines") == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


@pytest.mark.parametrize("where", ["file", "link", "none"])
def test_what_cannot_be_kept_is_not(tmp_path: Path, where: str) -> None:
    (tmp_path / "target").write_text("kept\n")
    (tmp_path / "file").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link/lines").symlink_to(tmp_path / "target")
    folder = None if where == "none" else tmp_path / where
    history = LineHistory(folder)
    history.add("line")
    assert history.lines == []
    assert (tmp_path / "target").read_text() == "kept\n"
    if where == "file":
        KeptConversation(folder).save(SAID)


def test_the_chat_that_began_last_is_resumed(tmp_path: Path) -> None:
    first, second = KeptConversation(tmp_path), KeptConversation(tmp_path)
    second.save(SAID)
    first.save([*SAID, *SAID])
    assert last_conversation(tmp_path) == SAID
    second.save([*SAID] * 3)
    assert last_conversation(tmp_path) == [*SAID] * 3
    (file, _) = (tmp_path / "conversations").iterdir()
    assert mode(file) == 0o600
    for _ in range(MAX_CONVERSATIONS + 3):
        KeptConversation(tmp_path).save(SAID)
    assert len([*(tmp_path / "conversations").iterdir()]) == MAX_CONVERSATIONS


def test_there_may_be_none_to_resume(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ConfigError, match="no conversation to resume"):
            last_conversation(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a": 1}', "[1]", '[{"role": "user"}]', '[{"role": "user", "content": ["a"]}]', "\xff"],
    ids=range(8),
)
def test_a_file_without_messages_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="file"):
        read_messages(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="can't be read"):
            read_messages(path)


def test_messages_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(messages_text(SAID))
    assert read_messages(path) == SAID
