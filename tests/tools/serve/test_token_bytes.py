"""Bytes of tokens, of tokenizers that do not write bytes as letters."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moetier.tools.serve.token_bytes import TokenBytes


def test_single_bytes_and_blanks_are_what_they_stand_for() -> None:
    vocabulary = {"<0xC3>": 0, "<0xc3>": 1, "\u2581a\u2581": 2, "\u00e9": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_tokens([AddedToken("<\u2581>", normalized=False)])
    bytes_of = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    found = [bytes_of(token) for token in range(6)]
    assert found == [b"\xc3", b"<0xc3>", b" a ", "\u00e9".encode(), "<\u2581>".encode(), b""]
