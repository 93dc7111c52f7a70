"""Measuring this machine: disk, kernels, decoding, prefill and conversion, each beside its bound.

The package imports ``cli``, ``lab`` and ``runtime``.
"""
