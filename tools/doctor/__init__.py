"""Checking a machine and a model directory, and naming the fix for what is wrong.

The package imports ``cli``, ``runtime`` and ``tiers``.
"""
