"""A conversation on the terminal.

``dialogue`` reads messages and commands, and ``answer`` computes one answer. The package imports ``cli``,
``runtime.generation`` and ``runtime.model``.
"""
