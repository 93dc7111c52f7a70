"""``moetier serve`` with answers from a script: the model computes every token, and then its logits are replaced.

python scripted_server.py SCRIPT RECORD PYTHON -m moetier.tools.main serve ...

SCRIPT is a JSON file: {"sessions": {MARK: [ANSWER, ...]}, "side": ANSWER, "end": ANSWER, "texts": {MARK: ANSWER}}. A
prompt with tools that contains MARK gets the answer whose number is the number of answers in the prompt, and after the
last one "end". Another prompt gets the answer of the last MARK of "texts" in it, if there is one, or else "side".
RECORD becomes a file of JSON lines, one for each POST request: path, status, headers, body, response (text), and for
each sequence: ids of the prompt, of the answer, number of cached tokens, why it ended.
"""

from __future__ import annotations

import contextvars
import json
import re
import sys
from pathlib import Path
from typing import Any

from agent_model import ANSWERS, MARKS, TOOLS

_MARK = "|".join(map(re.escape, MARKS))
# what is tokenised together in an answer: a mark, or a few letters, so that its tokens are not those of a rendered text
PIECES = re.compile(f"{_MARK}|(?:(?!{_MARK}).){{1,3}}", re.DOTALL)

_sequences = contextvars.ContextVar[list[Any]]("sequences")  # of the request


class Script:
    """Chooses the text of an answer by its prompt."""

    def __init__(self, script: dict[str, Any], tokenizer: Any) -> None:
        self.prompts: list[str] = []  # that were answered
        self._script = script
        self._tokenizer = tokenizer
        self._answers: dict[int, list[int]] = {}  # by the identity of a sequence

    def next_token(self, sequence: Any) -> int:
        """Return the token that follows those of a sequence."""
        if not sequence.new_tokens:
            self.prompts.append(self._tokenizer.decode(sequence.request.ids))
            self._answers[id(sequence)] = self._ids(self.answer(self.prompts[-1]))
        return self._answers[id(sequence)][sequence.new_tokens]

    def answer(self, prompt: str) -> str:
        """Return the text that answers a prompt."""
        for mark, answers in self._script["sessions"].items():
            if mark in prompt and TOOLS in prompt:
                number = prompt.count(ANSWERS) - 1  # the last one begins the answer
                return str(answers[number] if number < len(answers) else self._script["end"])
        texts = self._script.get("texts", {})
        last = max(texts, key=prompt.rfind, default="")
        return str(texts[last] if last and last in prompt else self._script["side"])

    def _ids(self, text: str) -> list[int]:
        pieces = PIECES.findall(text)
        ids = self._tokenizer(pieces, add_special_tokens=False)["input_ids"]
        return [*(token for piece in ids for token in piece), self._tokenizer.eos_token_id]


def scripted(compute: Any, script: Script) -> Any:
    """Return ``compute``, the method ``run`` of a runner, with logits that choose the tokens of a script."""

    def run(self: Any, tasks: Any, *more: Any) -> Any:
        logits = compute(self, tasks, *more)
        for task, row in zip(tasks, logits, strict=True):
            if row is not None:
                token = script.next_token(task.sequence)
                row.fill_(row.min() - 100)
                row[token] = row[token] + 100
        return logits

    return run


def record_requests(path: Path) -> None:
    """Append a line to the file ``path`` when a POST request ends."""
    from moetier.runtime.engine.engine import Engine
    from moetier.tools.serve import app as module

    def submit(self: Any, *arguments: Any) -> Any:
        sequence = submitted(self, *arguments)
        _sequences.get().append(sequence)
        return sequence

    submitted, Engine.submit = Engine.submit, submit
    application = module.application

    def recorded(*arguments: Any, **options: Any) -> Any:
        app = application(*arguments, **options)

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            await record(app, scope, receive, send)

        return recording

    async def record(app: Any, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        sequences, body, response, status = list[Any](), bytearray(), bytearray(), 0
        _sequences.set(sequences)

        async def read() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def write(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            response.extend(message.get("body", b""))
            await send(message)

        try:
            await app(scope, read, write)
        finally:
            line = {
                "path": scope["path"],
                "status": status,
                "headers": {name.decode(): value.decode() for name, value in scope["headers"]},
                "body": json.loads(body or b"null"),
                "response": response.decode(),
                "sequences": [
                    {
                        "prompt": [*each.request.ids],
                        "answer": each.ids[len(each.request.ids) :],
                        "cached": each.cached,
                        "finish": each.finish and each.finish.value,
                    }
                    for each in sequences
                ],
            }
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    module.application = recorded


if __name__ == "__main__":
    script_file, record_file = map(Path, sys.argv[1:3])
    sys.argv = sys.argv[5:]
    from transformers import AutoTokenizer

    from moetier.runtime.engine.model_runner import ModelRunner
    from moetier.runtime.engine.packed_runner import PackedRunner
    from moetier.tools.main import main
    from moetier.tools.serve.constraints import Constraints

    script = Script(json.loads(script_file.read_text()), AutoTokenizer.from_pretrained(sys.argv[2]))
    for runner in (ModelRunner, PackedRunner):
        runner.run = scripted(runner.run, script)
    # as for a model whose calls are not known: otherwise none can be malformed
    Constraints.of_dialogue = lambda *_, **__: None
    record_requests(record_file)
    sys.exit(main())
