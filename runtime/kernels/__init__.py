"""Kernels for quantised matrices: compiled by LLVM for this CPU when they are first used, and for CUDA.

Others use ``api``, ``choose``, ``expert_kernels``, ``expert_products``, ``gemv``, ``norm``, ``packed``, ``quantise``,
``routing``, ``row``, ``snapshot`` and ``team``, and for attention ``attention``, ``growing_cache`` and
``attention_steps``. Kernels run on the threads of ``team``. Only this package imports llvmlite.
"""
