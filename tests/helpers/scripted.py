"""Tiny models that write given texts: a token has one successor, and the layers add nothing to its embedding.

A special token at the end of a prompt chooses the text; after a prompt that ends with a line's end it is MAIN.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import tiny_config
from gguf_files import COMMON, EXPERTS, INNER, Vocabulary, mostly, write_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

MAIN, TOOL, TWICE, NO_JSON, NO_NAME, CUT, GOES_ON, LOOP = STARTS = (
    "[main]", "[tool]", "[twice]", "[nojson]", "[noname]", "[cut]", "[goes-on]", "[loop]"
)  # fmt: skip
ODD = "<odd>"  # a special token that no form of calls has
QWEN = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
FORMS = {  # by type of the model: begin and end of a turn, of thoughts and of a call
    "qwen3_moe": QWEN,
    "qwen3_5_moe_text": QWEN,
    "gemma4": ("<|turn>", "<turn|>", "<|channel>thought\n", "<channel|>", "<|tool_call>", "<tool_call|>"),
    "mixtral": ("<|im_start|>", "<|im_end|>", "<T>", "</T>", "<C>", "</C>"),  # RESPONSE_TEMPLATE
    "olmoe": QWEN,  # not known to transformers
}
CALLS = {  # what stands in the call of f with a = 1, and in those that are none
    "qwen3_5_moe_text": {TOOL: "\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n"},
    "gemma4": {TOOL: "call:f{a:1}", NO_JSON: "call:f{a:]", CUT: "call:f{a:1"},
}
JSON_CALLS = {
    TOOL: '{"name": "f", "arguments": {"a": 1}}',
    NO_JSON: '{"name": "f", "arguments": ]',
    NO_NAME: '{"arguments": {}}',
    CUT: '{"name": "f", "argume',
}
CUT_XML = "\n<function=f>\n<parameter=a>\n1\n</parameter>\n"
RESPONSE_TEMPLATE = {  # of mixtral's tokenizer
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<T>", "close": "</T>"},
        "tool_calls": {
            "open": "<C>", "close": "</C>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>"},
    },
}  # fmt: skip
FOREIGN = (
    "{% for m in messages %}[INST]{{ m.content }}[/INST]\n{% endfor %}{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% if add_generation_prompt %}ANSWER:\n{{ start | default('') }}{% endif %}"
)

# of qwen3_moe: an answer begins with the mark that chooses its text, also in later prompts; calls are written in
# another way than the model writes them
TURNS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ start if m.role == 'assistant' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ start }}{% endif %}"
)


def own_template(model_type: str) -> str:
    """A chat template like the one of the models for which transformers' parser was made."""
    begin, end, *_ = FORMS[model_type]
    whose = "model" if model_type == "gemma4" else "assistant"
    return (
        f"{{% for m in messages %}}{begin}{{{{ m.role }}}}\n{{{{ m.content }}}}{end}\n{{% endfor %}}"
        "{% if tools %}{{ tools | tojson }}\n{% endif %}"
        f"{{% if add_generation_prompt %}}{begin}{whose}\n{{{{ start | default('') }}}}{{% endif %}}"
    )


def texts_of(model_type: str) -> dict[str, list[str]]:
    """The tokens of each text, by the token that chooses it."""
    _, end, think, thought, call, called = FORMS[model_type]
    inner = CALLS.get(model_type, JSON_CALLS)
    texts = {
        MAIN: [think, "Penso", thought, "\n\nCiao", ODD, " mondo", end],
        TOOL: ["Ecco", ": ", call, inner[TOOL], called, end],
        TWICE: [f"{call}{inner[TOOL]}{called}", f"{call}{inner[TOOL]}{called}".replace("1", "2"), end],
        GOES_ON: ["Ancora", f"{thought} ", "Fatto", end],
        LOOP: ["x", "x"],
    }
    for fault, text, mark in (NO_JSON, "Male", f" {call}"), (NO_NAME, "Peggio", f"\n{call}"):
        if fault in inner:
            texts[fault] = [text, mark, inner[fault], f"{called} e {text}", end]
    return texts | {CUT: ["Mezzo", f" \n{call}", inner.get(CUT, CUT_XML), end]}


