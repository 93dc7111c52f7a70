"""Kernels for quantised matrices: compiled by LLVM for this CPU when they are first used, and for CUDA.

Others use ``api``, ``choose``, ``expert_kernels``, ``gemm``, ``gemv``, ``norm``, ``quantise``, ``routing`` and ``row``,
and for attention ``attention``, ``growing_cache`` and ``quick_attention``. Kernels run on the threads of ``team``. Only
this package imports llvmlite.
"""
