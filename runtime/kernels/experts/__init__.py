"""Kernels for a whole block of experts: look-up in the arena's directory, products, activations and weighted sum.

Others use ``expert_kernels`` (one token, records of the host tier) and ``expert_products`` (many tokens). Imports
``products`` and ``jit``.
"""
