"""Kernels for quantised matrices: compiled by LLVM for this CPU when they are first used, and for GPUs.

``runtime.devices`` chooses among them. Other packages use ``ahead`` (compiling beside imports). The packages below have
the kernels: ``jit``, ``codings``, ``products``, then ``layer``, ``experts`` and ``quantise``. Only they import
llvmlite.
"""
