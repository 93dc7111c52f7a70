"""Synthetic models: checkpoints with random weights and a routing like that of a trained model, and their stores.

Others use ``checkpoint``, ``tensors`` and ``store``. Imports ``traces``, ``convert``, ``runtime`` and ``tiers``.
"""
