"""Limits of this process: memory, CPUs, and the control groups that reduce both.

Others use ``memory`` (bytes that may be used, page locking) and ``threads`` (number of threads to compute with).
Imports ``runtime.config`` and ``tiers``.
"""
