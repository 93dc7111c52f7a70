"""Converting a checkpoint into a tiered store, one block after another, also while it is downloaded.

Others use ``conversion``. The package imports ``cli``, ``runtime.checkpoint`` and ``tiers``.
"""
