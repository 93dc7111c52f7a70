"""Models and processes: loading and running a model over the tiers, and the daemon that shares one copy per machine.

The modules directly in this folder are shared by its packages: options, memory, control groups, threads, context
lengths and pulled models.
"""
