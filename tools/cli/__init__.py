"""Shared parts of commands: the parser, groups of arguments, settings, loading, progress, reports and failures.

The package imports ``runtime`` and ``tiers``, and no other package of ``tools``.
"""
