"""Quality of stored weights: the loss of a language model on a text.

Other packages use ``quality``. The package imports ``convert``, ``runtime`` and ``tiers``.
"""
