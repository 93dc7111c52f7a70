"""Models and processes: loading and running a model over the tiers, and the daemon that shares one copy per machine.

Its own modules are what the packages share: configuration and its numbers, memory, threads, pulled models.
"""
