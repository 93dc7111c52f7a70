"""Agents from npm, unchanged: how each is installed, pointed at a server, and run without a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from http_servers import KEY
from networks import network

MODEL = "agent"  # name of the model in requests
CONTEXT, ANSWER = 100_000, 500  # what the agents are told of the model: its context, most tokens of an answer
RUN_SECONDS = 250
INSTALL_SECONDS = 280


@dataclass(frozen=True, slots=True)
class Agent:
    """A program that drives a model.

    Attributes:
        name: the command.
        package: npm's name of the package, with its exact version.
        configure: called with a home, a repository and the server's URL, which ends in /v1. Returns the environment.
        first, further: arguments before the first message of a session, and before the further ones.
        edit, shell: texts of the tool's name and arguments that replace one text in a file, and run a command.
    """

    name: str
    package: str
    configure: Callable[[Path, Path, str], Mapping[str, str]]
    first: Sequence[str]
    further: Sequence[str]
    edit: Callable[[Path, str, str], tuple[str, dict[str, Any]]]
    shell: Callable[[str], tuple[str, dict[str, Any]]]

    def installed(self, cache: Path) -> Path:
        """Return the program, installed in the folder ``cache`` if it is not there. Skips the test if npm can't."""
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        folder = cache / self.package.replace("/", "-").replace("@", "-").strip("-")
        program = folder / "node_modules" / ".bin" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "ready").exists():
                command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", self.package]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
                except subprocess.TimeoutExpired:
                    pytest.skip(f"npm did not install {self.package} in {INSTALL_SECONDS} seconds")
                if done.returncode:
                    pytest.skip(f"npm can't install {self.package}: {done.stderr.strip()[-200:]}")
                (folder / "ready").touch()
        return program


@contextlib.contextmanager
def without_internet() -> Iterator[tuple[str, list[str]]]:
    """Yield the address at which a server is to listen, and words before a command that leave it only this server.

    Without root, the command keeps its network.
    """
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(network())
        except pytest.skip.Exception:
            yield "127.0.0.1", []
        else:
            yield made.here, made.prefix


class Session:
    """A session of an agent in a repository of its own, whose only file is ``notes.txt``."""

    def __init__(self, agent: Agent, program: Path, place: Path, url: str, before: Sequence[str]) -> None:
        """Run ``program`` in folders below ``place``, with the words ``before`` before each command."""
        self._agent = agent
        self._command = [*before, str(program)]
        home, self.repository = place / "home", place / "repository"
        for folder in (home, self.repository):
            folder.mkdir(parents=True)
        self.file = self.repository / "notes.txt"
        self.file.write_text("line 0\n")
        for words in (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "."],
        ):
            subprocess.run(["git", *words], cwd=self.repository, check=True)
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        self._environment = keep | {"HOME": str(home)} | {**agent.configure(home, self.repository, url)}
        self._further = False

    def say(self, text: str) -> str:
        """Send a message of the user, and return what the agent prints until it waits for the next one."""
        words = self._agent.further if self._further else self._agent.first
        self._further = True
        done = subprocess.run(
            [*self._command, *words, text],
            cwd=self.repository,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


# -- each of them ------------------------------------------------------------------------------------------------------


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def _pi(home: Path, _: Path, url: str) -> Mapping[str, str]:
    model = {"id": MODEL, "reasoning": True, "contextWindow": CONTEXT, "maxTokens": ANSWER}
    provider = {"baseUrl": url, "api": "openai-completions", "apiKey": KEY, "models": [model]}
    _write(home / ".pi" / "agent" / "models.json", {"providers": {"moetier": provider}})
    return {"PI_OFFLINE": "1"}


def _opencode(_: Path, repository: Path, url: str) -> Mapping[str, str]:
    model = {"name": MODEL, "limit": {"context": CONTEXT, "output": ANSWER}, "tool_call": True, "reasoning": True}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "moetier",
        "options": {"baseURL": url, "apiKey": KEY},
        "models": {MODEL: model},
    }
    config = {"provider": {"moetier": provider}, "model": f"moetier/{MODEL}", "permission": {"*": "allow"}}
    _write(repository / "opencode.json", config | {"autoupdate": False, "share": "disabled"})
    return {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"}


PI = Agent(
    "pi",
    "@mariozechner/pi-coding-agent@0.73.1",
    _pi,
    ["--model", f"moetier/{MODEL}", "-p"],
    ["--model", f"moetier/{MODEL}", "--continue", "-p"],
    lambda file, old, new: ("edit", {"path": str(file), "edits": [{"oldText": old, "newText": new}]}),
    lambda command: ("bash", {"command": command}),
)
OPENCODE = Agent(
    "opencode",
    "opencode-ai@1.18.33",
    _opencode,
    ["run"],
    ["run", "--continue"],
    lambda file, old, new: ("edit", {"filePath": str(file), "oldString": old, "newString": new}),
    lambda command: ("bash", {"command": command, "description": "Run a command"}),
)
