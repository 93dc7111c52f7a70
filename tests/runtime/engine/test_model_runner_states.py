"""Models with states besides keys and values continue behind a snapshot, and give what they give without a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from orders import NO_ORDER
from transformers import DynamicCache

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.kv_cache import LAST_TOKENS
from moetier.runtime.engine.model_runner import ModelRunner
from moetier.runtime.engine.pages.page_folder import PageFolder, PageOptions
from moetier.runtime.engine.pages.saved_pages import SavedPages
from moetier.runtime.engine.runner import Stopped, Task
from moetier.runtime.engine.sequence import Request, TokenSequence
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import use_causal_attention

GREEDY = {"do_sample": False}
# in alphabetical order; the states of the first three are those of most large models
HYBRIDS = {
    "kimi_linear", "nemotron_h", "qwen3_next", "bailing_hybrid", "granitemoehybrid", "inkling", "inkling2",
    "inkling2_loop", "lara_mini", "lfm2_moe", "qwen3_5_moe", "zaya",
}  # fmt: skip
WINDOWED = {"gpt_oss", "mixtral", "gemma4", "afmoe", "mimo_v2_flash"}
INDEXED = {
    "deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note", "glm5_next", "hy_v4", "hy_v4_vl", "mistral_large4",
    "qwen4_exp",
}  # fmt: skip
LATER = {"hy_v4_vl", "inkling2_loop", "lara_mini"}  # transformers 5.23 has not got them
QUICK = {
    "kimi_linear", "nemotron_h", "qwen3_next", "inkling", "lfm2_moe", "zaya", "gpt_oss", "mixtral", "glm_moe_dsa",
}  # fmt: skip
ALL = sorted(HYBRIDS | WINDOWED | INDEXED)
TYPES = [pytest.param(each, marks=[pytest.mark.slow] * (each not in QUICK)) for each in ALL]
FIRST, NEW, QUESTION = 150, 10, 40  # tokens of a prompt, its answer, and what follows it


def small_model(model_type: str) -> Any:
    model = tiny_model(model_type, torch.float32)
    use_causal_attention(model)
    return model


def some(tokens: int, seed: int) -> list[int]:
    return torch.randint(2, 250, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def logprobs_in_chunks(model: Any, ids: Ids[int], ends: Ids[int]) -> torch.Tensor:
    """Compute ids with transformers' own cache, in parts with these ends. Returns [tokens, vocabulary]."""
    cache, begin, logits = DynamicCache(config=model.config.get_text_config(decoder=True)), 0, list[torch.Tensor]()
    with torch.no_grad():
        for end in ends:
            part = torch.tensor([ids[begin:end]])
            positions = torch.arange(begin, end)[None]
            outputs = model(input_ids=part, position_ids=positions, use_cache=True, **{CACHE: cache})
            logits.append(outputs.logits[0])
            begin = end
    return torch.cat(logits).float().log_softmax(-1)


class Recording(ModelRunner):
    """Notes which tokens it computes."""

    def __init__(self, model: Any, pages: int) -> None:
        super().__init__(model, pages)
        self.computed = list[tuple[int, int]]()
        self.logits: torch.Tensor | None = None  # behind the last prompt

    def run(self, tasks: Any, *others: Any) -> Any:
        self.computed.append((tasks[0].first, tasks[0].stop))
        found = super().run(tasks, *others)
        if tasks[0].tokens > 1:
            self.logits = found[0]
        return found


@contextlib.contextmanager
def engine_of(runner: Recording, folder: Path | None = None) -> Iterator[Engine]:
    """``folder``: has pages on disk."""
    saved = None
    if folder is not None:
        pages = PageFolder(PageOptions(folder, 1 << 30, 1000.0), "tiny", b"b" * 32)
        saved = SavedPages(pages, runner.memory, NO_ORDER, has_states=runner.state_memory is not None)
    with Engine(runner, pages=60, max_sequences=1, chunk=100, context=1000, saved=saved) as engine:
        yield engine


# all types keep their states in the same layers of a cache: two are enough for the way over the disk
RESTARTED = [
    pytest.param(each, True, marks=[pytest.mark.slow] * (each not in {"qwen3_next", "nemotron_h", "glm_moe_dsa"}))
    for each in ALL
]
KEPT = [
    pytest.param(*each.values, False, marks=[*each.marks, *[pytest.mark.slow] * (number % 2)])
    for number, each in enumerate(TYPES)
]


