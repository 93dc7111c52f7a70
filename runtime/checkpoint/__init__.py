"""Reading a Hugging Face checkpoint: its files, its weights without loading them, and which of them are experts.

The converter uses this package. It imports transformers and torch lazily, ``runtime.moe`` and ``tiers``.
"""
