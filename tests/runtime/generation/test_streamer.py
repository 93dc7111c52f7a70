from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moetier.runtime.generation.streamer import TimedStreamer


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("One.\n\nUser:\nTwo.", "\n\nUser:", "One."),
        ("One.\n\nUse it.\n\nU", "\n\nUser:", "One.\n\nUse it.\n\nU"),
        ("One.\n\n", "\n\nUser:", "One.\n\n"),
        ("One.\n\nUser:\nTwo.", "", "One.\n\nUser:\nTwo."),
    ],
)
def test_what_stops_it_is_not_part_of_the_text(
    tinymix: Path, capsys: pytest.CaptureFixture[str], text: str, stop: str, expected: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinymix)
    streamer = TimedStreamer(tokenizer, echo=sys.stdout.write, stop=stop)
    streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    ids = tokenizer(text)["input_ids"]
    for token_id in ids:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert streamer.text == expected
    assert streamer.stopped == (text != expected)
    assert capsys.readouterr().out == expected + "\n"
    assert streamer.tokens == len(ids)


def test_special_tokens_are_no_text_if_so_asked(tinymix: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinymix)
    streamer = TimedStreamer(tokenizer, skip_special_tokens=True)
    first, last = streamer.seconds  # nothing came yet
    assert 0 <= first == last
    streamer.put(torch.tensor([[5]]))
    for token_id in (*tokenizer("One.")["input_ids"], tokenizer.eos_token_id):
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert streamer.text == "One."
