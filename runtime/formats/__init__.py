"""Formats in which checkpoints store weights. Each turns tensors of files into those of the model, decoded when read.

    registry    the base class ``Format``, the table of all formats, 16 and 32 bits, and what is refused
    tensors     the base class ``SourceTensor``, and tensors in files
    scaled      FP8, MXFP8, MXFP4 and NVFP4
    compressed  compressed-tensors
    affine      codes, scales and zero points: what the next two have in common
    gptq_awq    GPTQ and AWQ
    hqq         HQQ
    gguf        the types of GGUF files

``registry`` imports the module of a format when a checkpoint has it. Other packages use ``registry`` and ``tensors``,
which do not import torch. The package imports ``runtime.moe`` and ``tiers``.
"""
