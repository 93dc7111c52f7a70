"""Records inside other files: the experts of a checkpoint, read from its own safetensors or GGUF files.

Other packages use ``table``, ``reader`` and ``link``. The package imports ``tiers.store`` and the top-level modules of
``tiers``. ``runtime.checkpoint`` knows which bytes of a checkpoint belong to which expert, and makes the tables.
"""
