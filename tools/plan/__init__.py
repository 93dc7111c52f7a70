"""Estimates for ``moetier plan``: a model's sizes, memory and speed on this machine, before its weights are downloaded.

Other packages use ``forecast`` and ``fit``. The package imports ``cli``, ``convert``, ``rates``, ``traces``,
``runtime`` and ``tiers``.
"""
