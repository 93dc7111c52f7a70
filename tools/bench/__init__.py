"""Benchmarks of this machine: disk, kernels, decoding, prefill and conversion, each beside its upper bound.

    convert, decode, prefill, disk, kernels  one measurement each
    datapoint  decoding and a prompt in five minutes, as Markdown
    model      what decode, prefill and datapoint share
    child      the process in which a model is measured
    sandbox    starts it, with dropped caches and limited memory
    bound      the least time of a step
    token_ids  the tokens that are fed
    output     options and output of all of them

Only ``commands`` uses it. The package imports ``cli``, ``rates``, ``traces``, ``synthetic``, ``runtime`` and ``tiers``.
"""
