"""Kernels for quantised matrices: compiled by LLVM for this CPU when they are first used, and for CUDA.

Others use ``api``, ``choose``, ``gemm``, ``norm``, ``quantise`` and ``row``, and for attention ``attention`` and
``growing_cache``. Only this package imports llvmlite.
"""
