"""Kernels that quantise weights to the codes of records, with HQQ or by rounding.

Others use ``encode``. Imports ``jit``.
"""
