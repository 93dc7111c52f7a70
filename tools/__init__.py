"""The command line.

``main`` is the ``moetier`` command: it finds the subcommand, imports the subcommand's module and reports errors.
"""
