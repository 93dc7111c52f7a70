"""Quantisation of weights: HQQ, the packing of codes and pairs, and the encoding and decoding of whole records.

Other packages use ``codec``; kernels also use ``packing``. The package imports torch and the top-level modules of
``tiers``.
"""
