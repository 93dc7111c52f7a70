"""List the functions and modules of moetier that five common operations call.

    python tests/measurements/walks.py [--functions]

Converts the bundled model into a temporary folder, runs each operation once, and records the calls of moetier's
functions in all threads (``sys.setprofile``):

    hit         one block computes one token, and its experts are in memory
    miss        the same, but its experts are read from the store first
    prediction  from the prediction by a gate to the host tier's prefetch queue, in the thread that computes
    convert     ``moetier convert``, once its command line is read
    daemon      the miss with experts from a daemon: one request, in the client and in the daemon

Prints for each operation the number of functions and files, and the modules in the order of their first call.
``--functions`` adds the names of the functions. Lambdas, comprehensions, code that runs when a module is imported, and
gRPC's own threads are not counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

MODEL = Path(__file__).parents[1] / "assets" / "tinymix"
RAM = "3520KiB"  # for a quarter of the experts
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))  # experts of a block
STEPS = 64  # of decoding, in which a prediction has to reach the prefetch queue


class Call(NamedTuple):
    thread: int
    depth: int  # of moetier's functions above it on the stack
    module: str
    function: str


class Recorder:
    """The calls of moetier's functions, while ``flag`` is 1. ``start`` comes before any other thread of the process."""

    def __init__(self, flag: Path) -> None:
        self.calls: list[Call] = []
        self._depths = collections.Counter[int]()
        self._imports = collections.Counter[int]()  # under way; what they call is no walk's
        with flag.open("r+b") as file:
            self._flag = mmap.mmap(file.fileno(), 1)

    def start(self) -> None:
        threading.setprofile(self._event)
        sys.setprofile(self._event)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """A list that has the calls of all threads since."""
        self.calls = []
        self._depths.clear()
        self._imports.clear()
        self._flag[0] = 1
        try:
            yield self.calls
        finally:
            self._flag[0] = 0

    def _event(self, frame: FrameType, event: str, _argument: object) -> None:
        if not self._flag[0] or event not in ("call", "return"):
            return
        module: str = frame.f_globals.get("__name__", "")
        if not module.startswith("moetier."):
            return
        code, thread, change = frame.f_code, threading.get_ident(), 1 if event == "call" else -1
        if code.co_name == "<module>":
            self._imports[thread] += change
        elif not self._imports[thread]:
            self._depths[thread] += change
            is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")  # no class's body
            if event == "call" and is_function:
                self.calls.append(Call(thread, self._depths[thread], module.removeprefix("moetier."), code.co_qualname))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", action="store_true", help="name the functions of each module")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    with tempfile.TemporaryDirectory() as name:
        for walk, calls in walks(Path(name)):
            print(report(walk, calls, arguments.functions), flush=True)


def report(walk: str, calls: list[Call], functions: bool) -> str:
    """The numbers of a walk, and its modules in the order of their first call."""
    by_module: dict[str, list[str]] = {}
    for module, function in dict.fromkeys((call.module, call.function) for call in calls):
        by_module.setdefault(module, []).append(function)
    lines = [f"{walk}: {sum(map(len, by_module.values()))} functions in {len(by_module)} files"]
    for number, (module, names) in enumerate(by_module.items(), 1):
        lines.append(f"  {number:3} {module:36} {len(names):3}" + (f"  {' '.join(names)}" if functions else ""))
    return "\n".join(lines)


