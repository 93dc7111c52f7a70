"""Folders of the repository that tests use."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
HELPERS = TESTS / "helpers"
ASSETS = TESTS / "assets"
DOCS = ROOT / "docs"
