"""Kernels for a whole block of experts: look-up in the arena's directory, products, activations and weighted sum.

    expert_kernels   one token, with records of the host tier: one call for all experts of a block
    expert_products  many tokens, with records by their addresses
    expert_code      emits look-up, activation, weighted sum and the proof that no record was replaced

The package imports ``products`` and ``jit``.
"""
