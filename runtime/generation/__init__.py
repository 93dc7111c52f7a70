"""Generating text with a loaded model: samplers, penalties, stop strings, streaming.

The engine and the commands ``generate``, ``chat`` and ``serve`` use this package. It imports nothing from ``tools``.
"""
