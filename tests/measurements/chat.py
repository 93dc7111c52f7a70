"""Measure the seconds to the first token of a second turn, with keys and values of the first turn kept or not.

    python tests/measurements/chat.py DIR --tokens 8000

The user's first message has ``--tokens`` tokens, and the second message is short. In each round the second message is
answered twice: with keys and values kept, as in ``moetier chat``, and with none kept. Prints for both the seconds, as
medians (least to most), and how many tokens were computed; and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers

import moetier
from moetier.runtime.generation.conversation import Conversation
from moetier.tools.bench.output import Spread
from moetier.tools.chat.answer import Answering, ChatReply
from moetier.tools.chat.options import AnswerOptions

SECOND = "And what came of it in the end?"
ANSWER = 8  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=8000, help="of the history (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ram", help="as for moetier chat")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens prefilled together (default: %(default)s)")
    parser.add_argument(
        "--text", type=Path, default=Path("tests/assets/texts/python.txt"), help="repeated (default: %(default)s)"
    )
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    context = arguments.tokens + 1024
    model, tokenizer = moetier.load(
        arguments.directory, ram=arguments.ram, daemon=None, context=context, prefill_chunk=arguments.chunk
    )
    assert tokenizer is not None, "it has no tokenizer"
    with model.tiers:
        ids = tokenizer(arguments.text.read_text())["input_ids"]
        ids = (ids * (arguments.tokens // len(ids) + 1))[: arguments.tokens]
        conversation = Conversation(tokenizer, system=None, context=context, answer_tokens=ANSWER)

        def answer(prompt: list[int], engine: moetier.Engine) -> ChatReply:
            options = AnswerOptions({"temperature": 0})
            answering = Answering(model, tokenizer, engine, options, is_plain=conversation.is_plain)
            return answering.answer(prompt, most=ANSWER, is_interrupted=lambda: False, echo=False)

        first = tokenizer.decode(ids)
        prompt, kept, anew = conversation.prompt(first), [], []
        with moetier.Engine.of(model) as engine:
            conversation.add(first, answer(prompt, engine).text)
        second = conversation.prompt(SECOND)
        for _ in range(arguments.rounds):
            with moetier.Engine.of(model) as engine:  # without pages of earlier prompts
                answer(prompt, engine)
                kept.append(answer(second, engine))
            with moetier.Engine.of(model) as engine:
                anew.append(answer(second, engine))
    spreads = []
    for name, answers in (("kept", kept), ("anew", anew)):
        spreads.append(Spread.of(each.timing.first_token for each in answers))
        print(
            f"{name}  first token after {spreads[-1].text(digits=3)} s: "
            f"{answers[0].timing.prompt_tokens} of {answers[0].prompt_tokens} tokens computed"
        )
    print(f"kept takes {spreads[0].median / spreads[1].median:.2%} of anew")


if __name__ == "__main__":
    sys.exit(main())
