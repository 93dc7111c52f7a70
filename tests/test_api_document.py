"""docs/api.md: it lists the names and signatures that the code has."""

from __future__ import annotations

from api_reference import PAGE, page

import moetier


def test_the_page_is_what_its_script_writes() -> None:
    assert PAGE.read_text() == page(), "write it anew: python tests/helpers/api_reference.py"


def test_all_public_names_are_there() -> None:
    text = page()
    assert all(f"### moetier.{name}\n" in text for name in moetier.__all__ if not name.startswith("_"))
