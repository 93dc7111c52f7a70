"""Reading a Hugging Face checkpoint: its files, its weights without loading them all, and which weights are experts.

The converter uses this package. The package imports transformers and torch lazily, ``runtime.moe`` and ``tiers``.
"""
