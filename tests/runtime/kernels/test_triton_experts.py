"""Triton's kernels, in an environment with Triton, which takes 1 GB: run in its interpreter, and compiled for GPUs.

None of this shows that they are right, or fast, on a GPU.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from environments import with_packages
from places import ROOT

import moetier

PACKAGES = ["triton==3.9.0"]
TRIALS = ROOT / "tests" / "helpers" / "triton_trials.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    return with_packages(Path(request.config.cache.mkdir("triton")), PACKAGES, sees_ours=True)


def run(python: Path, *words: str) -> str:
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(moetier.__file__).parents[1]), str(TRIALS.parent)]),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    done = subprocess.run([python, TRIALS, *words], env=environ, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_blocks_are_as_near_to_the_ideal_as_the_exact_way(python: Path, first: int) -> None:
    """Random layouts, shapes, slots, top-k and repeated experts. Records that come late give the same bits, and bytes
    around the records are not in the results."""
    run(python, "random", str(first), str(first + 50))


def test_blocks_of_models(python: Path) -> None:
    """Those of Mixtral, with biases and interleaved (gpt-oss), transposed (Aria), without a gate (Nemotron-H)."""
    run(python, "models")


def test_a_model_on_the_simulated_device(python: Path, tinymix_4bit: Path) -> None:
    """The same bits with slots for few experts and for all, and near those of the exact way."""
    run(python, "model", str(tinymix_4bit))


def test_kernels_compile_for_gpus(python: Path) -> None:
    """Codes are loaded in words of 16 bytes, and weights rounded to the nearest bf16."""
    lines = [line.split() for line in run(python, "compile").splitlines()]
    assert len(lines) == 4 * 2 * 2
    for _, _, group, tokens, wide, narrow, rounds, cuts in lines:
        assert int(wide) > 0, lines
        assert int(narrow) == 0, lines
        assert int(rounds) >= (group == tokens == "64"), lines
        assert cuts == "0", lines
