"""Benchmarks of this machine: disk, kernels, decoding, prefill and conversion, each beside its upper bound.

``plan`` and ``doctor`` use ``bound``, ``disk``, ``output`` and ``rates``. The package imports ``cli``, ``traces``,
``synthetic``, ``runtime`` and ``tiers``.
"""
