"""Converting a checkpoint into a tiered store, one block after another, also while it is downloaded.

Others use ``conversion``, ``plan`` (a plan without a download), ``files`` and ``target``. The package imports ``cli``,
``runtime`` and ``tiers``.
"""
