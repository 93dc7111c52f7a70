"""Kernels that quantise weights to the codes of records, with HQQ or by rounding.

Other packages use ``encode``. The package imports ``jit``.
"""
