"""The compiler of kernels, and the threads that run them.

    emitter       writes LLVM IR
    processor     compiles it for this processor
    object_cache  keeps what was compiled on disk
    executable    loads compiled code into memory that is never both writable and executable
    team          runs compiled tasks on several threads, and ends those of OpenMP before a fork
    team_code     emits the code by which these threads are woken, share tasks and end

The package imports no other package of kernels. Only ``runtime.kernels`` imports llvmlite.
"""
