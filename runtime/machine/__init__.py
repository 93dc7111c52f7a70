"""Limits of this process: memory, CPUs, and the control groups that reduce both.

Other packages use ``memory`` (free bytes, budgets) and ``threads`` (the number of threads to compute with). The package
imports ``runtime.config`` and ``tiers``.
"""
