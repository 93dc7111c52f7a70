"""Choosing bits and budgets for a machine before anything is downloaded: sizes, memory and expected speed.

The package imports ``bench``, ``convert``, ``cli`` and ``runtime``.
"""
