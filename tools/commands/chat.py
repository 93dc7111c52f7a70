"""``moetier chat DIR``: chat with a model, on a terminal or through a pipe."""

from __future__ import annotations

import argparse
import sys

from moetier.runtime.generation.conversation import Conversation, Message
from moetier.tools.chat.answer import Answering
from moetier.tools.chat.chat_input import ChatInput
from moetier.tools.chat.commands import Commands
from moetier.tools.chat.dialogue import ROOM, Dialogue
from moetier.tools.chat.options import AnswerOptions
from moetier.tools.chat.state import KeptConversation, LineHistory, last_conversation, state_folder
from moetier.tools.cli.arguments import (
    add_decoding_arguments,
    add_prefill_argument,
    add_resource_arguments,
    add_speculation_arguments,
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier chat`."""
    add_model_argument(parser)
    advice = "Name one model. Type messages once chat has begun, or pipe them in: echo 'TEXT' | moetier chat DIR. "
    parser.excess_advice = advice  # type: ignore[attr-defined]  # of a CommandParser
    parser.add_argument(
        "--system", type=utf8, metavar="TEXT", help="system prompt: instructions that precede the conversation"
    )
    parser.add_argument(
        "--status",
        action=argparse.BooleanOptionalAction,
        help="report each answer's tokens, speed and hits on standard error (default: only if that is a terminal)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the last conversation of a terminal, whichever model it had"
    )
    parser.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the lines that are typed in a terminal, and the last conversations, in $XDG_STATE_HOME/moetier/chat "
        "(default: %(default)s)",
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
    folder = state_folder()
    resumed = last_conversation(folder) if arguments.resume else []
    status: bool = sys.stderr.isatty() if arguments.status is None else arguments.status
    if status and sys.stderr.isatty():
        print(f"loading {plain(str(arguments.directory))} ...", file=sys.stderr, flush=True)
    with loaded(arguments.directory, resources) as (model, tokenizer, _):
        from moetier.runtime.engine.engine import Engine
        from moetier.runtime.model.names import listed_name

        with Engine.of(model) as engine:
            options = AnswerOptions.of(arguments, model.generation_config)
            context = engine.context
            answer_tokens = min(options.max_new_tokens, context // ROOM)
            conversation = Conversation(
                tokenizer, system=arguments.system, context=context, answer_tokens=answer_tokens
            )
            answering = Answering(model, tokenizer, engine, options, is_plain=conversation.is_plain)
            is_terminal = sys.stdin.isatty()
            state = folder if arguments.history and (is_terminal or arguments.resume) else None
            dialogue = Dialogue(
                conversation,
                answering,
                model.tiers,
                DaemonWatch(model.tiers),
                options=options,
                kept=KeptConversation(state),
                title=f"{listed_name(arguments.directory) or arguments.directory}, experts of {model.tiers.where}",
                as_json=arguments.json,
                status=status,
            )
            dialogue.say(f"{dialogue.title}; {model.tiers.describe_context(context)}")
            if conversation.is_plain:
                dialogue.say("the model has no chat template: a plain one is used, which the model may not understand")
            if arguments.resume:
                resume(conversation, resumed, arguments.system)
                dialogue.say(f"resumed: {len(conversation.messages)} messages; /show prints the last ones")
            dialogue.say("/help lists the commands")
            dialogue.talk(ChatInput(LineHistory(state if is_terminal else None)), Commands(dialogue).run)


def resume(conversation: Conversation, messages: list[Message], system: str | None) -> None:
    """Go on with the messages of another chat. The system prompt of the command line replaces theirs."""
    conversation.load(messages)
    if system is not None:
        conversation.set_system(system)
