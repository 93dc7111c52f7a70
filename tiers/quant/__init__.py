"""Quantisation of weights: HQQ, the packing of codes and pairs, and the encoding and decoding of whole records.

Other packages use ``codec``; ``runtime.kernels`` also uses ``hqq`` and ``packing``. The package imports torch and the
top-level modules of ``tiers``.
"""