def tokens_of(model_type: str) -> list[str]:
    """Bytes as byte-level tokenizers write them, then whole pieces of text."""
    pieces = [*STARTS, ODD, *FORMS[model_type], *(piece for text in texts_of(model_type).values() for piece in text)]
    letters = [*bytes_to_unicode().values(), "he"]
    return [*letters, *(piece for piece in dict.fromkeys(pieces) if piece not in letters)]


def is_special(model_type: str, token: str) -> bool:
    """Gemma's marks are; of Qwen's those of turns only."""
    marks = FORMS[model_type][: None if model_type == "gemma4" else 2]
    return token in (*STARTS, ODD, *marks)


def tokenizer_of(model_type: str) -> Any:
    """A byte-level one, with the own template."""
    letters = [*bytes_to_unicode().values(), "he"]
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=is_special(model_type, token), normalized=False)
            for token in tokens_of(model_type)[len(letters) :]
        ]
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=FORMS[model_type][1])
    made.chat_template = own_template(model_type)
    if model_type == "mixtral":
        made.response_template = RESPONSE_TEMPLATE
    return made


def write_scripts(model: Any, model_type: str) -> Any:
    """Change a model's weights; return it."""
    tokens = tokens_of(model_type)
    number = {token: at for at, token in enumerate(tokens)}
    texts = texts_of(model_type)
    after = {start: text[0] for start, text in texts.items()} | {"\u010a": texts[MAIN][0]}  # a line's end
    for text in texts.values():
        after |= dict(pairwise(text))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.zero_()
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        torch.manual_seed(0)
        table.copy_(torch.randint(0, 2, table.shape) * 2.0 - 1)
        for token, successor in after.items():
            head[number[successor]] += table[number[token]]
    return model


def write_checkpoint(folder: Path, model_type: str) -> Path:
    """Save a model of the type with its tokenizer."""
    size = {"vocab_size": len(tokens_of(model_type)), "hidden_size": 128, "max_position_embeddings": 512}
    name = {
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
        "gemma4": "Gemma4ForConditionalGeneration",
        "mixtral": "MixtralForCausalLM",
        "olmoe": "OlmoeForCausalLM",
    }[model_type]
    made = getattr(transformers, name)
    if model_type == "gemma4":
        text = tiny_config(
            transformers.Gemma4TextConfig, **size, vocab_size_per_layer_input=size["vocab_size"], sliding_window=512
        )
        config = tiny_config(made.config_class, text_config=text.to_dict())
    elif model_type == "qwen3_5_moe_text":  # without linear attention, so that prefixes are kept
        config = tiny_config(made.config_class, **size, layer_types=["full_attention"] * 3)
    else:
        config = tiny_config(made.config_class, **size)
    model = write_scripts(made._from_config(config, dtype=torch.bfloat16), model_type)
    tokenizer = tokenizer_of(model_type)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_file(path: Path) -> Path:
    """Write a GGUF file of qwen3_moe with its tokenizer."""
    model_type = "qwen3_moe"
    tokens = tokens_of(model_type)
    config = transformers.Qwen3MoeConfig(
        **COMMON | {"vocab_size": len(tokens)},
        num_experts=EXPERTS,
        moe_intermediate_size=INNER,
        intermediate_size=INNER,
    )
    model = write_scripts(transformers.Qwen3MoeForCausalLM(config).float(), model_type)
    types = [3 if is_special(model_type, token) else 4 if len(token) > 1 else 1 for token in tokens]
    vocabulary = Vocabulary(tokens, types, FORMS[model_type][1], own_template(model_type))
    return write_gguf(path, model, mostly("Q8_0"), vocabulary=vocabulary)
