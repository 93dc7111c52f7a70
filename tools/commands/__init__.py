"""One module per command: its arguments, and the printing of its results.

Each has ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``. The work is done in other packages. ``main``
imports a module when its command is named, and nothing else imports this package.
"""
