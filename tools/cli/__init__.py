"""What commands share: the parser, groups of options, settings, progress, reports and failures.

The package imports ``runtime`` and ``tiers``, and no other package of ``tools``.
"""
