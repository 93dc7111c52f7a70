"""The solver against the hqq package, and where the package goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from moetier.tiers import hqq

GROUP = 64
WIDTHS = (8, 4, 3, 2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(std: float, groups: int = 1500, seed: int = 0) -> torch.Tensor:
    """[groups, g]: normal, one in a thousand eight times as large."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(groups, GROUP, generator=generator) * std
    w[torch.rand(w.shape, generator=generator) < 1e-3] *= 8
    return w


def ours(w: torch.Tensor, bits: int, find: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """w as it is read back."""
    step = hqq.steps(w, bits)
    return w - hqq.residual(w, step, find(w, step, bits), bits)


def plain(w: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    return hqq.plain_offsets(w, step)


def packages(w: torch.Tensor, bits: int) -> torch.Tensor:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        w, nbits=bits, axis=1, group_size=GROUP, optimize=True, device="cpu", bitpack=False
    )
    read: torch.Tensor = (codes - meta["zero"]) * meta["scale"]
    return read


def mean_error(w: torch.Tensor, read: torch.Tensor) -> float:
    """What the solver watches."""
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
    w = weights(std, groups=200)
    at_ordinary_size = frobenius(weights(0.02, groups=200), ours(weights(0.02, groups=200), bits, hqq.solve))
    assert frobenius(w, ours(w, bits, hqq.solve)) == pytest.approx(at_ordinary_size, rel=0.02)
    assert frobenius(w, packages(w, bits)) > 2 * at_ordinary_size


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("std", [1e-6, 0.02, 3.0])
def test_better_than_plain_rounding_in_no_group_worse(bits: int, std: float) -> None:
    w = weights(std, groups=300)
    step = hqq.steps(w, bits)
    solved = hqq.residual(w, step, hqq.solve(w, step, bits), bits).abs().mean(1)
    rounded = hqq.residual(w, step, hqq.plain_offsets(w, step), bits).abs().mean(1)
    assert (solved <= rounded).all()
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
    w = torch.cat([weights(0.02, 90), weights(1e-4, 7, seed=1), torch.zeros(3, GROUP), weights(5.0, 20, seed=2)])
    step = hqq.steps(w, bits)
    together = hqq.solve(w, step, bits)
    apart = [hqq.solve(w[i : i + 1], step[i : i + 1], bits) for i in range(len(w))]
    assert torch.equal(together, torch.cat(apart))
    torch.set_num_threads(2)
    assert torch.equal(together, hqq.solve(w, step, bits))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.0217, 1e-30, 1e-42, -3e38])
def test_constant_groups_are_exact(bits: int, value: float) -> None:
    w = torch.full((5, GROUP), value)
    assert (hqq.steps(w, bits) == 0).all()
    assert torch.equal(ours(w, bits, hqq.solve), w)


@pytest.mark.parametrize("bits", WIDTHS)
def test_denormal_ranges_are_as_good_as_constant(bits: int) -> None:
    w = torch.randn(5, GROUP, generator=torch.Generator().manual_seed(0)) * 1e-41
    read = ours(w, bits, hqq.solve)
    assert read.isfinite().all()
    assert (read - w).abs().max() < 1e-40


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_steps_show_weights_that_are_no_numbers(wrong: float) -> None:
    w = weights(0.02, groups=3)
    w[1, 5] = wrong
    assert hqq.steps(w, 4).isfinite().tolist() == [True, False, True]
