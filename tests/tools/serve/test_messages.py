"""Chat templates get what a client has sent: text beside calls, reasoning, and content in parts."""

from __future__ import annotations

from moetier.tools.serve.messages import for_template


def test_an_answer_keeps_what_it_says_beside_its_calls_and_its_reasoning() -> None:
    calls = [{"id": "call_1", "function": {"name": "f", "arguments": {}}}]
    answer = {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls}
    assert for_template([answer]) == [answer]


def test_content_is_one_text_and_fields_that_no_template_knows_are_left_out() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}]
    assert for_template(
        [
            {"role": "user", "content": parts, "name": "x"},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "c", "tool_call_id": "call_1"},
        ]
    ) == [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "c", "tool_call_id": "call_1"},
    ]
