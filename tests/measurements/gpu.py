"""Use the first minutes of a GPU well: check that the device tier is right on it, and measure it, in order of worth.

    python tests/measurements/gpu.py FOLDER            # at most 10 minutes; again, to go on where it stopped; 45 in all
    python tests/measurements/gpu.py FOLDER --simulate # the same course on a simulated device: its numbers mean nothing

FOLDER gets ``results.json`` after each step, ``page.md``, and the model. Each step is a process of its own
(``gpu_steps.py``), so a fault of the device ends only that step; its traceback is in the results. A step that has
ended, well or not, is not run again unless ``--again`` names it. Torch is that of this environment if it can use the
GPU, else torch for CUDA from its own index is installed into FOLDER/environment. It has never run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALL_SECONDS, ALL_SECONDS = 600, 2700
MIN_SECONDS = 20  # with fewer left, no step begins
TRIES = 2  # of a step that a call's end has cut off
HELPERS = Path(__file__).parent.parent / "helpers"
INDEX = "https://download.pytorch.org/whl/cu128"
CUDA_WORKS = "import torch; assert torch.cuda.is_available(), torch.__version__ + ' finds no GPU'"

# tokens/s of the paper's Table 2 (arXiv 2312.17238): Mixtral-8x7B with 2-bit experts
PAPER = {
    "A100": (3.061, 2.918, 2.265, 1.392),
    "3080 Mobile": (2.655, 2.227, 1.758, 1.059),
    "3060": (2.278, 2.051, 1.547, 0.919),
    "T4": (2.092, 1.567, 1.168, 0.661),
}
ABLATION = ("decode 50%", "ablation: no pre-loading", "ablation: no LRU", "accelerate 50%")


@dataclass(frozen=True, slots=True)
class Step:
    """A step: its name, a function of ``gpu_steps`` with its arguments, and the most seconds that it may take."""

    name: str
    function: str
    seconds: int
    arguments: Mapping[str, Any]
    after: tuple[str, ...] = ()  # steps without whose results it can't run


def step(name: str, function: str, seconds: int, *after: str, **arguments: Any) -> Step:
    """Return a Step."""
    return Step(name, function, seconds, arguments, after)


STEPS = (
    step("machine", "machine", 90),
    step("correctness", "correctness", 400),
    step("kernels: right", "kernels_are_right", 120),
    step("model", "make_model", 500),
    step("decode 100%", "decode", 150, "model", share=1.0, profiles=True),
    step("decode 100%, one by one", "decode", 150, "model", share=1.0, profiles=True, together=False),
    step("kernels: rate", "kernel_rates", 120),
    step("decode 50%", "decode", 150, "model", share=0.5, profiles=True),
    step("transformers, all resident", "transformers_decode", 150, "model"),
    step("accelerate 50%", "transformers_decode", 200, "model", share=0.5),
    step("decode 75%", "decode", 120, "model", share=0.75),
    step("decode 25%", "decode", 120, "model", share=0.25),
    step("ablation: no pre-loading", "decode", 120, "model", share=0.5, speculate="off"),
    step("ablation: no LRU", "decode", 120, "model", share=0.0, speculate="off"),
    step("prefill 100%", "prefill", 120, "model", share=1.0),
    step("prefill 50%", "prefill", 120, "model", share=0.5),
    step("accelerate 25%", "transformers_decode", 200, "model", share=0.25),
)


class Course:
    """The results so far, and the time that is left."""

    def __init__(self, folder: Path, *, simulate: bool, call_seconds: float, all_seconds: float) -> None:
        self.folder, self._simulate = folder, simulate
        self._all_seconds = all_seconds
        self._until = time.monotonic() + call_seconds
        self._path = folder / "results.json"
        self.results: dict[str, Any] = {"simulated": simulate, "spent_s": 0.0, "steps": {}}
        if self._path.exists():
            self.results = json.loads(self._path.read_text())
            if self.results["simulated"] != simulate:
                raise SystemExit(f"{folder} has the results of another course: give another folder.")

    @property
    def left(self) -> float:
        """Seconds that the next step may take."""
        return min(self._until - time.monotonic(), self._all_seconds - self.results["spent_s"])

    def save(self) -> None:
        """Write the results, and the page."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.results, indent=1))
        new.replace(self._path)
        (self.folder / "page.md").write_text(page(self.results))

    def run(self, say: Callable[[str], object]) -> bool:
        """Run the steps that are left, as far as time permits. Return whether none is left."""
        began = time.monotonic()
        python = str(sys.executable)
        try:
            python = python if self._simulate else environment(self.folder, self.left)
        except Exception as error:  # no other step can run then
            self.results["steps"]["environment"] = {"state": "failed", "seconds": 0, "error": str(error)}
        self.results["spent_s"] += time.monotonic() - began
        self.save()
        if self.results["steps"].get("environment", {}).get("state") == "failed":
            return False
        for each in STEPS:
            entry = self.results["steps"].setdefault(each.name, {"state": "left", "tries": 0})
            if entry["state"] != "left":
                continue
            lacking = [name for name in each.after if self.results["steps"][name]["state"] != "done"]
            if lacking:
                self.save()
                say(f"{each.name}: left out, as there is no {', '.join(lacking)}")
                continue
            if self.left < min(MIN_SECONDS, each.seconds):
                say("no time is left: run it again, to go on")
                return False
            self._run(each, entry, python)
            self.save()
            say(f"{each.name}: {entry['state']}, {entry['seconds']:.0f} s")
        return True

    def _run(self, step: Step, entry: dict[str, Any], python: str) -> None:
        given = {**step.arguments, "folder": str(self.folder.absolute()), "simulate": self._simulate}
        result = self.folder / "step.json"
        result.unlink(missing_ok=True)
        command = [python, str(Path(__file__).with_name("gpu_steps.py")), step.function, str(result)]
        limit, began = self.left if self._simulate else min(step.seconds, self.left), time.monotonic()
        environ = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, package_paths()), str(HELPERS)])}
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environ, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = child.communicate(json.dumps(given), timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            said, _ = child.communicate()
            entry["tries"] += 1
            is_over = limit >= step.seconds or entry["tries"] >= TRIES
            entry |= {"state": "failed" if is_over else "left", "error": f"stopped after {limit:.0f} s\n{said[-4000:]}"}
        else:
            if child.returncode or not result.exists():
                entry |= {"state": "failed", "error": said[-6000:]}
            else:
                entry |= {"state": "done", "result": json.loads(result.read_text())}
                entry.pop("error", None)
        seconds = time.monotonic() - began
        entry["seconds"] = entry.get("seconds", 0.0) + seconds
        self.results["spent_s"] += seconds


def package_paths() -> list[Path]:
    """Return the folder from which moetier is imported here."""
    import moetier

    return [Path(path).parent for path in moetier.__path__][:1]


def environment(folder: Path, seconds: float) -> str:
    """Return a Python whose torch can use the GPU. Raises RuntimeError."""
    if not subprocess.run([sys.executable, "-c", CUDA_WORKS], capture_output=True, check=False).returncode:
        return sys.executable
    place = folder / "environment"
    python = str(place / "bin" / "python")
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, timeout=seconds)
        command = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--extra-index-url",
            INDEX,
            f"{Path(__file__).parents[2]}[test]",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"torch for CUDA can't be installed:\n{done.stderr[-3000:]}")
        (place / "ready").touch()
    done = subprocess.run([python, "-c", CUDA_WORKS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return python


def page(results: Mapping[str, Any]) -> str:
    """Return the results as a page of Markdown."""
    simulated, steps = results["simulated"], results["steps"]
    title = "# A simulated device: no number here means anything" if simulated else "# A GPU"
    lines = [title, "", f"{results['spent_s']:.0f} s in all.", "", "| step | state | s | result |", "|---|---|---|---|"]
    for name, entry in steps.items():
        shown = json.dumps({key: value for key, value in entry.get("result", {}).items() if key != "profile"})
        lines.append(f"| {name} | {entry['state']} | {entry.get('seconds', 0):.0f} | {shown} |")
    lines += ["", "## Beside the paper's Table 2", "", "Speeds divided by that with everything.", ""]
    lines += ["| | everything | no pre-loading | no LRU | naive |", "|---|---|---|---|---|"]
    for card, speeds in PAPER.items():
        lines.append(f"| {card}, Mixtral (paper) | {' | '.join(f'{speed / speeds[0]:.2f}' for speed in speeds)} |")
    ours = [steps.get(name, {}).get("result", {}).get("tokens_per_s") for name in ABLATION]
    shares = [f"{speed / ours[0]:.2f}" if speed and ours[0] else "-" for speed in ours]
    lines += [f"| this one, half of the experts in slots | {' | '.join(shares)} |", ""]
    for name, entry in steps.items():
        if profile := entry.get("result", {}).get("profile"):
            lines += [f"## Profile of a step: {name}", "", "```text", profile, "```", ""]
        if "error" in entry:
            lines += [f"## {name}: {entry['state']}", "", "```text", entry["error"].strip(), "```", ""]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Run the steps that are left; return 0 if none is left, else 1."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--simulate", action="store_true", help="use a simulated device, and a toy model")
    parser.add_argument("--again", action="append", default=[], metavar="STEP", help="run this step again")
    parser.add_argument("--call-seconds", type=float, default=CALL_SECONDS, help="seconds of this call")
    parser.add_argument("--all-seconds", type=float, default=ALL_SECONDS, help="seconds of all calls")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    course = Course(
        arguments.folder,
        simulate=arguments.simulate,
        call_seconds=arguments.call_seconds,
        all_seconds=arguments.all_seconds,
    )
    for name in [*arguments.again, "environment"]:
        course.results["steps"].pop(name, None)
    is_over = course.run(lambda line: print(line, flush=True))
    print(f"{arguments.folder / 'page.md'}: {course.results['spent_s']:.0f} s in all")
    return 0 if is_over else 1


if __name__ == "__main__":
    sys.exit(main())
