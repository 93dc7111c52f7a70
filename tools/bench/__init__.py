"""Benchmarks of this machine: disk, kernels, decoding, prefill and conversion, each beside its upper bound.

Only ``commands`` uses it. The package imports ``cli``, ``rates``, ``traces``, ``synthetic``, ``runtime`` and ``tiers``.
"""
