"""A process that has imported what scripts need: each runs in a fork of it, without the seconds that imports take."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

# what converting a mixtral imports
COMMANDS = (
    "moetier.tools.commands.convert",
    "moetier.tools.convert.convert",
    "transformers.models.mixtral.modeling_mixtral",
)
MAIN = "import sys; from moetier.tools.main import main; sys.exit(main())"  # the arguments are the command line

# A child leaves the loop, and ends as any interpreter does, when the script has ended: soon, as what was imported is
# frozen, and no collection at the end touches, and so copies, its pages.
SERVER = """
import gc, json, os, sys
exec(sys.argv[1])
gc.collect()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitpid(child, 0)[1], flush=True)
else:
    sys.exit()
for number, name in enumerate(("in", "out", "err")):
    file = os.open(os.path.join(job["folder"], name), os.O_RDWR)
    os.dup2(file, number)
    os.close(file)
os.environ.clear()
os.environ.update(job["environment"])
sys.argv[1:] = job["arguments"]
exec(compile(job["script"], "script", "exec"), {"__name__": "__main__"})
"""


class Prepared:
    """``run`` a script: a process of its own, whose signals, descriptors and exit status are real."""

    def __init__(
        self, modules: Iterable[str], environment: dict[str, str], python: str | Path = sys.executable
    ) -> None:
        self._environment = environment
        imports = "\n".join(f"import {name}" for name in modules)
        self._process = subprocess.Popen(
            [python, "-c", SERVER, imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            process_group=0,
        )

    def run(
        self,
        script: str,
        *arguments: object,
        input: str = "",
        environment: dict[str, str] | None = None,
        timeout: float = 250,
    ) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = [str(argument) for argument in arguments]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, text in {"in": input, "out": "", "err": ""}.items():
                (folder / file).write_text(text)
            variables = os.environ | self._environment | (environment or {})
            job = {"script": script, "arguments": words, "folder": name, "environment": variables}
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            assert select.select([self._process.stdout], [], [], timeout)[0], f"it hangs: {words}"
            line = self._process.stdout.readline()
            assert line, f"it ended with {self._process.wait()}"
            out, err = ((folder / file).read_text() for file in ("out", "err"))
        return subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(int(line)), out, err)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with a script that hangs
        self._process.communicate()


@contextlib.contextmanager
def prepared(
    *modules: str, commands: Iterable[str] = COMMANDS, python: str | Path = sys.executable, **environment: str
) -> Iterator[Prepared]:
    """Start a process that has imported ``commands`` and ``modules``, none of which begins a thread.

    ``environment`` is what they read when they are imported; ``python`` the interpreter, where it is not that of the
    tests.
    """
    process = Prepared((*commands, *modules), environment, python)
    try:
        yield process
    finally:
        process.close()
