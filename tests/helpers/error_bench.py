"""A place where faults are injected and commands are run, and what they say of them, in words that stay."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prepared import MAIN, Prepared

# what is written in place of what differs
_WORDS = (
    (r"port \d+", "port PORT"),
    (r"this is (moetier )?\d+(\.\w+)+", r"this is \1VERSION"),
    (r"process \d+", "process PID"),
    (r"kill \d+", "kill PID"),
    (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
    (r"\b[0-9a-f]{12,64}\b", "DIGEST"),
    (r"transformers (\()?\d+\.[\w.]+", r"transformers \1VERSION"),
    (r"models of \d+ types", "models of N types"),
    (r"crc32c [0-9a-f]{8}, [0-9a-f]{8}", "crc32c CRC, CRC"),
)
SIZE = (r"\d[\d.]* ([KMGT]i)?B\b", "SIZE")  # of memory and disks that differ
BYTES = (r"\b\d[\d,]{3,}\b", "BYTES")


@dataclass
class Said:
    """Output of a command, without what differs between runs."""

    command: str
    code: int
    text: str

    def __str__(self) -> str:
        return f"$ {self.command}\n{self.text}exit {self.code}\n"


@dataclass
class Bench:
    """Resources of the cases: a folder, a model directory and a checkpoint to copy, prepared processes."""

    folder: Path
    whole_model: Path
    whole_source: Path
    scripts: Prepared
    names: dict[str, str] = field(default_factory=dict)  # of other places: path -> word

    def __post_init__(self) -> None:
        self.names |= {str(self.whole_model): "MODEL", str(self.whole_source): "SOURCE"}

    def model(self) -> Path:
        """A copy of tinymix at 4 bits, to be spoilt."""
        return Path(shutil.copytree(self.whole_model, self.folder / "model"))

    def source(self) -> Path:
        """A copy of a checkpoint of a tiny mixtral."""
        return Path(shutil.copytree(self.whole_source, self.folder / "source"))

    def run(
        self,
        *words: object,
        input: str = "",
        differs: tuple[tuple[str, str], ...] = (),
        last: int | None = None,
        output: bool = False,
        **environment: str,
    ) -> Said:
        """``moetier words``. ``last``: so many lines of standard error; ``output``: of standard output too what is
        bad."""
        result = self.scripts.run(MAIN, *words, input=input, environment=environment)
        return self.said(words, result, differs, last, output, environment)

    def said(
        self,
        words: tuple[object, ...],
        result: Any,
        differs: tuple[tuple[str, str], ...] = (),
        last: int | None = None,
        output: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Said:
        lines = result.stderr.splitlines()[-last if last else 0 :]
        if output:
            lines = [*re.findall(r"^bad: .*", result.stdout, re.MULTILINE), *lines]
        said = "".join(f"{line}\n" for line in lines)
        set_before = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = " ".join([*set_before, "moetier", *(repr(w) if " " in str(w) else str(w) for w in words)])
        return Said(self._plain(command, ()), result.returncode, self._plain(said, differs))

    def _plain(self, text: str, differs: tuple[tuple[str, str], ...]) -> str:
        for path, word in {**self.names, str(self.folder): "TMP"}.items():
            text = text.replace(path, word)
        for pattern, word in (*_WORDS, *differs):
            text = re.sub(pattern, word, text)
        return text


Case = Callable[[Bench], Said]
CASES: dict[str, Case] = {}


def case(work: Case) -> Case:
    CASES[work.__name__.replace("_", "-")] = work
    return work


@contextlib.contextmanager
def workplace(whole_model: Path, whole_source: Path, scripts: Prepared) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="moetier-errors-") as name:
        yield Bench(Path(name), whole_model, whole_source, scripts)
