"""The ``moetier`` command, as a person types it.

``main`` finds a command, imports its module and reports errors; ``program`` runs ``python -m moetier -m MODULE``.
"""
