"""Checks of a machine and a model directory, with a remedy for what is wrong.

The package imports ``cli``, ``runtime`` and ``tiers``.
"""
