"""Processors that have some of the instructions of this one, for tests of what compiled code computes with them."""

from __future__ import annotations

import functools

import pytest

from moetier.runtime.kernels.jit.processor import Processor, this_processor

# LLVM's features by name; None: those of this processor
FEATURES = {"own": None, "avx512": "+avx512f,+avx512bw,+avx512vl,+avx512dq,+fma", "avx2": "+avx2,+fma", "plain": ""}


@functools.cache  # so that each kernel is compiled once
def processor_with(name: str) -> Processor:
    """Return a processor with one of FEATURES. Skip the test if this processor lacks one of them."""
    features = FEATURES[name]
    if features is None:
        return this_processor()
    if not set(filter(None, features.split(","))) <= this_processor().features:
        pytest.skip("this processor lacks these instructions")
    return Processor(features)
