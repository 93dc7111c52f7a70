"""``moetier launch CLIENT``: configure a program for coding, such as opencode, for a running server, and start it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moetier.tiers.errors import ConfigError, MoetierError
from moetier.tiers.options import command_words
from moetier.tools.cli.failure import EXIT_ERROR, plain
from moetier.tools.cli.foreground import run_in_foreground
from moetier.tools.cli.parser import directory
from moetier.tools.cli.settings import API_KEY_VARIABLE
from moetier.tools.launch.clients import CLIENTS, CONTEXT, FILE, ClientProgram, Launch, ServerModel
from moetier.tools.launch.server import chosen, estimated, has_tools, models_of
from moetier.tools.serve.keys import keys_of

EXAMPLES = (
    "moetier launch opencode",
    "moetier launch claude --run -- --continue",
    "moetier launch codex --model qwen3-4bit --directory ./qwen3-4bit",
)
LONG_SECONDS = 30.0  # of a first prompt after which advice is given
URL = "http://127.0.0.1:8000"
FIT = "Serve a model whose chat template has tools, with a context that is long enough (moetier serve --context N)."
FIT_OTHER = "Serve another model, which was trained for a longer context, and whose chat template has tools."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier launch`."""
    parser.add_argument("client", choices=[*CLIENTS], metavar="CLIENT", help=f"the program: {', '.join(CLIENTS)}")
    parser.add_argument("words", nargs="*", metavar="WORD", help="with --run: words for the program, after --")
    parser.add_argument("--url", default=URL, metavar="URL", help="URL of the server (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="name of the model (default: the only one of the server)")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file that holds the server's key in one line (default: the key in ${API_KEY_VARIABLE})",
    )
    parser.add_argument(
        "--directory",
        type=directory,
        metavar="DIR",
        help="the model, to estimate how long a first prompt takes (default: the one that moetier list shows by the "
        "name of the server's model)",
    )
    parser.add_argument(
        "--run", dest="starts", action="store_true", help="start the program, without a change of its files"
    )
    parser.add_argument(
        "--estimate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure this machine for some seconds, and say how long a first prompt takes",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration, or start the program and return its status. Raises MoetierError.

    If the model can't be used with the program, that is printed first, the status is 1, and nothing is started.
    """
    client = CLIENTS[arguments.client]
    if arguments.words and not arguments.starts:
        raise ConfigError(
            "There are arguments for the program, which is not started without --run.", "Add --run, or leave them out."
        )
    url = arguments.url.rstrip("/").removesuffix("/v1")
    key = key_of(arguments.api_key_file)
    model = chosen(models_of(url, key), arguments.model, url)
    tools = has_tools(url, key, model)
    target = ServerModel(
        url, model["id"], model.get("max_model_len") or CONTEXT, key, tools, model.get("trained_context")
    )
    out = sys.stderr if arguments.starts else sys.stdout
    if unfit := misfit(client, target):
        fix = FIT_OTHER if is_trained_for_less(client, target) else FIT
        if arguments.starts:
            raise ConfigError(unfit, fix)
        print(f"moetier: {unfit}\n  {fix} Its configuration would be:", file=sys.stderr, flush=True)
    program = program_of(client) if arguments.starts else ""
    if not arguments.starts:
        print(f"# {client.place}\n{client.configuration(target)}", flush=True)
    if unfit:
        return EXIT_ERROR
    if arguments.estimate and (line := first_prompt(client, target, arguments.directory)):
        print(line, file=out, flush=True)
    if arguments.starts:
        return start(program, client.launch(target), arguments.words)
    given = {"url": url, "model": arguments.model, "api_key_file": arguments.api_key_file}
    words = command_words((name, value) for name, value in given.items() if value not in (None, URL))
    print(f"\n# or, without a change of files: {shlex.join(['moetier', 'launch', arguments.client, *words, '--run'])}")
    return 0


def key_of(file: Path | None) -> str | None:
    """Return the server's key; None if there is none. Raises ConfigError if it can't be read."""
    from moetier.runtime.wire.channel import read_token

    if file is not None:
        return read_token(file, "API key")
    keys_of(None, None)  # checks the variable
    return os.environ.get(API_KEY_VARIABLE) or None


def misfit(client: ClientProgram, target: ServerModel) -> str:
    """Return a sentence that says why a model can't be used with a program; "" if nothing speaks against it."""
    reasons = []
    if is_trained_for_less(client, target):
        reasons.append(
            f"it was trained for {target.trained:,} tokens, and the program's first prompt has about "
            f"{client.prompt_tokens:,}"
        )
    elif client.prompt_tokens >= target.context:
        reasons.append(
            f"its context has {target.context:,} tokens, and the program's first prompt about {client.prompt_tokens:,}"
        )
    if target.has_tools is False:
        reasons.append("its chat template has no tools")
    return f"{target.model} can't be used with {client.command}: {'; '.join(reasons)}." if reasons else ""


def is_trained_for_less(client: ClientProgram, target: ServerModel) -> bool:
    """Return whether a model was trained for a shorter context than the program's first prompt needs."""
    return target.trained is not None and target.trained <= client.prompt_tokens


def first_prompt(client: ClientProgram, target: ServerModel, given: Path | None) -> str:
    """Return a line that says how long a first prompt takes; "" if the model's directory is not known."""
    from moetier.runtime.model.names import model_directory

    what = f"A first prompt of {client.command} has about {client.prompt_tokens:,} tokens"
    try:
        place = given or model_directory(target.model)
        if not place.exists():
            return ""
        seconds = estimated(place, client.prompt_tokens)
    except MoetierError as error:
        return f"\n# The time of a first prompt is not known: {plain(error.cause)}"
    if seconds is None:
        return f"\n# {what}. How long they take is not known."
    text = f"\n# {what}: about {seconds:,.0f} s here. Later ones are computed from where they differ."
    return text + (" A shorter way: pi." if seconds > LONG_SECONDS and client.command != "pi" else "")


def program_of(client: ClientProgram) -> str:
    """Return the path of a program. Raises ConfigError if it is not installed."""
    if (program := shutil.which(client.command)) is None:
        raise ConfigError(f"{client.command} is not on the PATH.", f"Install it: npm install -g {client.package}")
    return program


def start(program: str, launch: Launch, words: Sequence[str]) -> int:
    """Run the program at a path until it ends, and return its status."""
    environment = os.environ | launch.environment
    with tempfile.TemporaryDirectory(prefix="moetier-launch-") as folder:
        path = folder
        if launch.file is not None:
            name, content = launch.file
            file = Path(folder, name)
            file.write_text(content)
            path = str(file)
        given = [path if word == FILE else word for word in launch.arguments]
        return run_in_foreground([program, *given, *words], environment)
