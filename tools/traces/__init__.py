"""Recorded routing: simulated tiers that replay it, and figures.

Other packages use ``simulation``, ``recording``, ``replay`` and ``figures``. The package imports ``cli``, ``runtime``
and ``tiers``.
"""
