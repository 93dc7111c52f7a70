"""Bytes of the texts of tokens."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how tokenizers that are not byte-level write the tokens of single bytes
BLANK = "\u2581"  # how they write a blank


class TokenBytes:
    """Returns the bytes of a token's text. A character may take several tokens, so not all are text."""

    def __init__(self, tokenizer: Any) -> None:
        """Use a tokenizer of transformers with a tokenizer of tokenizers behind it."""
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder
        is_byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._bytes = {letter: byte for byte, letter in bytes_to_unicode().items()} if is_byte_level else None

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token, which are empty if the tokenizer does not know it."""
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._bytes is not None:
            return bytes(self._bytes[letter] for letter in piece if letter in self._bytes)
        if match := BYTE.fullmatch(piece):
            return bytes.fromhex(match[1])
        return str(piece).replace(BLANK, " ").encode()
