"""Rates of this machine: random reads of its disk, reads of its memory, and products with records; its hardware.

``bench``, ``plan`` and ``doctor`` measure with them. It imports ``runtime`` and ``tiers``.
"""
