"""Quantisation of weights: HQQ, the packing of codes and pairs, and the encoding and decoding of whole records.

Others use ``codec``, and what kernels need of ``packing``. The package imports torch and the nouns of ``tiers``.
"""
