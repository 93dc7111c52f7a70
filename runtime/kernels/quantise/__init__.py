"""Kernels that quantise weights to the codes of records, with HQQ or by rounding.

    encode         quantises weights, to the same bytes as ``tiers.quant``
    quantise_code  emits HQQ's solver, and the rounding to codes
    pairs_code     emits the rounding of scales to 8 bits

Other packages use ``encode``. The package imports ``jit``.
"""
