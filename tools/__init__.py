"""The command line.

``main`` is the ``moetier`` command: it finds the subcommand, imports its module and reports errors. ``program`` is
``python -m moetier``: the same, or with ``-m MODULE`` it runs a Python program and gives its models budgets.
"""
