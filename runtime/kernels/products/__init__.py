"""Products of activations with matrices: those of records, and those of the trunk.

    api        interface of kernels; decodes records, and multiplies with torch
    packed     products of tensors with records, on a CPU
    gemm       compiles products with records, and chooses among the emitters below
    gemm_tile  emits tiles for AVX-512, Arm and any processor
    gemm_avx2  emits tiles for AVX2, with or without AVX-VNNI
    gemm_amx   emits products of many rows of x for AMX
    row_major  emits products with matrices in the coding of a checkpoint
    rounding   emits the rounding of x to 8 bits
    row        one row of x, and a matrix of the trunk
    gemv       one row of x, and a matrix of 16 or 32 bits: emits and runs it

Other packages use ``api``, ``packed``, ``row`` and ``gemv``. The package imports ``codings`` and ``jit``.
"""
