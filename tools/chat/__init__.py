"""A conversation on the terminal.

The package imports ``cli``, ``runtime.generation`` and ``runtime.model``.
"""
