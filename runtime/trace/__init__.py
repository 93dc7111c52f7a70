"""Traces of routing decisions: their file format, how they are recorded, and how well predictions recall them.

Others use ``trace``, ``recorder`` and ``recall``. The package imports ``runtime.moe`` and ``tiers``.
"""
