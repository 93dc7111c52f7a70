"""The solver compared with the hqq package, and cases where the package goes wrong."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moetier.tiers.quant import hqq

GROUP = 64
WIDTHS = (8, 4, 3, 2)


def weights(std: float, groups: int = 1536, seed: int = 0) -> torch.Tensor:
    """Make weights [groups, g]: normal, one in a thousand eight times as large."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(groups, GROUP, generator=generator) * std
    w[torch.rand(w.shape, generator=generator) < 1e-3] *= 8
    return w


def side_by_side(w: torch.Tensor) -> torch.Tensor:
    """Reorder [groups, g] to [n, g, LANES], as the solver takes groups."""
    return w.view(-1, hqq.LANES, w.shape[1]).transpose(1, 2).contiguous()


def one_by_one(w: torch.Tensor) -> torch.Tensor:
    """Invert the reordering."""
    return w.transpose(1, 2).reshape(-1, w.shape[1])


def residual(w: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int) -> torch.Tensor:
    return (w - offset) - hqq.centred_codes(w, scale, offset, bits) * scale


def ours(w: torch.Tensor, bits: int, find: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Return w as it is read back, [groups, g]."""
    lanes = side_by_side(w)
    scale = hqq.scales(lanes, bits)
    return w - one_by_one(residual(lanes, scale, find(lanes, scale, bits), bits))


def plain(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return hqq.plain_offsets(w, scale)


def packages(w: torch.Tensor, bits: int) -> torch.Tensor:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        w, nbits=bits, axis=1, group_size=GROUP, optimize=True, device="cpu", bitpack=False
    )
    read: torch.Tensor = (codes - meta["zero"]) * meta["scale"]
    return read


def mean_error(w: torch.Tensor, read: torch.Tensor) -> float:
    """Compute the error that the solver minimises."""
    return float((read - w).abs().mean() / w.abs().mean())


def frobenius(w: torch.Tensor, read: torch.Tensor) -> float:
    return float((read - w).norm() / w.norm())


@pytest.mark.parametrize("bits", WIDTHS)
def test_as_good_as_the_package(bits: int) -> None:
    w = weights(0.02)
    theirs, mine = packages(w, bits), ours(w, bits, hqq.solve)
    assert mean_error(w, mine) == pytest.approx(mean_error(w, theirs), rel=0.01)
    assert frobenius(w, mine) == pytest.approx(frobenius(w, theirs), rel=0.01)


@pytest.mark.parametrize(("bits", "std"), [(8, 3e-4), (8, 1e-6), (4, 1e-5), (2, 1e-6)])
def test_small_weights_keep_their_bits_which_the_package_loses(bits: int, std: float) -> None:
    w = weights(std, groups=256)
    at_ordinary_size = frobenius(weights(0.02, groups=256), ours(weights(0.02, groups=256), bits, hqq.solve))
    assert frobenius(w, ours(w, bits, hqq.solve)) == pytest.approx(at_ordinary_size, rel=0.02)
    assert frobenius(w, packages(w, bits)) > 2 * at_ordinary_size


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("std", [1e-6, 0.02, 3.0])
def test_better_than_plain_rounding_in_no_group_worse(bits: int, std: float) -> None:
    w = weights(std, groups=320)
    lanes = side_by_side(w)
    scale = hqq.scales(lanes, bits)
    solved = residual(lanes, scale, hqq.solve(lanes, scale, bits), bits).abs().mean(1)
    rounded = residual(lanes, scale, hqq.plain_offsets(lanes, scale), bits).abs().mean(1)
    assert (solved <= rounded * (1 + 1e-4)).all()  # 8-bit scales are so small that fp32's last bits show
    assert solved.mean() < 0.99 * rounded.mean()
    assert frobenius(w, ours(w, bits, hqq.solve)) < frobenius(w, ours(w, bits, plain))


def test_shrinking_is_the_packages() -> None:
    from hqq.core.optimize import shrink_lp_op

    for size in (1e-3, 0.1, 0.3, 5.0):  # beyond about .17 the power is taken
        error = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * size
        mine = hqq._shrink(error, hqq.BETA)
        assert torch.allclose(torch.as_tensor(mine).expand_as(error), shrink_lp_op(error, hqq.BETA, hqq.LP_NORM))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_group_depends_on_itself_alone(bits: int) -> None:
    w = torch.cat([weights(0.02, 90), weights(1e-4, 7, seed=1), torch.zeros(3, GROUP), weights(5.0, 92, seed=2)])

    def solve(w: torch.Tensor) -> torch.Tensor:
        lanes = side_by_side(w)
        return hqq.solve(lanes, hqq.scales(lanes, bits), bits).view(-1)

    together, order = solve(w), torch.randperm(len(w), generator=torch.Generator().manual_seed(3))
    assert torch.equal(together[order], solve(w[order]))
    for group in range(0, len(w), 9):  # among zeros
        alone = torch.zeros(hqq.LANES, GROUP)
        alone[group % hqq.LANES] = w[group]
        assert solve(alone)[group % hqq.LANES] == together[group]
    torch.set_num_threads(2)
    assert torch.equal(together, solve(w))


def offsets() -> bytes:
    """Hash offsets for every width and group size, for small weights and for large ones, whose errors shrink."""
    found = []
    for bits, group, std in itertools.product(WIDTHS, (16, 32, 64, 128, 256), (0.02, 3.0)):
        drawn = np.random.default_rng(group).normal(scale=std, size=(4, group, hqq.LANES)).astype(np.float32)
        w = torch.from_numpy(drawn)
        found.append(hqq.solve(w, hqq.scales(w, bits), bits).numpy().tobytes())
    return b"".join(found)


@pytest.mark.slow  # tests/tiers/quant/test_codec.py compares the records that are made of them
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_offsets_do_not_depend_on_the_processor(capability: str) -> None:
    """To the last bit, before they are rounded. torch is told to use other instructions; it reads the variable when it
    is imported."""
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_hqq as t; sys.stdout.buffer.write(t.offsets())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert result.stdout == offsets()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.0217, 1e-30, 1e-42, -3e38])
def test_constant_groups_are_exact(bits: int, value: float) -> None:
    w = torch.full((hqq.LANES, GROUP), value)
    assert (hqq.scales(side_by_side(w), bits) == 0).all()
    assert torch.equal(ours(w, bits, hqq.solve), w)


@pytest.mark.parametrize("bits", WIDTHS)
def test_denormal_ranges_are_as_good_as_constant(bits: int) -> None:
    w = torch.randn(hqq.LANES, GROUP, generator=torch.Generator().manual_seed(0)) * 1e-41
    read = ours(w, bits, hqq.solve)
    assert read.isfinite().all()
    assert (read - w).abs().max() < 1e-40


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_steps_show_weights_that_are_no_numbers(wrong: float) -> None:
    w = weights(0.02, groups=hqq.LANES)
    w[1, 5] = wrong
    scales = hqq.scales(side_by_side(w), 4).view(-1)
    assert (~scales.isfinite()).nonzero().tolist() == [[1]]
