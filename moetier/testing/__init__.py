"""Tests for stores of your own: derive a class from ``StoreTests``, and run it with pytest."""

from .reads import in_fork
from .stores import Records, StoreTests

__all__ = ["Records", "StoreTests", "in_fork"]
