"""The command line.

``main`` is the ``moetier`` command: it finds the subcommand, imports the subcommand's module and reports errors.
``program`` is ``python -m moetier``, which has the same subcommands. With ``-m MODULE`` it runs a Python program
instead, and sets the memory budgets of the models that the program loads.
"""
