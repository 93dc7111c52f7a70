"""Models and processes: loading and running a model over the tiers, and the daemon that shares one copy per machine.

``options`` has the declaration of an option; ``config`` declares those of loading once, for ``load``, the command
line, settings files and the daemon. ``device_names`` has a line for each device that can compute.
"""
