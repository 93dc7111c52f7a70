"""Read a Hugging Face checkpoint: its files, its weights (never all at once), and which weights are experts.

The converter uses this package, and ``runtime.model`` uses ``config_json``. The package imports ``runtime.moe`` and
``tiers``. Its modules ``blueprint`` and ``recipe`` import torch and transformers at once, the others when needed.
"""
