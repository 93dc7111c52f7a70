"""What a person types: the ``moetier`` command.

``main`` finds a command, imports its module and reports errors; ``program`` is ``python -m moetier -m MODULE``.
"""
