"""Programs that can use a server: how each is told of it, in its own files, and for one start of it.

What is written here was found out with the versions from npm that tests/helpers/agents.py names.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetier.tools.cli.settings import API_KEY_VARIABLE

PROVIDER = "moetier"  # name of the server in configurations
NO_KEY = "none"  # stands for a key where a client demands one and the server has none
CONTEXT = 32_768  # tokens that a client is told if the server does not know yet
ANSWER = 8_192  # most tokens of an answer that clients are told
FILE = "{file}"  # stands for the path of a temporary file among arguments


@dataclass(frozen=True, slots=True)
class ServerModel:
    """The server and the model that a client uses.

    Attributes:
        url: the URL of the server, without /v1.
        model: name of the model.
        context: most tokens of a prompt and its answer.
        trained: tokens of the longest context that the model was trained for; None: not known.
        key: the API key; None: the server has none.
        has_tools: whether the model's chat template has tools; None: not known.
    """

    url: str
    model: str
    context: int = CONTEXT
    key: str | None = None
    has_tools: bool | None = None
    trained: int | None = None

    @property
    def answer(self) -> int:
        """Most tokens of an answer that a client is told."""
        return max(1, min(ANSWER, self.context // 4))


@dataclass(frozen=True, slots=True)
class Launch:
    """How a client is started with a server, without a change of the user's files.

    Attributes:
        arguments: words after its command; FILE stands for the path of a temporary file.
        environment: variables.
        file: name and content of the temporary file; None: there is none.
    """

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    file: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ClientProgram:
    """A program that ``moetier launch`` can start as a client of a server.

    Attributes:
        command: its command.
        package: its package at npm.
        place: the file in which users configure it, or what else they set.
        prompt_tokens: tokens of its first prompt, with its instructions and tools, for a message of a few words.
        configuration: returns the text that users put into ``place``.
        launch: returns how to start it.
    """

    command: str
    package: str
    place: str
    prompt_tokens: int
    configuration: Callable[[ServerModel], str]
    launch: Callable[[ServerModel], Launch]


def opencode(target: ServerModel) -> dict[str, Any]:
    """Return opencode's configuration as JSON."""
    limit = {"context": target.context, "output": target.answer}
    options = {"baseURL": f"{target.url}/v1"}
    if target.key is not None:
        options["apiKey"] = f"{{env:{API_KEY_VARIABLE}}}"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": PROVIDER,
        "options": options,
        "models": {target.model: {"name": target.model, "limit": limit, "tool_call": target.has_tools is not False}},
    }
    return {"provider": {PROVIDER: provider}, "model": f"{PROVIDER}/{target.model}"}


def _launch_opencode(target: ServerModel) -> Launch:
    return Launch(environment=_key(target) | {"OPENCODE_CONFIG_CONTENT": json.dumps(opencode(target))})


def pi(target: ServerModel) -> dict[str, Any]:
    """Return pi's list of models as JSON. Its ``apiKey`` may be the name of a variable."""
    model = {"id": target.model, "contextWindow": target.context, "maxTokens": target.answer}
    provider = {
        "baseUrl": f"{target.url}/v1",
        "api": "openai-completions",
        "apiKey": NO_KEY if target.key is None else API_KEY_VARIABLE,
        "models": [model],
    }
    return {"providers": {PROVIDER: provider}}


def _launch_pi(target: ServerModel) -> Launch:
    """Return a start with an extension that adds the provider, as pi takes models from the user's file only."""
    provider: Any = pi(target)["providers"][PROVIDER]
    free = {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0}
    models = [
        {"name": model["id"], "reasoning": False, "input": ["text"], "cost": free} | model
        for model in provider["models"]
    ]
    text = json.dumps(provider | {"models": models})
    extension = f"export default (pi) => pi.registerProvider({json.dumps(PROVIDER)}, {text});\n"
    words = ["--extension", FILE, "--provider", PROVIDER, "--model", target.model]
    return Launch(words, _key(target), ("moetier.js", extension))


def codex(target: ServerModel) -> dict[str, Any]:
    """Return Codex's configuration, whose values are texts, and a table of texts."""
    provider = {"name": PROVIDER, "base_url": f"{target.url}/v1", "wire_api": "responses"}
    if target.key is not None:
        provider["env_key"] = API_KEY_VARIABLE
    return {
        "model": target.model,
        "model_provider": PROVIDER,
        "model_context_window": target.context,
        "model_providers": {PROVIDER: provider},
    }


def _codex_file(target: ServerModel) -> str:
    values = codex(target)
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if not isinstance(value, dict)]
    table = values["model_providers"][PROVIDER]
    return "\n".join([*lines, "", f"[model_providers.{PROVIDER}]", *(f"{n} = {_toml(v)}" for n, v in table.items())])


def _launch_codex(target: ServerModel) -> Launch:
    values = codex(target)
    table = ", ".join(f"{name} = {_toml(value)}" for name, value in values["model_providers"][PROVIDER].items())
    pairs = [f"{name}={_toml(value)}" for name, value in values.items() if not isinstance(value, dict)]
    pairs.append(f"model_providers.{PROVIDER}={{{table}}}")
    return Launch([word for pair in pairs for word in ("--config", pair)], _key(target))


def claude(target: ServerModel) -> dict[str, str]:
    """Return the variables that Claude Code reads. All its sizes of models are the one of the server."""
    names = ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL")
    return {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": NO_KEY if target.key is None else f"${API_KEY_VARIABLE}",
        **{f"ANTHROPIC_{name}": target.model for name in names},
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.answer),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _claude_lines(target: ServerModel) -> str:
    lines = {name: shlex.quote(value) for name, value in claude(target).items()}
    if target.key is not None:
        lines["ANTHROPIC_AUTH_TOKEN"] = f'"${API_KEY_VARIABLE}"'  # for the shell to replace
    return "\n".join(f"export {name}={value}" for name, value in lines.items())


def _launch_claude(target: ServerModel) -> Launch:
    return Launch(environment=claude(target) | {"ANTHROPIC_AUTH_TOKEN": target.key or NO_KEY})


def _key(target: ServerModel) -> dict[str, str]:
    return {} if target.key is None else {API_KEY_VARIABLE: target.key}


def _toml(value: str | int) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML has no surrogate pairs


def _json(values: Any) -> str:
    return json.dumps(values, indent=2)


CLIENTS = {
    "opencode": ClientProgram(
        "opencode", "opencode-ai", "opencode.json", 10_104, lambda target: _json(opencode(target)), _launch_opencode
    ),
    "pi": ClientProgram(
        "pi",
        "@mariozechner/pi-coding-agent",
        "~/.pi/agent/models.json",
        1_909,
        lambda target: _json(pi(target)),
        _launch_pi,
    ),
    "codex": ClientProgram("codex", "@openai/codex", "~/.codex/config.toml", 13_400, _codex_file, _launch_codex),
    "claude": ClientProgram(
        "claude", "@anthropic-ai/claude-code", "the environment", 16_400, _claude_lines, _launch_claude
    ),
}
