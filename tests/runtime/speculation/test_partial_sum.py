from __future__ import annotations

from moetier.runtime.speculation.partial_sum import TRIALS, PartialSum


def test_what_names_more_is_taken() -> None:
    for with_it, without, better in ((2, 1, True), (1, 2, False), (1, 1, False)):
        tried = PartialSum()
        for _ in range(TRIALS):
            assert tried.is_tried
            assert not tried.is_better
            tried.judge(with_it, without)
        assert not tried.is_tried
        assert tried.is_better is better
        for _ in range(2 * TRIALS):
            tried.judge(0, 2)
        assert tried.is_better is better, "once it is known it stays"
