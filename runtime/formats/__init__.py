"""Formats in which checkpoints store weights: 16 bits, FP8, FP4, INT4, HQQ, AWQ, GPTQ and the types of GGUF files.

A format turns the tensors of the files into those that the model has, which are decoded when they are read. Each has a
module, and a line in ``registry``, which imports it when a checkpoint has that format. Other packages use ``registry``
and ``tensors``, which do not import torch. The package imports ``runtime.moe`` and ``tiers``.
"""
