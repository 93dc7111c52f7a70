"""Find out what a running server offers: its models, and how long a first prompt will take."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ConfigError, UnavailableError
from moetier.tiers.threads import start_thread
from moetier.tools.cli.settings import API_KEY_VARIABLE

SECONDS = 10.0  # longest time until the server answers
MAX_BYTES = 1 << 20  # of an answer


def models_of(url: str, key: str | None, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Return what a server says of its models, if it answers within ``seconds``.

    Raises UnavailableError if no server of moetier answers, and ConfigError if the key is missing or wrong.
    """
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("it is no address of HTTP")
        status, content = _ask(_request(f"{url}/v1/models", key), seconds)
        if status == 200:
            return [model for model in json.loads(content)["data"] if _is_valid(model)]
        if status in (401, 403):
            raise ConfigError(
                f"The server at {url} does not accept the API key.",
                f"Give the server's key: --api-key-file FILE, or the environment variable {API_KEY_VARIABLE}.",
            )
        reason = f"it answers with status {status}"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise UnavailableError(f"There is no server of moetier at {url}: {reason}.", "Start one: moetier serve DIR")


def _ask(request: urllib.request.Request, seconds: float) -> tuple[int, bytes]:
    """Return the status and the body of the answer to a request.

    A thread reads it, because timeouts of sockets begin anew with each byte. Raises ValueError if the answer has more
    than MAX_BYTES or does not end within ``seconds``, OSError and HTTPException.
    """
    found = queue.SimpleQueue[tuple[int, bytes] | Exception]()

    def read() -> None:
        content = b""
        try:
            try:
                answer = urllib.request.urlopen(request, timeout=seconds)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                while len(content) <= MAX_BYTES and time.monotonic() < deadline and (piece := answer.read1(MAX_BYTES)):
                    content += piece
            found.put((answer.status, content))
        except Exception as error:
            found.put(error)

    deadline = time.monotonic() + seconds
    start_thread("moetier-ask", read)
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty:
        raise ValueError(f"its answer did not end within {seconds:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    if len(answer[1]) > MAX_BYTES:
        raise ValueError("its answer is too long")
    return answer


def has_tools(url: str, key: str | None, model: dict[str, Any]) -> bool | None:
    """Return whether the chat template of a loaded model has tools; None if that is not known.

    The server counts the tokens of a prompt with a tool, or refuses it. It would load a model that is not loaded.
    """
    if not model.get("loaded"):
        return None
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": model["id"], "messages": [{"role": "user", "content": "Look."}], "tools": [tool]}
    request = _request(f"{url}/tokenize", key)
    request.data = json.dumps(body).encode()
    request.add_header("Content-Type", "application/json")
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError):
        status, content = _ask(request, SECONDS)
        if status == 200:
            return True
        if status == 400 and json.loads(content)["error"]["param"] == "tools":
            return False
    return None


def _request(url: str, key: str | None) -> urllib.request.Request:
    return urllib.request.Request(url, headers={} if key is None else {"Authorization": f"Bearer {key}"})


def _is_valid(model: dict[str, Any]) -> bool:
    """Return whether a model can be named in configurations and on a terminal."""
    name, aliases = model["id"], model.get("aliases")
    contexts = [model.get(field) for field in ("max_model_len", "trained_context")]
    are_contexts = all(context is None or (type(context) is int and context > 0) for context in contexts)
    return isinstance(name, str) and name.isprintable() and isinstance(aliases or [], list) and are_contexts


def chosen(models: list[dict[str, Any]], name: str | None, url: str) -> dict[str, Any]:
    """Return the model that is called ``name``, also by an alias; None: the only one. Raises ConfigError."""
    named = [model for model in models if name in (None, model["id"], *(model.get("aliases") or ()))]
    if len(named) == 1:
        return named[0]
    listed = ", ".join(model["id"] for model in models)
    if name is None:
        raise ConfigError(f"The server at {url} has {len(models)} models: {listed}.", "Name one of them.")
    raise ConfigError(f"The server at {url} has no model {name!r}.", f"Give one of {listed}.")


def seconds_of(tokens: int, prompts: Sequence[tuple[int, float]]) -> float | None:
    """Return the seconds of a prompt, by those of other lengths, in ascending order; None if it is the longest of all.

    Between two lengths the seconds grow evenly.
    """
    for (fewer, before), (more, after) in pairwise([(0, 0.0), *prompts]):
        if tokens <= more:
            return before + (after - before) * (tokens - fewer) / (more - fewer)
    return None


def estimated(directory: Path, tokens: int, **resources: Any) -> float | None:
    """Return the seconds of a first prompt of ``tokens`` tokens with a model on this machine, which is measured.

    Return None if that is not known: the prompt is longer than the context, or speeds on a device are not estimated.
    ``resources`` are as for ``plan``. Raises MoetierError as ``plan``.
    """
    from moetier.tools.plan.forecast import plan

    forecast = plan(directory, **resources)
    best = next((choice for choice in forecast["choices"] if choice["works"]), None)
    prompts = [] if best is None else [(prompt["tokens"], prompt["seconds"]) for prompt in best["prompts"]]
    return seconds_of(tokens, prompts)
