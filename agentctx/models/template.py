"""From LangChain messages to the token ids of a finished prompt.

Documents are data: a text that contains the model's own control tokens (`<|im_end|>`) must not end its
message. A zero-width space breaks such a token in message contents; the citation check ignores it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jinja2 import TemplateError
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage

from agentctx.memory.errors import ModelError
from agentctx.models.jinja import compiled
from agentctx.models.tokenizer import Tokenizer

_ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}
_ZERO_WIDTH_SPACE = "\u200b"


class ChatTemplate:
    """A tokenizer with its chat template; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the model has no chat template",
                hint="choose an instruction-tuned model; a base model cannot chat",
            )
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend
        try:
            self._render = compiled(tokenizer.chat_template, tokenizer.specials)
        except TemplateError as error:
            raise ModelError(f"the model's chat template cannot be used: {error}") from error
        controls = sorted(tokenizer.controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")

    def encode(self, messages: Sequence[BaseMessage], *, prefill: str = "") -> list[int]:
        """The ids of the prompt up to where the model speaks, `prefill` being what it has already said."""
        return self.tokenizer.encode(self.render(messages) + prefill)

    def plain(self, text: str) -> bool:
        """Whether a text holds no control token, so that its tokens are the same in a prompt and alone."""
        return self._control.search(text) is None

    def encode_text(self, text: str) -> list[int]:
        """The ids of a bare text."""
        return self.tokenizer.encode(text)

    def render(self, messages: Sequence[BaseMessage]) -> str:
        """The prompt as text; ModelError `refused` if the template does not take such a conversation."""
        turns = [{"role": _role(message), "content": self._content(message)} for message in messages]
        try:
            return self._render(turns)
        except TemplateError as error:
            raise ModelError(
                f"the model's chat template refuses the messages: {error}", code="refused"
            ) from error

    def _content(self, message: BaseMessage) -> str:
        blocks = message.content if isinstance(message.content, list) else []
        kinds = {block.get("type", "") for block in blocks if isinstance(block, dict)} - {"text"}
        if kinds or (isinstance(message, AIMessage) and message.tool_calls):
            what = ", ".join(sorted(map(str, kinds))) or "tool calls"
            raise ModelError(f"a local model takes text only, not {what}", code="refused")
        return self._control.sub(
            lambda found: found[0][0] + _ZERO_WIDTH_SPACE + found[0][1:], str(message.text)
        )


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    if message.type not in _ROLES:
        raise ModelError(f"a local model does not take messages of type {message.type!r}", code="refused")
    return _ROLES[message.type]
