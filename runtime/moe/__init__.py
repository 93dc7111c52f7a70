"""A Mixture-of-Experts block of a model: its gate, its experts from a device tier, its products.

Others use ``experts``, ``gates`` and ``linear``. The package imports ``runtime.kernels`` and ``tiers``.
"""
