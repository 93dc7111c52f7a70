"""Read a Hugging Face checkpoint or GGUF file: its files, its weights (never all at once), and which are experts.

``containers`` opens a path; ``runtime.formats`` says how its weights are stored. The converter, ``moetier plan`` and
``runtime.model`` use this package. ``model_config`` tells checkpoints from model directories. The package imports
``runtime.formats``, ``runtime.moe`` and ``tiers``. Of its modules, ``config_json``, ``hub``, ``safetensors_folder`` and
``containers`` import torch only when needed.
"""
