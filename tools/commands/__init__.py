"""One module per command: its arguments, and the printing of its results.

Each has ``add_arguments(parser)``, ``EXAMPLES`` and ``run(arguments)``. The work is done in other packages. ``main``
has the list of commands, and imports a module when its command is named, and nothing else imports this package.
"""
