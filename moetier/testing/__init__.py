"""Tests for stores and formats of your own: derive a class from ``StoreTests`` or ``FormatTests``; pytest runs it."""

from .formats import FormatTests
from .reads import in_fork
from .stores import Records, StoreTests

__all__ = ["FormatTests", "Records", "StoreTests", "in_fork"]
