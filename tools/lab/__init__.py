"""Experiments: replays of traces, synthetic models, perplexity, figures.

The package imports ``cli``, ``convert``, ``runtime`` and ``tiers``.
"""
