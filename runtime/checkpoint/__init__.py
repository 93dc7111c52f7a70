"""Read a Hugging Face checkpoint or GGUF file: its files, its weights (never all at once), and which are experts.

``containers`` opens a path; ``runtime.formats`` says how its weights are stored. The converter, ``moetier plan`` and
``runtime.model`` use this package. Daemons and commands open the experts of any directory with ``experts``. The package
imports ``runtime.formats``, ``runtime.moe`` and ``tiers``. Of its modules, ``config_json``, ``hub``, ``files``
and ``containers`` import torch only when needed.
"""
