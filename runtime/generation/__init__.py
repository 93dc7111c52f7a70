"""Generating text with a loaded model: samplers, penalties, stop strings, the cache of earlier prompts, streaming.

The commands ``generate``, ``chat`` and ``serve`` use this package. It imports nothing from ``tools``.
"""
