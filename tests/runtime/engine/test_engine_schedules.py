"""A request has the tokens and log probabilities of its run alone, bit for bit, in random schedules with real models.

In a schedule, requests arrive and are cancelled while others are computed, with few pages, and chunks of any size. The
experts come from a daemon that has memory for a few of them. The run alone has all experts in its own memory.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
import torch
from chunks import published_widths
from comparison import convert_tiny, smallest_ram
from daemons import running_daemon
from readers import PATIENCE
from torch import Tensor

import moetier
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.model_runner import ModelRunner
from moetier.runtime.engine.packed_runner import PackedRunner, can_pack
from moetier.runtime.engine.sequence import Finish, Request, TokenSequence

# without a window and with one, and each trunk; the rest with the slow tests
MODELS = [("qwen3_moe", 4)]
MORE_MODELS = [("gpt_oss", 16), ("qwen3_moe", 16), ("mixtral", 16), ("mixtral", 4), ("gpt_oss", 4)]
QUICK, SCHEDULES = 1, 34  # of each model
CONTEXT = 400
DECODING: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2},
]


class Recorder:
    """A logits processor that notes the log probabilities [vocabulary] of each token, and changes nothing."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.found.append(scores[0].log_softmax(-1))
        return scores


@dataclass
class Arrival:
    """A request, and when it comes and goes: after how many tokens of all requests together."""

    ids: list[int]
    most: int
    decoding: dict[str, Any]
    seed: int
    user: str
    after: int
    cancelled_after: int | None
    recorder: Recorder = field(default_factory=Recorder)
    sequence: TokenSequence | None = None

    def request(self, recorder: Recorder) -> Request:
        """Return the request, whose log probabilities ``recorder`` notes."""
        decoding = {**self.decoding, "logits_processor": [recorder]}
        return Request(tuple(self.ids), self.most, decoding, self.seed, self.user)


@dataclass(frozen=True)
class Model:
    """A model with all experts in memory, and the folder of a daemon that serves it with little memory."""

    alone: Any
    directory: Path
    daemon: Path


@pytest.fixture(
    scope="module",
    params=[*MODELS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_MODELS)],
    ids=lambda model: f"{model[0]}-{model[1]}",
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    kind, trunk_bits = request.param
    folder = tmp_path_factory.mktemp("schedules")
    with published_widths():
        room = {"max_position_embeddings": CONTEXT}
        _, directory = convert_tiny(kind, torch.bfloat16, folder, bits=4, trunk_bits=trunk_bits, **room)
    with running_daemon(directory, ram=2 * smallest_ram(directory), folder=folder / "daemon") as daemon:
        alone, _ = moetier.load(directory, daemon=None, same_bits=True)
        with alone.tiers:
            yield Model(alone, directory, daemon.folder)
        assert daemon.stats().host.evictions > 0


@pytest.mark.parametrize(
    "seed", [*range(QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, SCHEDULES))]
)
def test_company_changes_no_bit(model: Model, seed: int) -> None:
    random_ = random.Random(seed)
    arrivals, expected = [], []
    for arrival in requests(random_, expected):
        arrivals.append(arrival)
        expected.append(alone(model.alone, arrival))
    torch.set_num_threads(random_.randrange(1, 4))
    pass_tokens = random_.choice([8, 30, 1000, None])
    pages, most = random_.choice([6, 6, 8, 11]), random_.randrange(2, 6)
    chunk = random_.choice([1, 8, 33, 64, 500])
    later = random_.choice([None, 5, 40])
    client, _ = moetier.load(model.directory, daemon=str(model.daemon), same_bits=True)
    assert can_pack(client)
    with (
        client.tiers,
        Engine(
            ModelRunner(client, pages)
            if pass_tokens is None
            else PackedRunner(client, pages, later_chunk=chunk, pass_tokens=pass_tokens),
            **{"pages": pages, "max_sequences": most, "chunk": chunk, "context": CONTEXT, "later_chunk": later},
        ) as engine,
    ):
        run(engine, arrivals)
        assert not engine.sequences
    for arrival, (tokens, log_probabilities) in zip(arrivals, expected, strict=True):
        assert arrival.sequence is not None
        answer = arrival.sequence.ids[len(arrival.ids) :]
        if arrival.sequence.finish is Finish.CANCELLED:
            assert answer == tokens[: len(answer)]
        else:
            assert answer == tokens
        assert len(arrival.recorder.found) == len(answer)
        for one, other in zip(arrival.recorder.found, log_probabilities, strict=False):
            assert torch.equal(one, other)


def requests(random_: random.Random, answers: list[tuple[list[int], list[Tensor]]]) -> Iterator[Arrival]:
    """Yield random requests. Prompts begin alike, or continue the conversation of an earlier request.

    ``answers`` has what the requests yielded so far are answered.
    """
    text = [random_.randrange(2, 250) for _ in range(150)]
    asked = list[list[int]]()
    after = 0
    for number in range(random_.randrange(3, 8)):
        ids = text[: random_.choice([0, 20, 63, 64, 130])]
        if asked and random_.random() < 0.4:
            earlier = random_.randrange(len(asked))
            ids = (asked[earlier] + answers[earlier][0])[:160]
        asked.append(ids + [random_.randrange(2, 250) for _ in range(random_.randrange(1, 60))])
        after += random_.choice([0, 0, 0, 5])
        yield Arrival(
            ids=asked[-1],
            most=random_.choice([2, 10, 40, 80]),
            decoding=random_.choice(DECODING),
            seed=number,
            user=random_.choice(["", "", "", "other"]),
            after=after,
            cancelled_after=after + random_.randrange(1, 40) if random_.random() < 0.2 else None,
        )


def alone(model: Any, arrival: Arrival) -> tuple[list[int], list[Tensor]]:
    """Return the tokens and log probabilities of a request that is computed alone, with its whole prompt together."""
    pages, recorder = -(-CONTEXT // 64), Recorder()
    with Engine(ModelRunner(model, pages), pages=pages, max_sequences=1, chunk=CONTEXT, context=CONTEXT) as engine:
        return [*engine.stream(arrival.request(recorder))], recorder.found


def run(engine: Engine, arrivals: list[Arrival]) -> None:
    """Let requests come and go as they are to, on the engine's thread, so that a seed always makes the same schedule.

    The next one comes early if there is no other.
    """
    waiting, ended, sampled, done = [*arrivals], 0, 0, threading.Event()

    def come() -> None:
        arrival = waiting.pop(0)
        arrival.sequence = engine.submit(arrival.request(arrival.recorder), on_token, on_end)

    def on_token(*_: object) -> None:
        nonlocal sampled
        sampled += 1
        while waiting and waiting[0].after <= sampled:
            come()
        for arrival in arrivals:
            if arrival.sequence is not None and arrival.cancelled_after == sampled:
                arrival.sequence.cancel()

    def on_end(_: TokenSequence) -> None:
        nonlocal ended
        ended += 1
        if waiting and ended == len(arrivals) - len(waiting):
            come()
        elif ended == len(arrivals):
            done.set()

    come()
    assert done.wait(PATIENCE)
