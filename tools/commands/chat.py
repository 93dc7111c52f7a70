"""``moetier chat DIR``: chat with a model, on a terminal or through a pipe."""

from __future__ import annotations

import argparse
import sys

from moetier.runtime.generation.conversation import Conversation
from moetier.tools.chat.answer import Answering
from moetier.tools.chat.dialogue import ChatInput, Dialogue
from moetier.tools.cli.arguments import (
    add_decoding_arguments,
    add_prefill_argument,
    add_resource_arguments,
    add_speculation_arguments,
    decoding_of,
    resources_of,
)
from moetier.tools.cli.daemon_reads import DaemonWatch
from moetier.tools.cli.failure import plain
from moetier.tools.cli.loading import loaded
from moetier.tools.cli.parser import add_json, add_model_argument, show_first, utf8

EXAMPLES = (
    "moetier chat ./mixtral-4bit --ram 6GiB",
    'moetier chat Qwen/Qwen3-30B-A3B:4bit --system "Answer in one sentence." --context 8192',
)
NEW_TOKENS = 1024
ROOM = 4  # a prompt leaves 1/ROOM of the context to the answer, or --max-new-tokens if that is less


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier chat`."""
    add_model_argument(parser)
    parser.add_argument(
        "--system", type=utf8, metavar="TEXT", help="system prompt: instructions that precede the conversation"
    )
    parser.add_argument(
        "--status",
        action=argparse.BooleanOptionalAction,
        help="report each answer's tokens, speed and hits on standard error (default: only if that is a terminal)",
    )
    add_json(parser, "each answer, and /stats, as one line of JSON")
    add_decoding_arguments(parser, new_tokens=NEW_TOKENS)
    add_prefill_argument(parser)
    add_speculation_arguments(parser)
    add_resource_arguments(
        parser,
        context="maximum length of the conversation, in tokens (default: what fits into --kv-cache, at most the "
        "model's own length)",
    )
    show_first(parser, "--ram", "--kv-cache", "--context", "--system", "--max-new-tokens", "--temperature")


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    resources = resources_of(arguments)
    decoding = decoding_of(arguments)
    most: int = decoding.pop("max_new_tokens")
    status: bool = sys.stderr.isatty() if arguments.status is None else arguments.status
    if status and sys.stderr.isatty():
        print(f"loading {plain(str(arguments.directory))} ...", file=sys.stderr, flush=True)
    with loaded(arguments.directory, resources) as (model, tokenizer, _):
        from moetier.runtime.engine.engine import Engine

        with Engine.of(model) as engine:
            context = engine.context
            conversation = Conversation(
                tokenizer, system=arguments.system, context=context, answer_tokens=min(most, context // ROOM)
            )
            answering = Answering(
                model, tokenizer, engine, decoding, seed=arguments.seed, is_plain=conversation.is_plain
            )
            dialogue = Dialogue(
                conversation,
                answering,
                model.tiers,
                DaemonWatch(model.tiers),
                most=most,
                as_json=arguments.json,
                status=status,
            )
            dialogue.say(f"{arguments.directory}, experts of {model.tiers.where}; {model.tiers.describe_context()}")
            if conversation.is_plain:
                dialogue.say("the model has no chat template: a plain one is used, which the model may not understand")
            dialogue.say("/help lists the commands")
            dialogue.talk(ChatInput())
