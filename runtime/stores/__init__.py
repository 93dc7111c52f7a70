"""Stores that are found at a path. ``registry.open_store`` opens whichever store is there.

Other packages use ``registry``, and ``checkpoint_store`` for tables of checkpoints. The package imports ``tiers`` and
``runtime.checkpoint``.
"""
