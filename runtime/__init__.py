"""Models and processes: loading and running a model over the tiers, and the daemon that shares one copy per machine.

``config`` declares the options of loading once, for ``load``, the command line, settings files and the daemon.
"""
