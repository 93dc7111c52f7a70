"""Recorded routing: simulated tiers that replay it, and figures.

Others use ``simulation``, ``recording``, ``replay`` and ``figures``. Imports ``cli``, ``runtime`` and ``tiers``.
"""
