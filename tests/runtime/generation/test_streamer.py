from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
    ids = tokenizer(text)["input_ids"]
    streamer.take(ids)
    assert streamer.text == expected
    assert streamer.is_stopped == (text != expected)
    assert capsys.readouterr().out == expected + "\n"
    assert streamer.tokens == len(ids) if text == expected else 0 < streamer.tokens < len(ids)


def test_special_tokens_are_no_text_if_so_asked(tinymix: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tinymix)
    streamer = TimedStreamer(tokenizer, skip_special_tokens=True)
    first, last = streamer.seconds  # nothing came yet
    assert 0 <= first == last
    streamer.take([*tokenizer("One.")["input_ids"], tokenizer.eos_token_id])
    assert streamer.text == "One."
