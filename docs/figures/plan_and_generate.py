"""Draws a real session: `moetier plan`, then `moetier generate` with `top` beside it.

    moetier synthetic build/synthetic/mixtral-4L --geometry mixtral-4L --store build/synthetic/mixtral-4L-4bit
    python docs/figures/plan_and_generate.py build/synthetic/mixtral-4L-4bit

writes docs/figures/plan-and-generate.svg. The model is four layers of Mixtral-8x7B with random weights, so its
text is noise. The plan is that of a folder with the model's config.json and index alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyte
from terminal import svg

from moetier.tools.synthetic.checkpoint import config_of, shapes_of

COLUMNS, LINES, TOP_LINES = 110, 40, 9
SECONDS = 120.0  # of a command
OPTIONS = ["--ram", "1.5GiB", "--context", "2048"]


class Session:
    """A terminal in memory, in which programs run one after the other."""

    def __init__(self, lines: int) -> None:
        self.screen = pyte.Screen(COLUMNS, lines)
        self.stream = pyte.ByteStream(self.screen)

    def run(
        self, command: Sequence[str], shown: str, folder: Path, beside: Callable[[int], None] | None = None
    ) -> None:
        """Run ``command``, begun as ``$ shown``. ``beside`` is called once, with its process id."""
        if shown:
            self.stream.feed(f"\x1b[32m$\x1b[0m {shown}\r\n".encode())
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", self.screen.lines, COLUMNS, 0, 0))
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=folder,
            env=os.environ | {"TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(self.screen.lines)},
        )  # fmt: skip
        os.close(slave)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ready, _, _ = select.select([master], [], [], 0.2)
            try:
                text = os.read(master, 65536) if ready else b""
            except OSError:  # the program has ended
                break
            self.stream.feed(text)
            if text and beside is not None:
                beside, call = None, beside
                call(process.pid)
            if not text and process.poll() is not None:
                break
        os.close(master)
        process.wait(SECONDS)


def index_only(folder: Path) -> None:
    """Write config.json and the index of a checkpoint into ``folder``."""
    config = config_of("mixtral-4L")
    names = dict.fromkeys(shapes_of(config), "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def draw(model: Path) -> str:
    """Return the picture, of a session with ``model``."""
    moetier = [sys.executable, "-m", "moetier.tools.main"]
    session, beside = Session(LINES), Session(TOP_LINES)

    def top(pid: int) -> None:
        while not (noise.exists() and noise.stat().st_size):
            time.sleep(0.1)
        time.sleep(1.0)  # while it decodes
        beside.run(["top", "-b", "-n", "1", "-w", str(COLUMNS), "-p", str(pid)], f"top -p {pid}", Path())

    with tempfile.TemporaryDirectory() as place:
        noise = Path(place) / "noise.txt"
        (Path(place) / model.name).symlink_to(model.resolve())
        index_only(Path(place) / "mixtral-4L")
        plan = ["plan", "mixtral-4L", "--bits", "16,4,3", "--trunk-bits", "16", *OPTIONS]
        session.run([*moetier, *plan], " ".join(["moetier", *plan]), Path(place))
        session.stream.feed(b"\r\n")
        generate = ["generate", model.name, *OPTIONS, "-n", "48", "Once upon a time"]
        shown = " ".join(["moetier", *generate[:-1], "'Once upon a time' > noise.txt"])
        command = 'exec "$0" -m moetier.tools.main "$@" > noise.txt'
        session.run(["sh", "-c", f"echo; {command}", sys.executable, *generate], shown, Path(place), top)
    return svg((session.screen, "moetier plan, moetier generate"), (beside.screen, "meanwhile"))


if __name__ == "__main__":
    Path(__file__).with_name("plan-and-generate.svg").write_text(draw(Path(sys.argv[1])))
