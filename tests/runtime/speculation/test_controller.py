from __future__ import annotations

import random

import pytest

from moetier.runtime.config import SpeculationMode
from moetier.runtime.speculation.controller import HOLD, LONGEST, PAIRS, SPAN, Controller

TRIAL = 2 * PAIRS * SPAN  # steps


def run(controller: Controller, steps: int, *, on: float, off: float = 1.0, noise: float = 0.0, seed: int = 0) -> float:
    """Seconds that the steps took, where each takes as long as is said, more or less."""
    chance = random.Random(seed)
    total = 0.0
    for _ in range(steps):
        seconds = (on if controller.is_on else off) * chance.gauss(1.0, noise)
        controller.step(seconds)
        total += seconds
    return total


def test_the_modes_that_are_no_question() -> None:
    off, always = Controller(SpeculationMode.OFF), Controller(SpeculationMode.ALWAYS)
    run(off, 500, on=0.1)
    run(always, 500, on=10.0)
    always.reject()
    assert (off.is_on, off.steps_on, off.steps_off) == (False, 0, 500)
    assert (always.is_on, always.steps_on, always.steps_off) == (True, 500, 0)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("on", [0.8, 0.9])
def test_what_gains_stays_on(on: float, noise: float) -> None:
    controller = Controller(SpeculationMode.AUTO)
    run(controller, TRIAL, on=on, noise=noise)
    assert controller.is_on
    run(controller, 10_000, on=on, noise=noise, seed=1)
    assert controller.steps_on > 0.85 * (controller.steps_on + controller.steps_off)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("on", [0.85, 1.15])
def test_chance_does_not_decide(on: float, seed: int) -> None:
    """Times of steps differ by a third, as chance has it how many experts they lack."""
    chance, controller = random.Random(seed), Controller(SpeculationMode.AUTO)
    for _ in range(TRIAL):
        misses = sum(chance.random() < 0.3 for _ in range(16))
        controller.step((on if controller.is_on else 1.0) * (0.5 + 0.1 * misses) * chance.gauss(1.0, 0.03))
    assert controller.trials == 1
    assert controller.is_on == (on < 1)


@pytest.mark.parametrize("on", [1.02, 1.1, 2.0])
def test_what_loses_is_off_soon_and_costs_little(on: float) -> None:
    controller = Controller(SpeculationMode.AUTO)
    total = run(controller, TRIAL, on=on, noise=0.002)
    assert not controller.is_on
    assert total < TRIAL * (1 + 0.55 * (on - 1))
    assert run(Controller(SpeculationMode.AUTO), 2_000, on=on) < 2_000 * (1 + 0.1 * (on - 1))


@pytest.mark.parametrize("seed", range(20))
def test_a_trial_ends_in_time(seed: int) -> None:
    """Also where there is nothing to be found but noise."""
    controller = Controller(SpeculationMode.AUTO)
    run(controller, TRIAL, on=1.0, noise=0.1, seed=seed)
    assert controller.trials == 1


def test_drift_is_not_taken_for_a_gain() -> None:
    """Steps take longer with every token, as they do with a longer context."""
    controller = Controller(SpeculationMode.AUTO)
    for step in range(TRIAL):
        controller.step((1.0 + 0.01 * step) * (1.01 if controller.is_on else 1.0))
        assert not controller.trials or not controller.is_on
    assert controller.trials


def test_a_verdict_is_tried_again() -> None:
    """What lost gains later, and the other way round."""
    controller = Controller(SpeculationMode.AUTO)
    run(controller, TRIAL, on=1.1)
    assert not controller.is_on
    run(controller, HOLD + TRIAL, on=0.9)
    assert controller.is_on
    run(controller, HOLD + TRIAL, on=1.1)
    assert not controller.is_on
    assert controller.trials == 3


def test_the_same_verdict_holds_ever_longer() -> None:
    controller = Controller(SpeculationMode.AUTO)
    run(controller, 100_000, on=0.9)
    assert controller.trials <= 100_000 / LONGEST + 10
    assert controller.steps_on > 0.96 * 100_000


def test_one_odd_step_decides_nothing() -> None:
    """Between two steps the caller did something else."""
    controller = Controller(SpeculationMode.AUTO)
    for step in range(TRIAL):
        controller.step((50.0 if step % 8 == 3 else 1.0) * (0.95 if controller.is_on else 1.0))
    assert controller.is_on


def test_no_after_no_is_tried_ever_less_often() -> None:
    controller = Controller(SpeculationMode.AUTO)
    run(controller, 100_000, on=1.1)
    assert controller.trials <= 100_000 / LONGEST + 10
    assert controller.steps_on < 0.03 * 100_000


def test_wrong_predictions_end_it_at_once() -> None:
    controller = Controller(SpeculationMode.AUTO)
    run(controller, 3, on=1.0)
    controller.reject()
    assert not controller.is_on
    run(controller, HOLD, on=1.0)
    assert controller.is_on, "until they are tried again"


def test_a_window_that_was_interrupted_does_not_count() -> None:
    controller = Controller(SpeculationMode.AUTO)
    for _ in range(200):  # an odd step in each window, as a prefill of somebody else's is
        run(controller, SPAN - 1, on=1.0)
        controller.interrupt()
    assert controller.trials == 0
    assert controller.is_on
