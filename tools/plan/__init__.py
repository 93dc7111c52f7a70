"""Estimates for ``moetier plan``: a model's sizes, memory and speed on this machine, before its weights are downloaded.

    api       ``moetier.plan``
    forecast  plans a model on this machine
    choices   what a model may be converted to
    fit       whether a choice works here, and its slots
    speeds    measures this machine
    estimate  computes time and size of each choice
    cards     computes what GPUs would do by their data sheets
    cold      the first start of a model in an object store

Other packages use ``forecast`` and ``fit``; ``doctor`` uses ``cards``. The package imports ``cli``, ``convert``,
``rates``, ``traces``, ``runtime`` and ``tiers``.
"""