@pytest.mark.parametrize(("model_type", "is_restarted"), [*KEPT, *RESTARTED])
def test_a_second_turn_computes_only_what_is_new(model_type: str, is_restarted: bool, tmp_path: Path) -> None:
    """It gives the tokens and the log probabilities of the whole prompt, as near as transformers' own chunks are.

    ``is_restarted``: the first turn was computed by another engine, and is on the disk.
    """
    model = small_model(model_type)
    prompt = some(FIRST, 1)
    with contextlib.ExitStack() as engines:
        runner = Recording(model, 60)
        engine = engines.enter_context(engine_of(runner, tmp_path if is_restarted else None))
        answer = [*engine.stream(Request(tuple(prompt), NEW, GREEDY))]
        history = [*prompt, *answer]
        second = [*history, *some(QUESTION, 2)]
        if is_restarted:
            engines.close()
            runner = Recording(model, 60)
            engine = engines.enter_context(engine_of(runner, tmp_path))
        runner.computed.clear()
        stream = engine.stream(Request(tuple(second), NEW, GREEDY))
        answers = [[*stream]]
        assert stream.sequence.cached >= len(prompt) - LAST_TOKENS, "it continues behind the first turn"
        found, computed = runner.logits, [*runner.computed]
        answers.append([*engine.stream(Request(tuple(second), NEW, GREEDY))])
    cached = stream.sequence.cached
    ends = [end for _, end in computed if end <= len(second)]
    assert computed[0][0] == cached
    assert sum(end - begin for begin, end in computed if end <= len(second)) == len(second) - cached
    # as the whole prompt was computed: in the same chunks, a token at a time in the answer
    first_ends = [100, *[FIRST - LAST_TOKENS] * (runner.state_memory is not None), *range(FIRST, cached + 1)]
    all_ends = [*(end for end in first_ends if end <= cached), *ends]
    whole, chunks = (logprobs_in_chunks(model, second, parts)[-1] for parts in ([len(second)], all_ends))
    assert found is not None
    ours = found.float().log_softmax(-1)
    assert (ours - whole).abs().max() <= (chunks - whole).abs().max() + 1e-5
    own = model.generate(
        torch.tensor([second]), attention_mask=torch.ones((1, len(second)), dtype=int), max_new_tokens=NEW, **GREEDY
    )
    assert answers == [own[0, len(second) :].tolist()] * 2


def test_a_state_is_loaded_onto_the_models_device() -> None:
    """On the device "meta", which computes no numbers."""
    runner = ModelRunner(model := small_model("qwen3_next"), 60)
    sequence = TokenSequence(Request(tuple(some(80, 1)), 1, GREEDY))
    runner.begin(sequence)
    runner.run([Task(sequence, 0, 70, [0, 1])], lambda: False)
    sequence.resume_at(70)
    pages = [*range(2, 2 + runner.state_pages(sequence))]
    runner.save_state(sequence, pages)
    model.to("meta")
    runner.load_state(sequence, pages)
    devices = set[str]()

    def observe(_: Any, given: Any, named: dict[str, Any]) -> None:
        devices.update(part.device.type for part in named[CACHE].state().values())
        raise Stopped

    with model.register_forward_pre_hook(observe, with_kwargs=True), pytest.raises(Stopped):
        runner.run([Task(sequence, 70, 80, [0, 1])], lambda: False)
    assert devices == {"meta"}


# -- types that can't resume: once a test fails, transformers has changed its code, and ``can_resume`` may change, too


def test_jamba_loses_its_state_between_chunks() -> None:
    model, ids = small_model("jamba"), some(60, 1)
    whole, chunks, steps = (logprobs_in_chunks(model, ids, ends)[-1] for ends in ([60], [40, 60], [40, *range(41, 61)]))
    assert (steps - whole).abs().max() < 1e-3, "a token at a time continues from it"
    assert (chunks - whole).abs().max() > 0.1


def test_unlimited_ocr_computes_an_answer_otherwise_than_a_prompt() -> None:
    model, ids = small_model("unlimited_ocr"), some(80, 1)
    prompt, answer = (logprobs_in_chunks(model, ids, ends)[-1] for ends in ([80], [20, *range(21, 81)]))
    assert (prompt - answer).abs().max() > 0.1


def test_minimax_takes_no_cache_but_its_own() -> None:
    with pytest.raises(ValueError, match="cache of its own"):
        logprobs_in_chunks(small_model("minimax"), some(20, 1), [20])
