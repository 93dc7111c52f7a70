"""The compiler of kernels, and the threads that run them.

``emitter`` writes LLVM code, ``processor`` compiles it for this processor, ``executable`` loads it, and ``team`` runs
compiled tasks on several threads. The package imports no other package of kernels. Only ``runtime.kernels`` imports
llvmlite.
"""
