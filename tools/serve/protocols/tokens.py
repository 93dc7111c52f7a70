"""Requests to tokenise and to detokenise, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, FailFast, Field

from .body import Body
from .chat import Message, Tool, of_template
from .openai_body import TokenId
from .query import ChatPrompt
from .refusal import Refusal


class TokenizeBody(Body):
    """Body of a request for the tokens of a text, or of messages."""

    neutral: ClassVar = {"add_generation_prompt": True, "continue_final_message": False, "return_token_strs": False}
    unsupported: ClassVar = ("chat_template",)

    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1), FailFast()] = None
    tools: Annotated[list[Tool] | None, FailFast()] = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(of_template)] | None = None

    @property
    def text(self) -> str | ChatPrompt:
        """What is to be tokenised.

        Raises Refusal unless there are either a prompt or messages, with fields that have an effect on them.
        """
        if (self.prompt is None) == (self.messages is None):
            raise Refusal(400, "prompt: give either a prompt or messages.", param="prompt")
        of_others = ("tools", "chat_template_kwargs") if self.messages is None else ("add_special_tokens",)
        for name in of_others:
            if getattr(self, name):
                other = "messages" if self.messages is None else "a prompt"
                raise Refusal(400, f"{name}: only {other} can have it.", param=name)
        if self.prompt is not None:
            return self.prompt
        given = self.model_dump(include={"messages", "tools"}, exclude_none=True)
        return ChatPrompt(given["messages"], given.get("tools"), variables=self.chat_template_kwargs or {})


class DetokenizeBody(Body):
    """Body of a request for the text of tokens."""

    tokens: Annotated[list[TokenId], FailFast()]
