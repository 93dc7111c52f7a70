"""Generating text with a loaded model: samplers, penalties, stop strings, the cache of earlier prompts, streaming.

The commands ``generate``, ``chat`` and ``serve`` use it. It does not know their command lines.
"""
