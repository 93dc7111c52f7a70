"""Quantisation of expert weights: HQQ, the packing of 2, 3, 4 and 8 bits, and the encoding of a whole record.

Others use ``codec``. The package imports torch and the nouns of ``tiers``.
"""
