"""Kernels for a whole block of experts: look-up in the arena's directory, products, activations and weighted sum.

Other packages use ``expert_kernels`` (one token, records of the host tier) and ``expert_products`` (many tokens).
The package imports ``products`` and ``jit``.
"""
