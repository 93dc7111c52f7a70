"""Checks of a machine and a model directory, with a remedy for what is wrong.

The package imports ``cli``, ``convert``, ``plan``, ``rates``, ``runtime`` and ``tiers``.
"""
