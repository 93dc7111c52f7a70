"""Recorded routing: simulated tiers that replay it, and figures.

Others use ``simulation`` and ``figures``. Imports ``cli``, ``runtime`` and ``tiers``.
"""
