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
from environments import INSTALL_SECONDS
from http_servers import KEY
from networks import network

MODEL = "agent"  # name of the model in requests
CONTEXT, ANSWER = 100_000, 500  # what the agents are told of the model: its context, most tokens of an answer
RUN_SECONDS = 250


Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Agent:
    """A program that drives a model.

    Attributes:
        name: the command.
        package: npm's name of the package, with its exact version.
        configure: called with a home, a repository and the server's URL, which ends in /v1. Returns the environment.
        first, further: arguments before the first message of a session, and before the further ones.
        read, edit, shell: name and arguments of the tool call that reads a file, replaces a text in it by another, and
            runs a command.
        limits: whether it limits the tokens of an answer.
        goes_on: whether it lets the model go on, without a message of the user, after an answer that was cut.
        forgets: whether it edits a file only after it was read since the last message of the user.
    """

    name: str
    package: str
    configure: Callable[[Path, Path, str], Mapping[str, str]]
    first: Sequence[str]
    further: Sequence[str]
    read: Callable[[Path], Call]
    edit: Callable[[Path, str, str], Call]
    shell: Callable[[str], Call]
    limits: bool = True
    goes_on: bool = False
    forgets: bool = False

    def installed(self, cache: Path) -> Path:
        """Return the program, installed in the folder ``cache`` if it is not there. Skips the test if npm can't."""
        folder = cache / self.package.replace("/", "-").replace("@", "-").strip("-")
        return npm_packages(folder, [self.package]) / "node_modules" / ".bin" / self.name


def npm_packages(folder: Path, packages: Sequence[str]) -> Path:
    """Return ``folder``, in which packages of npm are installed and kept. Skips the test if npm can't."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", *packages]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm did not install {', '.join(packages)} in {INSTALL_SECONDS} seconds")
            if done.returncode:
                pytest.skip(f"npm can't install {', '.join(packages)}: {done.stderr.strip()[-200:]}")
            (folder / "ready").touch()
    return folder


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


def _claude(home: Path, _: Path, url: str) -> Mapping[str, str]:
    _write(home / ".claude.json", {"hasCompletedOnboarding": True})
    models = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL")
    return dict.fromkeys(models, MODEL) | {
        "ANTHROPIC_BASE_URL": url.removesuffix("/v1"),
        "ANTHROPIC_AUTH_TOKEN": KEY,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(ANSWER),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "IS_SANDBOX": "1",  # else root may not skip permissions
    }


def _codex(home: Path, _: Path, url: str) -> Mapping[str, str]:
    config = f"""
        model = "{MODEL}"
        model_provider = "moetier"
        approval_policy = "never"
        sandbox_mode = "danger-full-access"
        [model_providers.moetier]
        name = "moetier"
        base_url = "{url}"
        env_key = "MOETIER_API_KEY"
        wire_api = "responses"
    """
    _write(home / ".codex" / "config.toml", config)
    return {"MOETIER_API_KEY": KEY}


def _qwen(home: Path, _: Path, url: str) -> Mapping[str, str]:
    generation = {"samplingParams": {"max_tokens": ANSWER}}
    _write(
        home / ".qwen" / "settings.json", {"model": {"generationConfig": generation}, "telemetry": {"enabled": False}}
    )
    return {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY, "OPENAI_MODEL": MODEL}


def _replacement(file: Path, old: str, new: str) -> dict[str, Any]:
    return {"file_path": str(file), "old_string": old, "new_string": new}


def _patch(file: Path, old: str, new: str) -> Call:
    lines = [f"-{line}" for line in old.splitlines()] + [f"+{line}" for line in new.splitlines()]
    patch = ["*** Begin Patch", f"*** Update File: {file}", "@@", *lines, "*** End Patch"]
    return "exec_command", {"cmd": "\n".join(["apply_patch <<'PATCH'", *patch, "PATCH"])}


PI = Agent(
    "pi",
    "@mariozechner/pi-coding-agent@0.73.1",
    _pi,
    ["--model", f"moetier/{MODEL}", "-p"],
    ["--model", f"moetier/{MODEL}", "--continue", "-p"],
    lambda file: ("read", {"path": str(file)}),
    lambda file, old, new: ("edit", {"path": str(file), "edits": [{"oldText": old, "newText": new}]}),
    lambda command: ("bash", {"command": command}),
)
OPENCODE = Agent(
    "opencode",
    "opencode-ai@1.18.33",
    _opencode,
    ["run"],
    ["run", "--continue"],
    lambda file: ("read", {"filePath": str(file)}),
    lambda file, old, new: ("edit", {"filePath": str(file), "oldString": old, "newString": new}),
    lambda command: ("bash", {"command": command, "description": "Run a command"}),
)
CLAUDE = Agent(
    "claude",
    "@anthropic-ai/claude-code@2.1.332",
    _claude,
    ["--dangerously-skip-permissions", "-p"],
    ["--dangerously-skip-permissions", "--continue", "-p"],
    lambda file: ("Read", {"file_path": str(file)}),
    lambda file, old, new: ("Edit", _replacement(file, old, new) | {"replace_all": False}),
    lambda command: ("Bash", {"command": command, "description": "Run a command"}),
    goes_on=True,
)
CODEX = Agent(
    "codex",
    "@openai/codex@0.171.0",
    _codex,
    ["exec"],
    ["exec", "resume", "--last"],
    lambda file: ("exec_command", {"cmd": f"cat {file}"}),
    _patch,
    lambda command: ("exec_command", {"cmd": command}),
    limits=False,
)
QWEN = Agent(
    "qwen",
    "@qwen-code/qwen-code@0.24.4",
    _qwen,
    ["--yolo", "-p"],
    ["--yolo", "--continue", "-p"],
    lambda file: ("read_file", {"file_path": str(file)}),
    lambda file, old, new: ("edit", _replacement(file, old, new)),
    # of a command that ends at once it may lose the output
    lambda command: ("run_shell_command", {"command": f"{command}; sleep 1", "is_background": False}),
    forgets=True,
)