def walks(folder: Path) -> Iterator[tuple[str, list[Call]]]:
    """Each walk with its calls."""
    flag = folder / "flag"
    flag.write_bytes(b"\0")
    recorder = Recorder(flag)
    recorder.start()
    import moetier
    from moetier.tools.main import main as moetier_command

    store = folder / "store"
    with recorder.recording() as converted, contextlib.redirect_stdout(sys.stderr):
        assert moetier_command(["convert", str(MODEL), str(store), "--bits", "4"]) == 0

    options: dict[str, Any] = {"daemon": None, "threads": 1}
    yield "hit", one_block(*moetier.load(store, ram="100%", speculate="off", **options), recorder, hits=True)
    yield "miss", one_block(*moetier.load(store, ram=RAM, speculate="off", **options), recorder, hits=False)
    yield "prediction", prediction(*moetier.load(store, ram=RAM, speculate="always", **options), recorder)
    began = next(index for index, call in enumerate(converted) if call[2:] == ("tools.commands.convert", "run"))
    yield "convert", converted[began:]

    sockets, calls = folder / "daemon", folder / "calls.json"
    ready, descriptor = os.pipe()
    command = [sys.executable, __file__, "--serve", *map(str, (store, sockets, flag, calls, descriptor))]
    with subprocess.Popen(command, pass_fds=[descriptor]) as daemon:
        os.close(descriptor)
        try:
            assert os.read(ready, 16), "the daemon ended"
            loaded = moetier.load(store, daemon=str(sockets), speculate="off", threads=1)
            yield "daemon, side of the client", one_block(*loaded, recorder, hits=False)
        finally:
            daemon.send_signal(signal.SIGTERM)
    yield "daemon, side of the daemon", [Call(*call) for call in json.loads(calls.read_text())]


def one_block(model: Any, _tokenizer: object, recorder: Recorder, hits: bool) -> list[Call]:
    """The calls of one block that computes a token with two experts: both hits, or both misses."""
    import torch

    blocks = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    hidden = torch.ones(1, model.config.hidden_size, dtype=model.dtype)
    weights = torch.full((1, 2), 0.5, dtype=model.dtype)

    def count() -> tuple[int, int]:
        (tier,) = model.tiers.snapshot().values()
        return tier["hits"], tier["misses"]

    with model.tiers, torch.no_grad():
        for block in blocks:  # until all slots are full
            for pair in PAIRS:
                block(hidden, torch.tensor([pair]), weights)
        for block, pair in ((block, pair) for block in blocks for pair in PAIRS):
            before = count()
            with recorder.recording() as calls:
                block(hidden, torch.tensor([pair]), weights)
            after = count()
            if (after[0] - before[0], after[1] - before[1]) == ((2, 0) if hits else (0, 2)):
                return calls
    raise AssertionError("no such block")


def prediction(model: Any, tokenizer: Any, recorder: Recorder) -> list[Call]:
    """The calls of the shortest prediction of some steps that reaches the prefetch queue."""
    import torch

    walks: list[list[Call]] = []
    token = tokenizer("La", return_tensors="pt").input_ids[:, :1]
    cache = None
    with model.tiers, torch.no_grad():
        for _ in range(STEPS):
            with recorder.recording() as calls:
                output = model(token, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
            walks += predictions([call for call in calls if call.thread == threading.get_ident()])
    return min(walks, key=lambda calls: len({call[2:] for call in calls}))


def predictions(calls: list[Call]) -> Iterator[list[Call]]:
    """Yield each call of one thread that enters ``runtime.speculation``, with all calls inside it.

    A call is left out if the host tier's ``prefetch`` is not among those.
    """
    inside: list[Call] = []
    for call in calls:
        if inside and call.depth > inside[0].depth:
            inside.append(call)
            continue
        if any(each.function == "HostTier.prefetch" for each in inside):
            yield inside
        inside = [call] if call.module.startswith("runtime.speculation") else []


def serve(store: str, folder: str, flag: str, calls: str, ready: str) -> None:
    """A daemon that records its calls, and writes them to ``calls`` when it ends."""
    recorder = Recorder(Path(flag))
    recorder.start()
    from moetier.tools.main import main as moetier_command

    code = moetier_command(["daemon", store, "--folder", folder, "--ram", RAM, "--ready-fd", ready])
    Path(calls).write_text(json.dumps(recorder.calls))
    sys.exit(code)


if __name__ == "__main__":
    main()
