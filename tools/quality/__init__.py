"""Quality of stored weights: the loss of a language model on a text.

Others use ``quality``. Imports ``convert``, ``runtime`` and ``tiers``.
"""
