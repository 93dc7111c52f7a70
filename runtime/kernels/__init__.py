"""Kernels for quantised matrices: compiled by LLVM for this CPU when they are first used, and for CUDA.

Others use ``api`` and ``choose``, and ``attention`` and ``growing_cache`` for the attention of one token. Only this
package imports llvmlite.
"""
