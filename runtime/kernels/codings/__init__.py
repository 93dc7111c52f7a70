"""Codings of quantised matrices that lie row after row: how compiled code loads a group of codes with its scales.

    row_codings    codings of checkpoints: numbers of 4 or 8 bits, with scales in a section of their own
    block_codings  the blocks of GGUF files
    row_emitter    rows of a matrix as vectors, which both load

``products.row_major`` and ``products.rounding`` use them. The package imports ``jit``.
"""
