"""Imports of large libraries: only those parts of torch and transformers that running a model needs.

Others use ``lean`` and ``meta``. Imports nothing of moetier.
"""
