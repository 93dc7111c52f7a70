"""Converting a checkpoint into a tiered store, one block after another, also while it is downloaded.

Others use ``convert``, ``plan`` (a plan without a download), ``conversion``, ``files`` and ``target``. The package
imports ``cli``, ``runtime`` and ``tiers``.
"""
