"""Compute a Mixture-of-Experts block of a model: its gate, and its experts, whose records come from a device tier.

Other packages use ``block``, ``experts``, ``gates``, ``grouped``, ``layers``, ``linear``, ``lockstep``, ``quick`` and
``routers``. The package imports ``runtime.kernels`` and ``tiers``.
"""
