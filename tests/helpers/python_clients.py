"""Python clients, unchanged, at a scripted server.

``python python_clients.py URL KEY CLIENT`` ends with an error if the client does not get what the script says.

A request with the tool ``weather`` gets a call of it, and then ANSWER; all others get ANSWER at once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PACKAGES = ("openai==3.57.0", "anthropic==2.14.0", "langchain-openai==1.7.4", "litellm==1.110.2")
MODEL, ANSWER, CITY, THOUGHT = "agent", "It rains in Oslo.", {"city": "Oslo"}, "Where is it?"
MARK, RESULT = "[weather]", "Rain, 7 degrees."
QUESTION = f"How is the weather? {MARK}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA}
SCRIPT = {
    "sessions": {
        MARK: [
            f"<think>\n{THOUGHT}\n</think>\n\n"
            f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': CITY})}\n</tool_call>",
            ANSWER,
        ]
    },
    "side": ANSWER,
    "end": "The script has ended.",
}


def same(some: object, other: object) -> None:
    if some != other:
        raise SystemExit(f"{some!r} is not {other!r}")


def chat(url: str, key: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    ask = client.chat.completions.create
    same([model.id for model in client.models.list()], [MODEL])
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    done = ask(model=MODEL, messages=messages)
    same((done.choices[0].message.content, done.choices[0].finish_reason), (ANSWER, "stop"))
    pieces = [*ask(model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True})]
    same("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices), ANSWER)
    same(pieces[-1].usage.total_tokens, done.usage.total_tokens)
    tools: list[Any] = [{"type": "function", "function": TOOL}]
    called = ask(model=MODEL, messages=messages, tools=tools).choices[0]
    (call,) = called.message.tool_calls
    same(
        (called.finish_reason, call.function.name, json.loads(call.function.arguments)), ("tool_calls", "weather", CITY)
    )
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as stream:
        (again,) = stream.get_final_completion().choices[0].message.tool_calls
    same((again.function.name, json.loads(again.function.arguments)), ("weather", CITY))
    messages += [called.message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    done = ask(model=MODEL, messages=messages, tools=tools)
    same(done.choices[0].message.content, ANSWER)
    if done.usage.prompt_tokens_details.cached_tokens < done.usage.prompt_tokens / 2:
        raise SystemExit(f"{done.usage}")


def responses(url: str, key: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    asked: dict[str, Any] = {"model": MODEL, "store": False}
    same(client.responses.create(input=QUESTION, **asked).output_text, ANSWER)
    events = [*client.responses.create(input=QUESTION, stream=True, **asked)]
    same("".join(event.delta for event in events if event.type == "response.output_text.delta"), ANSWER)
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    tools: list[Any] = [{"type": "function", **TOOL, "strict": False}]
    done = client.responses.create(input=items, tools=tools, **asked)
    (call,) = (item for item in done.output if item.type == "function_call")
    same((call.name, json.loads(call.arguments)), ("weather", CITY))
    items += [*done.output, {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
    same(client.responses.create(input=items, tools=tools, **asked).output_text, ANSWER)


def messages(url: str, key: str) -> None:
    from anthropic import Anthropic

    client = Anthropic(base_url=url.removesuffix("/v1"), auth_token=key, max_retries=0)
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 200}
    done = client.messages.create(messages=said, **asked)
    same((done.content[0].text, done.stop_reason), (ANSWER, "end_turn"))
    prompt = done.usage.input_tokens + done.usage.cache_read_input_tokens
    same(client.messages.count_tokens(model=MODEL, messages=said).input_tokens, prompt)
    with client.messages.stream(messages=said, **asked) as stream:
        same("".join(stream.text_stream), ANSWER)
    tools: list[Any] = [{"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA}]
    asked |= {"tools": tools, "thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}
    done = client.messages.create(messages=said, **asked)
    thought, call = done.content
    same((thought.thinking.strip(), call.name, call.input, done.stop_reason), (THOUGHT, "weather", CITY, "tool_use"))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
    said += [{"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
    with client.messages.stream(messages=said, **asked) as stream:
        final = stream.get_final_message()
    same(final.content[-1].text, ANSWER)
    if not final.usage.cache_read_input_tokens:
        raise SystemExit(f"{final.usage}")


def langchain(url: str, key: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def weather(city: str) -> str:
        """Tells the weather."""
        return f"{city}: {RESULT}"

    model = ChatOpenAI(model=MODEL, base_url=url, api_key=key, max_retries=0)
    same(model.invoke(QUESTION).content, ANSWER)
    same("".join(str(piece.content) for piece in model.stream(QUESTION)), ANSWER)
    bound, said = model.bind_tools([weather]), [HumanMessage(QUESTION)]
    called = bound.invoke(said)
    (call,) = called.tool_calls
    same((call["name"], call["args"]), ("weather", CITY))
    said += [called, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    same(bound.invoke(said).content, ANSWER)


def litellm(url: str, key: str) -> None:
    from litellm import completion

    asked: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": url, "api_key": key}
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    same(completion(messages=said, **asked).choices[0].message.content, ANSWER)
    pieces = completion(messages=said, stream=True, **asked)
    same("".join(piece.choices[0].delta.content or "" for piece in pieces), ANSWER)
    asked["tools"] = [{"type": "function", "function": TOOL}]
    message = completion(messages=said, **asked).choices[0].message
    (call,) = message.tool_calls
    same((call.function.name, json.loads(call.function.arguments)), ("weather", CITY))
    said += [message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    same(completion(messages=said, **asked).choices[0].message.content, ANSWER)


CLIENTS = {each.__name__: each for each in (chat, responses, messages, langchain, litellm)}

if __name__ == "__main__":
    CLIENTS[sys.argv[3]](*sys.argv[1:3])
