"""Products of activations with matrices: those of records, and those of the trunk.

    api        interface of kernels; decodes records, and multiplies with torch
    packed     products of tensors with records, on a CPU
    gemm       compiles products with records, and chooses among the emitters below
    gemm_tile  emits tiles for AVX-512, Arm and any processor
    gemm_avx2  emits tiles for AVX2, with or without AVX-VNNI
    gemm_rows  emits tiles of many rows of x for AVX-512
    gemm_amx   emits tiles of many rows of x for AMX
    row_major  emits products with matrices in the coding of a checkpoint
    rounding   emits the rounding of x to 8 bits
    row        one row of x, and a matrix of the trunk
    gemv       one row of x, and a matrix of 16 or 32 bits: emits and runs it
    matmul     the same for many rows of x, with the same bits
    dots       emits the sums of products that gemv and matmul share
    words      emits words of one or two numbers, and the order in which their products are added up

Other packages use ``api``, ``packed``, ``row``, ``gemv``, ``matmul`` and ``words``. The
package imports ``codings`` and ``jit``.
"""
