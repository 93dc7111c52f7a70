"""The course of ``gpu.py`` on the simulated device, and what it does with time that runs out and steps that fail."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest


def results(folder: Path) -> dict[str, dict[str, object]]:
    found = json.loads((folder / "results.json").read_text())
    assert found["simulated"]
    return found["steps"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_course_on_the_simulated_device(tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--simulate", "--call-seconds", "2700"]) == 0
    steps = results(tmp_path)
    assert [*steps] == [step.name for step in gpu.STEPS]
    assert {name: step.get("error") for name, step in steps.items() if step["state"] != "done"} == {}
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# A simulated device: no number here means anything")
    assert "| A100, Mixtral (paper) | 1.00 | 0.95 | 0.74 | 0.45 |" in page
    assert "| - |" not in page


def test_a_step_that_fails_is_kept_with_its_traceback_and_one_that_is_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, endless = gpu.step("broken", "no_such_step", 60), gpu.step("endless", "machine", 3600)
    needs = gpu.step("needs it", "machine", 60, "broken")
    monkeypatch.setattr(gpu, "STEPS", (broken, needs))
    assert gpu.main([str(tmp_path), "--simulate"]) == 0
    steps = results(tmp_path)
    assert steps["broken"]["state"] == "failed"
    assert "KeyError: 'no_such_step'" in (tmp_path / "page.md").read_text()
    assert steps["needs it"]["state"] == "left"
    monkeypatch.setattr(gpu, "STEPS", (broken, endless))
    monkeypatch.setattr(gpu.Course, "left", 0.01)
    monkeypatch.setattr(gpu, "MIN_SECONDS", 0)  # there is just enough time to begin it
    for expected in ("left", "failed"):  # the second time it is given up
        gpu.main([str(tmp_path), "--simulate"])
        assert results(tmp_path)["endless"]["state"] == expected
        assert results(tmp_path)["broken"]["seconds"] == steps["broken"]["seconds"], "it was not run again"


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--simulate", "--all-seconds", "1"]) == 1
    assert all(step["state"] == "left" for step in results(tmp_path).values())


def test_a_folder_of_another_course_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"simulated": False, "spent_s": 0, "steps": {}}))
    with pytest.raises(SystemExit, match="another course"):
        gpu.main([str(tmp_path), "--simulate"])
