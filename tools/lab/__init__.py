"""Experiments: simulated tiers, synthetic models, perplexity, figures.

``bench`` uses ``simulation`` and ``synthetic``; commands use every module. The package imports ``cli``, ``convert``,
``proto``, ``runtime`` and ``tiers``.
"""
