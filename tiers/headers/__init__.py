"""Headers of safetensors and GGUF files: names, types, shapes and places of tensors, vetted.

``store.trunk`` reads safetensors; ``extents`` and ``runtime.checkpoint`` read both. The package imports modules of
``tiers``.
"""
