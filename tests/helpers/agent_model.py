"""A small model for agents: random weights, a long context, and tool calls as transformers knows them of qwen3_moe.

Its texts come from a script (scripted_server.py). Its chat template does what those of Qwen3 do: it keeps an answer's
reasoning only behind the last message of the user, and writes tool calls as JSON in its own way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import tiny_config
from tokenizers import AddedToken, Tokenizer

from moetier.tools.convert.api import convert

CONTEXT = 1 << 17
BEGIN, END = "<|im_start|>", "<|im_end|>"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ANSWERS = f"{BEGIN}assistant\n"  # begins each answer in a prompt
TOOLS = "# Tools in JSON:"  # is in the prompts of requests that have tools

TEMPLATE = """
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == "user" %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- if tools -%}
    {{- "<|im_start|>system\\nTOOLS\\n" }}
    {%- for tool in tools %}{{ tool | tojson }}{{ "\\n" }}{% endfor %}
    {{- messages[0].content if messages[0].role == "system" }}{{ "<|im_end|>\\n" }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if m.reasoning_content and loop.index0 > last.user %}
            {{- "<think>\\n" + m.reasoning_content.strip() + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- m.content.strip() }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ "}\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- elif m.role == "tool" %}
        {{- "<|im_start|>user" if loop.first or loop.previtem.role != "tool" }}
        {{- "\\n<tool_response>\\n" + m.content + "\\n</tool_response>" }}
        {{- "<|im_end|>\\n" if loop.last or loop.nextitem.role != "tool" }}
    {%- elif not (tools and loop.first and m.role == "system") %}
        {{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{{- "<|im_start|>assistant\\n" if add_generation_prompt }}""".replace("TOOLS", TOOLS)


def write_model(folder: Path, tinymix: Path) -> Path:
    """Write a model directory of 4 bits, with the vocabulary of tinymix."""
    tokenizer = agent_tokenizer(tinymix)
    kind = transformers.Qwen3MoeForCausalLM
    torch.manual_seed(0)
    config = tiny_config(
        kind.config_class,
        vocab_size=len(tokenizer),
        hidden_size=128,
        head_dim=64,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
    )
    model = kind._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        convert(checkpoint, folder, bits=4)
    return folder


def agent_tokenizer(tinymix: Path) -> Any:
    """Return the tokenizer of tinymix with the marks of turns, reasoning and tool calls."""
    tokenizer = Tokenizer.from_file(str(tinymix / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in (BEGIN, END)])
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = TEMPLATE
    return fast
