"""Names of a model's small files: those of the tokenizer, templates, settings and licences.

All code that looks for, copies, fetches or downloads such files takes their names from here.
"""

from __future__ import annotations

import re

# files with a vocabulary. A tokenizer needs one of them
VOCABULARY = re.compile(
    r"tokenizer\.(json|model(\.v\d+)?)|vocab\.(json|txt)|tekken\.json|(spiece|sentencepiece(\.bpe)?)\.model|\w+\.tiktoken"
)
# files that describe a tokenizer
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
# files that a model directory copies from a checkpoint
COPIED = re.compile(
    rf"{VOCABULARY.pattern}|{'|'.join(map(re.escape, SETTINGS))}|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja|generation_config\.json"
    r"|(image_|video_|feature_extractor_)?(pre)?processor_config\.json|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.\w+)?",
)
# patterns of the files that are downloaded from the hub before any weights
DOWNLOADED = (
    "config.json", "model.safetensors.index.json", "tokenizer.json", *SETTINGS, "tokenizer.model*", "vocab.json",
    "vocab.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json", "chat_template.json*",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "generation_config.json", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# files that are tried where an object store can't be listed
USUAL = ("generation_config.json", "tokenizer.json", *SETTINGS, "tokenizer.model", "vocab.json", "chat_template.jinja")
