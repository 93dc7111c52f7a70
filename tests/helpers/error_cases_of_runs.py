"""Budgets, daemons, servers, options, settings and files that can't be."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cgroups import memory_limit
from daemons import running_daemon
from error_bench import BYTES, SIZE, Bench, Said, case
from prepared import MAIN
from stores import layout_of, make_store

from moetier.tools.convert.api import convert

# Budgets


@case
def budget_too_small(bench: Bench) -> Said:
    return bench.run("generate", bench.whole_model, "To be", "--ram", "100KiB")


@case
def budget_too_large(bench: Bench) -> Said:
    """In a control group that leaves less than the experts take, and more than the fewest."""
    make_store(store := bench.folder / "store", blocks=4, experts=8, layout=layout_of(1024, 1024))  # 192 MiB
    words = ("daemon", store, "--folder", bench.folder / "run", "--ram", "192MiB")
    enter = 'import os, sys; open(sys.argv.pop(1) + "/cgroup.procs", "w").write(str(os.getpid()))\n'
    with memory_limit(128 << 20) as group:
        bench.names[f"/{group.folder.name}"] = "GROUP"
        result = bench.scripts.run(enter + MAIN, group.folder, *words)
    return bench.said(words, result, ((r"to BYTES .*", "to BYTES"), SIZE, BYTES), last=2)


@case
def context_too_long(bench: Bench) -> Said:
    words = ("generate", bench.whole_model, "To be", "--context", "1000000000", "--daemon", "none")
    return bench.run(*words, differs=(SIZE,))


@case
def context_too_long_planned(bench: Bench) -> Said:
    words = ("plan", bench.whole_model, "--context", "1000000000", "--disk", "1")
    return bench.run(*words, differs=(SIZE, (r"--context \d+ works", "--context TOKENS works")))


@case
def budget_malformed(bench: Bench) -> Said:
    return bench.run("generate", bench.whole_model, "To be", "--ram", "6GB!")


@case
def no_gpu(bench: Bench) -> Said:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return bench.run("generate", bench.whole_model, "To be", "--device", "cuda")


# Daemons


@contextlib.contextmanager
def daemon(bench: Bench, *extra: str | Path) -> Iterator[Any]:
    with running_daemon(bench.whole_model, ram="8MiB", folder=bench.folder / "run", extra=extra) as process:
        yield process


@case
def second_daemon(bench: Bench) -> Said:
    with daemon(bench) as first:
        return bench.run("daemon", bench.whole_model, "--folder", first.folder, last=2)


@case
def no_daemon(bench: Bench) -> Said:
    return bench.run("generate", bench.whole_model, "To be", "--daemon", bench.folder / "nobody")


@case
def no_daemon_for_stats(bench: Bench) -> Said:
    return bench.run("stats", bench.folder / "nobody")


@case
def daemon_that_was_killed(bench: Bench) -> Said:
    with daemon(bench) as process:
        process.kill()
        return bench.run("stats", process.folder)


@case
def daemon_of_another_model(bench: Bench) -> Said:
    convert(bench.source(), other := bench.folder / "other", fast=True)
    with daemon(bench) as process:
        return bench.run(
            "trace", other, "--prompts", _prompts(bench), "-o", bench.folder / "t.npz", "--daemon", process.folder
        )


def _prompts(bench: Bench) -> Path:
    (file := bench.folder / "prompts.txt").write_text("To be\n")
    return file


@case
def daemon_without_room(bench: Bench) -> Said:
    return bench.run("daemon", bench.whole_model, "--folder", bench.folder / "run", "--ram", "100KiB", last=2)


def _token(bench: Bench, text: str) -> Path:
    (file := bench.folder / text).write_text(text)
    file.chmod(0o600)
    return file


@case
def wrong_token(bench: Bench) -> Said:
    with daemon(bench, "--listen", "127.0.0.1:0", "--token-file", _token(bench, "s3cret")) as process:
        options = ("--daemon", process.card.listen, "--insecure", "--token-file", _token(bench, "guess"))
        return bench.run("generate", bench.whole_model, "To be", *options)


@case
def no_token(bench: Bench) -> Said:
    with daemon(bench, "--listen", "127.0.0.1:0", "--token-file", _token(bench, "s3cret")) as process:
        return bench.run("stats", process.card.listen, "--insecure")


@case
def no_tls(bench: Bench) -> Said:
    """A client that wants it, of a daemon that has none."""
    with daemon(bench, "--listen", "127.0.0.1:0", "--token-file", token := _token(bench, "s3cret")) as process:
        return bench.run("stats", process.card.listen, "--token-file", token)


@case
def a_port_without_a_token(bench: Bench) -> Said:
    return bench.run("daemon", bench.whole_model, "--folder", bench.folder / "run", "--listen", "0.0.0.0:0")


@case
def a_port_without_tls(bench: Bench) -> Said:
    options = ("--listen", "0.0.0.0:0", "--token-file", _token(bench, "s3cret"))
    return bench.run("daemon", bench.whole_model, "--folder", bench.folder / "run", *options)


@case
def folder_of_another_user(bench: Bench) -> Said:
    if os.geteuid() != 0:
        pytest.skip("giving a folder to another user needs root")
    (folder := bench.folder / "theirs").mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    return bench.run("stats", folder)


# Serving


@case
def served_to_others_without_a_key(bench: Bench) -> Said:
    return bench.run("serve", bench.whole_model, "--host", "0.0.0.0", "--port", "0")


@case
def port_taken(bench: Bench) -> Said:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return bench.run("serve", bench.whole_model, "--port", taken.getsockname()[1])


# Options and settings


@case
def unknown_option(bench: Bench) -> Said:
    return bench.run("generate", bench.folder / "model", "--rma", "2GiB", "To be")


@case
def unknown_command(bench: Bench) -> Said:
    return bench.run("genrate", bench.folder / "model")


@case
def unquoted_prompt(bench: Bench) -> Said:
    return bench.run("generate", bench.folder / "model", "To", "be")


@case
def empty_prompt(bench: Bench) -> Said:
    return bench.run("generate", bench.whole_model, "")


@case
def size_set_in_a_file(bench: Bench) -> Said:
    (file := bench.folder / "config.toml").write_text('[general]\nram = "6GB!"\n')
    return bench.run("generate", bench.folder / "model", "To be", MOETIER_CONFIG=str(file))


@case
def size_set_in_the_environment(bench: Bench) -> Said:
    return bench.run("config", "show", last=2, MOETIER_RAM="6GB!")


@case
def unknown_key_in_a_file(bench: Bench) -> Said:
    (file := bench.folder / "config.toml").write_text('[general]\nrma = "6GB"\n')
    return bench.run("generate", bench.folder / "model", "To be", MOETIER_CONFIG=str(file))


# Files of other commands


@case
def no_prompts(bench: Bench) -> Said:
    return bench.run("trace", bench.whole_model, "--prompts", bench.folder / "nothing", "-o", bench.folder / "t.npz")


@case
def no_trace(bench: Bench) -> Said:
    (file := bench.folder / "t.npz").write_bytes(b"PK nothing")
    return bench.run("replay", file)


@case
def no_text(bench: Bench) -> Said:
    return bench.run("quality", bench.source(), "--text", bench.folder / "nothing")
