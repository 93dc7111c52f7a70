"""Traces of routing decisions: their file format, how they are recorded, and how well a prediction recalls them.

The package imports ``runtime.moe`` and ``runtime.speculation``.
"""
