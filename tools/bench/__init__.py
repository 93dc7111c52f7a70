"""Benchmarks of this machine: disk, kernels, decoding, prefill and conversion, each beside its upper bound.

The package imports ``cli``, ``lab`` and ``runtime``.
"""
