"""Quantisation of weights: HQQ, the packing of codes and pairs, and the encoding and decoding of whole records.

Matrices in the coding of a checkpoint are only decoded (``codings``). Other packages use ``codec``, and for checkpoints
``codings``, ``gguf_blocks`` and ``zero_points``; ``runtime.kernels`` also uses ``hqq`` and ``packing``. The package
imports torch and the top-level modules of ``tiers``.
"""
