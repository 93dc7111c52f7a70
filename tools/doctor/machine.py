"""Findings about a machine: whether it has what moetier needs, and what to do if it has not."""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.machine.threads import usable_cpus, use_threads
from moetier.tiers.errors import MoetierError
from moetier.tiers.text import format_bytes
from moetier.tools.cli.failure import as_options, plain
from moetier.tools.rates.hardware import CpuTimes, Machine, busy

if TYPE_CHECKING:
    from packaging.requirements import Requirement


class State(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARN = "warn"  # it works, and could work better
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check: its state, a description, and ``advice``, which is "" if there is nothing to do."""

    name: str
    state: State
    found: str
    advice: str = ""


def ok(name: str, text: str) -> Finding:
    """Return the finding that something works."""
    return Finding(name, State.OK, text)


def warn(name: str, text: str, advice: str) -> Finding:
    """Return the finding that something works but could work better; ``advice`` says how."""
    return Finding(name, State.WARN, as_options(text), as_options(advice))


def fail(name: str, text: str, advice: str) -> Finding:
    """Return the finding that something does not work; ``advice`` is the remedy."""
    return Finding(name, State.FAIL, as_options(text), as_options(advice))


def findings_of(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of ``check``. If it raises, yield a failure called ``name``, so that other checks go on."""
    try:
        yield from check()
    except MoetierError as error:
        yield fail(name, error.cause, error.fix)
    except Exception as error:  # such as a broken library, or a file that this kernel does not have
        said = " ".join(str(error).split())
        yield fail(name, f"{type(error).__name__}: {said}", "Correct the error: this check could not be completed.")


def lines_of(findings: Iterable[Finding], width: int) -> Iterator[str]:
    """Yield findings as text, in lines of up to ``width`` characters, each finding followed by its advice."""
    for finding in findings:
        head = f"{finding.state:<4}  {finding.name:<12}  "
        indent = " " * len(head)
        wrap = partial(
            textwrap.wrap, width=width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        yield from map(plain, wrap(finding.found, initial_indent=head))
        if finding.advice:
            yield from map(plain, wrap(finding.advice, initial_indent=f"{indent[3:]}-> "))


def python() -> Iterator[Finding]:
    """Check the operating system and the version of Python."""
    from packaging.specifiers import SpecifierSet

    required = SpecifierSet(metadata("moetier")["Requires-Python"] or "")
    text = f"{platform.python_version()} ({sys.executable}), Linux {platform.release()}"
    if sys.platform != "linux":
        yield fail("python", f"{platform.python_version()} on {sys.platform}", "Use Linux: moetier needs memfd.")
    elif platform.python_version() not in required:
        yield fail("python", text, f"Install Python {required}, and install moetier in it.")
    else:
        yield ok("python", text)


def libraries() -> Iterator[Finding]:
    """Check the versions of libraries: one finding for each that is out of range or missing, and one for all others.

    A library that only an extra of moetier needs may be missing.
    """
    from packaging.requirements import Requirement

    good, extras = [], dict[str, list[str]]()
    for text in requires("moetier") or []:
        required = Requirement(text)
        needed = required.marker is None or required.marker.evaluate({"extra": ""})
        if not needed and _extra(required) is None:
            continue
        install = f'Install it: pip install "{required.name}{required.specifier}"'
        if (installed := _version(required.name)) is None:
            if needed:
                yield fail("libraries", f"{required.name} is missing.", install)
            else:
                extras.setdefault(_extra(required) or "", []).append(required.name)
        elif not required.specifier.contains(installed, prereleases=True):
            say = fail if needed else warn
            yield say("libraries", f"{required.name} is {installed}; moetier needs {required.specifier}.", install)
        elif needed:
            good.append(f"{required.name} {installed}")
    extras.pop("all", None)  # it has what the others have
    missing = "; ".join(f"{', '.join(names)} (the extra {extra})" for extra, names in extras.items())
    yield ok(
        "libraries",
        f"moetier {version('moetier')}, and in range {', '.join(good)}" + (f"; without {missing}" if missing else ""),
    )


def configuration() -> Iterator[Finding]:
    """Check the settings in the file and in the environment. Raises ConfigError for a mistake in any section."""
    from moetier.tools.cli.parser import commands_of
    from moetier.tools.cli.settings import Settings
    from moetier.tools.main import build_parser

    settings = Settings(commands_of(build_parser()))
    yield from (warn("config", said, "Unset it, or correct its name.") for said in settings.unknown_variables)
    entries = [entry for name in settings.sections for entry in settings.of(name)]
    settings.check()
    places = sorted({entry.where for entry in entries if not entry.is_default})
    suffix = "" if settings.file.exists() else " (does not exist)"
    yield ok("config", f"{settings.file}{suffix}; set: {'; '.join(places) or 'nothing'}")


def processor() -> Iterator[Finding]:
    """Report the CPU and the cores that this process may use."""
    machine, usable = Machine.here(), usable_cpus()
    quota = f", of which a control group's quota allows {usable}" if usable < machine.cores else ""
    yield ok(
        "cpu", f"{machine.cpu} ({', '.join(machine.features) or platform.machine()}), {machine.cores} cores{quota}"
    )


def others(times: CpuTimes) -> Iterator[Finding]:
    """Report other processes if they have left too little of the CPUs since ``times`` were read."""
    if said := busy(times.used_by_others()):
        yield warn(
            "load",
            f"{said} during these checks: measured speeds are too low, here and in plan and bench",
            "End them, or set --threads to the number of free cores.",
        )


def kernel() -> Iterator[Finding]:
    """Check which code computes products with quantised experts on the CPU."""
    from moetier.runtime.devices.device import PROTECTED, WITHOUT_ONEDNN
    from moetier.runtime.kernels.jit.executable import can_become_executable
    from moetier.runtime.kernels.jit.processor import Dot, refusal, this_processor

    protected = not can_become_executable()
    if why := refusal():
        yield warn(
            "kernel",
            f"No kernels can be compiled here ({why}): experts are decoded for each product, which is slow.",
            "Permit executable memory: set MemoryDenyWriteExecute=no in a systemd unit, or change what else forbids it."
            if protected
            else "Reinstall llvmlite, in a version that moetier supports: pip install --force-reinstall llvmlite",
        )
        return
    processor, threads = this_processor(), use_threads()
    instructions = f"{processor.dot.value} and AMX" if processor.has_amx else processor.dot.value
    text = f"products with quantised experts are computed by code compiled for {instructions}, in {threads} threads"
    if processor.dot is Dot.PLAIN:
        yield warn(
            "kernel",
            text,
            "Expect few tokens a second: fast code needs AVX2, AVX-VNNI, AVX-512 VNNI or Arm's DotProd.",
        )
    elif protected:
        yield warn(
            "kernel",
            f"{text}. As {PROTECTED}, {WITHOUT_ONEDNN}.",
            "Permit executable memory (MemoryDenyWriteExecute=no in a systemd unit), or convert with --trunk-bits 8.",
        )
    else:
        yield ok("kernel", text)


def gpus() -> Iterator[Finding]:
    """Check the devices that torch can use beside the processor, and the kernels for them."""
    from moetier.runtime.device_names import DEVICES
    from moetier.runtime.devices.device import device_class
    from moetier.tools.plan.cards import card_in, sheet

    said = [reading for name in DEVICES for reading in device_class(name).diagnose()]
    for reading in said:
        known = card_in(reading.text)
        text = f"{reading.text}; {sheet(known)}" if known is not None else reading.text
        yield warn("gpu", text, reading.advice) if reading.advice else ok("gpu", text)
    if not said:
        yield ok("gpu", "none that torch can use: everything is computed on the CPU")


def memory_files() -> Iterator[Finding]:
    """Check that the memory file of an arena (a sealed memfd) can be made: make a file of one page."""
    from moetier.tiers.arena.arena import NAME, SEALS

    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
    except OSError as error:
        yield fail("memfd", f"No sealed memory file can be made: {error.strerror}.", "Permit memfd_create (seccomp).")
    else:
        yield ok("memfd", "sealed memory files can be made and shared")
    finally:
        os.close(descriptor)


def shared_memory() -> Iterator[Finding]:
    """Report the free space of /dev/shm, which experts don't need."""
    place = Path("/dev/shm")
    if place.is_dir():
        free = shutil.disk_usage(place).free
        yield ok("/dev/shm", f"{format_bytes(free)} free; experts do not need it, as they are in memory files")
    else:
        yield ok("/dev/shm", "does not exist; experts do not need it")


def daemons() -> Iterator[Finding]:
    """Check that each running daemon answers and has this version."""
    from moetier.runtime.wire.address import runtime_folder
    from moetier.runtime.wire.probe import running_daemons

    running = running_daemons()
    if not running:
        yield ok("daemons", f"none runs in {runtime_folder()}")
    for daemon in running:
        models = ", ".join(f"{model.name} ({format_bytes(model.budget_bytes)})" for model in daemon.card.models)
        what = f"{daemon.folder}: process {daemon.card.pid}, {models}"
        if daemon.stats is None:
            yield warn("daemons", f"{what}, does not answer", f"If it still does not answer: kill {daemon.card.pid}")
        elif daemon.card.version != version("moetier"):
            yield warn(
                "daemons",
                f"{what}, is moetier {daemon.card.version}",
                "End the daemon, and start it again with this version of moetier.",
            )
        else:
            yield ok("daemons", what)


def _extra(required: Requirement) -> str | None:
    """Return the extra of moetier that has the requirement, or None; extras for development do not count."""
    names = metadata("moetier").get_all("Provides-Extra") or []
    users = (name for name in names if name not in ("test", "dev", "release"))
    return next((e for e in users if required.marker and required.marker.evaluate({"extra": e})), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
