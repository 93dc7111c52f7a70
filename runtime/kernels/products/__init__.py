"""Products of activations with matrices: those of records, and those of the trunk.

Other packages use ``api`` (the interface), ``packed`` (records on a CPU), ``row`` (a trunk's matrix and one token) and
``gemv`` (16-bit matrices and one token). ``gemm`` compiles products for many rows. The package imports ``codings`` and
``jit``.
"""
