"""Make tinymix's corpus: ``prepare_corpus.py PACKAGES TEXTS OUT``.

PACKAGES is a folder into which Debian's packages python3.13-doc, fortunes, fortunes-de, jargon-text, dict-foldoc,
manpages-de and manpages-fr were unpacked (``dpkg -x PACKAGE PACKAGES/NAME``), TEXTS one with ``tinyshakespeare.txt``
and ``promessi_sposi.txt``. The Python standard library of the interpreter that runs this and /usr/include are read too.

Writes OUT/tokenizer.json (byte-level BPE of 4,096 pieces), OUT/tokens.npz (``train`` and ``eval_KIND``, uint16) and
OUT/held_out/KIND.txt, the texts that the ``eval_*`` arrays come from.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer

LONGEST = 60_000  # characters of one document
SHORTEST = 400
CHUNK = 8_000  # characters; long books are cut into documents of this length
HELD_OUT = 60  # one document of so many
EVAL_TOKENS = 40_000
BEGIN, END = 0, 1  # token ids of <s> and </s>

ROFF_HEADINGS = re.compile(r"^\.(SH|SS|TP|B|I|BR|IP)\s+(.*)")
ROFF_DROPPED = re.compile(r"\\f[A-Z]|\\f\(..|\\&|\\c|\\/|\\,|\\:")
ROFF_OTHER = re.compile(r"\\\(..|\\\[[^\]]*\]")
ROFF_PLAIN = {"\\-": "-", "\\(aq": "'", "\\(dq": '"', "\\e": "\\", "\\ ": " ", "\\(bu": "*"}


def read(path: Path) -> str:
    """Empty where it is no UTF-8 text."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        return data.decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


def from_roff(text: str) -> str:
    """A manual page's words, without its macros."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".", "'")):
            if not (match := ROFF_HEADINGS.match(line)):
                continue
            line = match.group(2).replace('"', "")
        line = ROFF_DROPPED.sub("", line)
        for escape, plain in ROFF_PLAIN.items():
            line = line.replace(escape, plain)
        lines.append(ROFF_OTHER.sub("", line))
    return "\n".join(lines)


def take(paths: Iterable[Path], most_bytes: float, clean: Callable[[str], str] = str) -> list[str]:
    files = sorted(paths)
    random.shuffle(files)
    documents: list[str] = []
    total = 0
    for path in files:
        text = clean(read(path))[:LONGEST]
        if len(text) < SHORTEST:
            continue
        documents.append(text)
        total += len(text.encode())
        if total > most_bytes:
            break
    return documents


def chunks(text: str) -> list[str]:
    return [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]


def fortunes(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "." not in path.name)
    return [piece for path in files for piece in chunks(read(path).replace("\n%\n", "\n\n"))]


def collect(packages: Path, texts: Path) -> dict[str, list[str]]:
    library = Path(os.__file__).parent
    sources = [p for p in library.rglob("*.py") if "site-packages" not in p.parts]
    english = chunks(read(texts / "tinyshakespeare.txt")) + fortunes(packages / "fortunes/usr/share/games/fortunes")
    for path in sorted([*(packages / "jargon-text").rglob("*"), *(packages / "dict-foldoc").rglob("*.dz")]):
        if path.is_file():
            english += chunks(read(path))
    docs = packages / "python3.13-doc"
    german = take((packages / "manpages-de").rglob("*.gz"), 8e6, from_roff)
    return {
        "python": take(sources, 13e6),
        "c": take(Path("/usr/include").rglob("*.h"), 7e6),
        "docs_en": take([*docs.rglob("*.rst*"), *docs.rglob("*.txt")], 9e6),
        "prose_en": english,
        "de": german + fortunes(packages / "fortunes-de/usr/share/games/fortunes"),
        "fr": take((packages / "manpages-fr").rglob("*.gz"), 8e6, from_roff),
        "it": chunks(read(texts / "promessi_sposi.txt")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    random.seed(0)

    corpus = collect(arguments.packages, arguments.texts)
    sample = [t for kind in corpus.values() for t in random.sample(kind, max(1, int(len(kind) * 0.35)) if kind else 0)]
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    tokenizer.train_from_iterator(sample, vocab_size=4096, min_frequency=3, special_tokens=special)
    (arguments.out / "held_out").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out / "tokenizer.json"))

    arrays: dict[str, np.ndarray] = {}
    train: list[np.ndarray] = []
    for kind, documents in corpus.items():
        documents = [text for text in documents if text.strip()]
        random.shuffle(documents)
        count = max(3, len(documents) // HELD_OUT)
        (arguments.out / "held_out" / f"{kind}.txt").write_text("\n\n".join(documents[:count]))
        encoded = [np.array([BEGIN, *encoding.ids, END], np.uint16) for encoding in tokenizer.encode_batch(documents)]
        arrays[f"eval_{kind}"] = np.concatenate(encoded[:count])[:EVAL_TOKENS]
        train += encoded[count:]
        print(f"{kind}: {len(documents)} documents, {sum(map(len, encoded)):,} tokens")
    random.shuffle(train)
    arrays["train"] = np.concatenate(train)
    np.savez(arguments.out / "tokens.npz", **arrays)


if __name__ == "__main__":
    main()
