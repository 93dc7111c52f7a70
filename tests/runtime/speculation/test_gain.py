from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetier.runtime.speculation.gain import break_even
from moetier.tiers.source import Pace

shares = st.floats(0.01, 1)
paces = st.builds(
    lambda read, grain, saved: Pace(read, read * grain, read * saved), st.floats(1e-5, 10), st.floats(0.1, 0.99), shares
)


@given(paces, shares, shares)
def test_there_what_is_gained_is_what_is_lost(pace: Pace, lacks: float, regrets: float) -> None:
    likely = break_even(pace, lacks=lacks, regrets=regrets)
    late = min(pace.read - pace.saved, pace.grain / 2)  # seconds that a demand waits for what is in its way
    assert 0 < likely < 1
    assert likely * pace.saved == pytest.approx((1 - likely) * (lacks * late + regrets * pace.read))


def test_what_can_not_be_given_up_is_in_the_way_of_the_first_that_reads() -> None:
    """Demands at 2, 4 and 6 of 8 ms, of which every second one reads: it waits 6, 4 or 2 ms."""
    likely = break_even(Pace(0.008, 0.008, 0.002), lacks=0.5, regrets=0.0)
    cost = 0.5 * 0.006 + 0.25 * 0.004 + 0.125 * 0.002
    assert likely == pytest.approx(cost / (0.002 + cost))
    assert break_even(Pace(0.008, 0.008, 1e-9), lacks=1e-9, regrets=0.0) < 1, "it ends"


def test_where_nothing_is_read_in_time_no_guess_is_worth_it() -> None:
    assert break_even(Pace(0.004, 0.004, 0.0), lacks=0.5, regrets=0.4) == 1


def test_where_nothing_is_lost_any_is() -> None:
    assert break_even(Pace(0.001, 0.001, 0.001), lacks=0.5, regrets=0.0) == 0


def test_a_slow_disk_wants_surer_guesses_than_a_fast_one() -> None:
    """One whose reads are over before the demand delays nothing by a wrong guess."""
    fast, slow = Pace(0.001, 0.001, 0.001), Pace(0.008, 0.008, 0.002)
    assert break_even(fast, lacks=0.5, regrets=0.4) < break_even(slow, lacks=0.5, regrets=0.4)


def test_who_can_stand_back_delays_less() -> None:
    patient, other = Pace(0.008, 0.001, 0.002), Pace(0.008, 0.008, 0.002)
    assert break_even(patient, lacks=1.0, regrets=0.1) < break_even(other, lacks=1.0, regrets=0.1)


def test_what_evicts_nothing_before_its_demand_regrets_nothing() -> None:
    beside, evicting = Pace(0.008, 0.001, 0.002, beside=0.003), Pace(0.008, 0.001, 0.002, beside=0.002)
    assert break_even(beside, lacks=0.5, regrets=0.4) == break_even(evicting, lacks=0.5, regrets=0.0)
    assert break_even(beside, lacks=0.5, regrets=0.4) < break_even(evicting, lacks=0.5, regrets=0.4)
