"""Codings of quantised matrices that lie row after row: how compiled code loads a group of codes with its scales.

``products.row_major`` and ``products.rounding`` use ``row_codings`` and ``row_emitter``; ``block_codings`` has the
blocks of GGUF. The package imports ``jit``.
"""
