"""One module per command: its arguments, and the printing of its results.

Each module has ``add_arguments(parser)``, ``EXAMPLES`` and ``run(arguments)``, which returns an exit status; None means
0. The work is done in other packages. ``main`` has the list of commands, and imports a command's module when the
command line names the command. Nothing else imports this package.
"""
