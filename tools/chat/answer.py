"""One answer of a model in a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moetier.runtime.generation.conversation import PLAIN_STOP
from moetier.runtime.generation.decoding import behind, chunks_of
from moetier.runtime.generation.prompt_cache import PromptCache
from moetier.tools.cli.failure import show
from moetier.tools.cli.report import Timing, tokens_text

from .interrupt import Interrupt, Interrupted

END, CUT, INTERRUPTED = "stop", "length", "interrupted"


@dataclass(frozen=True, slots=True)
class Answer:
    """Text of one answer, why it ended, and what it took."""

    text: str
    finish_reason: str  # END, CUT at the most tokens, or INTERRUPTED
    prompt_tokens: int
    kept_tokens: int  # of the prompt, from earlier answers
    timing: (
        Timing  # its prompt tokens are those that were computed; of a prompt that was cut, those that are kept of it
    )
    hits: int  # of experts in the uppermost tier, and
    misses: int

    def to_json(self) -> dict[str, Any]:
        """Return the answer as a message of the assistant, with its figures."""
        demands = self.hits + self.misses
        return {
            "role": "assistant",
            "content": self.text,
            "finish_reason": self.finish_reason,
            **self.timing.to_json(),
            "prompt_tokens": self.prompt_tokens,
            "kept_tokens": self.kept_tokens,
            "computed_tokens": self.timing.prompt_tokens,
            "hit_ratio": self.hits / demands if demands else 0.0,
        }

    def line(self) -> str:
        """For people."""
        timing, demands = self.timing, self.hits + self.misses
        why = {END: "", CUT: ", cut short", INTERRUPTED: ", interrupted"}[self.finish_reason]
        hits = f"hits {self.hits / demands if demands else 0:.1%}"
        if not timing.new_tokens:
            done = self.kept_tokens + timing.prompt_tokens
            return (
                f"[no tokens{why} after {timing.total:.2f} s: {done} of {self.prompt_tokens} prompt tokens are kept, "
                f"{timing.prompt_tokens} of them new; {hits}]"
            )
        return (
            f"[{tokens_text(timing.new_tokens)}{why}, {timing.decode_rate:.1f} tokens/s; first after "
            f"{timing.first_token:.2f} s, {timing.prompt_tokens} of {self.prompt_tokens} prompt tokens new; "
            f"{hits}]"
        )


class Answering:
    """A loaded model that answers prompts of one conversation after the other. ``decoding``: as ``decoding_of`` has it;
    ``is_plain``: of a model without a chat template, whose text may go on with the person's part."""

    def __init__(self, model: Any, tokenizer: Any, decoding: dict[str, Any], *, chunk: int, is_plain: bool) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._decoding = decoding | ({"stop_strings": [PLAIN_STOP]} if is_plain else {})
        self._stop = PLAIN_STOP if is_plain else ""
        self._chunk = chunk
        self.kept = PromptCache(model)

    def answer(self, ids: list[int], *, most: int, interrupt: Interrupt, echo: bool) -> Answer:
        """Of at most so many tokens, printed as it comes if ``echo``; if interrupted, what there was of it by then."""
        import torch

        from moetier.runtime.generation.streamer import TimedStreamer
        from moetier.runtime.moe.experts import experts_modules

        model, before = self._model, self._model.tiers.stats()[-1]
        known = self.kept.begin(ids)
        streamer = TimedStreamer(
            self._tokenizer, echo=show if echo else None, skip_special_tokens=True, stop=self._stop
        )

        def between_layers(*_: object) -> None:
            if not streamer.tokens:  # else what was computed stays whole: it ends at a token
                interrupt.check()

        def between_tokens(token_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return torch.full((1,), interrupt.asked, dtype=torch.bool, device=token_ids.device)

        prompt, sequence, handles = torch.tensor([ids], device=model.device), ids, []
        try:
            handles = [module.register_forward_pre_hook(between_layers) for module in experts_modules(model).values()]
            sequence = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                **behind(len(ids), self._decoding) | {"max_new_tokens": most},
                **chunks_of(model, len(ids) - known, self._chunk),
                **self.kept.options,
                stopping_criteria=[between_tokens],
                tokenizer=self._tokenizer,
                streamer=streamer,
            )[0].tolist()
        except BaseException as error:
            if echo:
                print(flush=True)  # what is said of the error begins a line
            if not isinstance(error, Interrupted):
                raise
        finally:
            for handle in handles:
                handle.remove()
            self.kept.end(sequence)
        after = model.tiers.stats()[-1]
        computed = len(ids) - known if streamer.tokens else max(self.kept.length - known, 0)
        return Answer(
            streamer.text.strip() if self._stop else streamer.text,
            self._why(streamer, sequence, most, interrupt),
            len(ids),
            known,
            Timing(computed, streamer.tokens, *streamer.seconds, min(streamer.tokens, 1)),
            after.hits - before.hits,
            after.misses - before.misses,
        )

    def _why(self, streamer: Any, sequence: list[int], most: int, interrupt: Interrupt) -> str:
        ends = self._model.generation_config.eos_token_id
        if streamer.stopped or (streamer.tokens and sequence[-1] in (ends if isinstance(ends, list) else [ends])):
            return END
        return CUT if streamer.tokens == most else INTERRUPTED if interrupt.asked else END
