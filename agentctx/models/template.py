"""From LangChain messages to the token ids of a finished prompt.

Documents are data: a text that contains the model's own control tokens (`<|im_end|>`) must not end its
message. A zero-width space breaks such a token in message contents; the citation check ignores it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage

from agentctx.memory.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}
_ZERO_WIDTH_SPACE = "\u200b"


class ChatTemplate:
    """A tokenizer with its chat template; safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the model has no chat template",
                hint="choose an instruction-tuned model; a base model cannot chat",
            )
        fast: Any = tokenizer
        self.tokenizer = tokenizer
        self.backend = fast.backend_tokenizer
        controls = {str(token) for token in fast.added_tokens_decoder.values() if token.special}
        self._control = re.compile(
            "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or r"(?!)"
        )

    def encode(self, messages: Sequence[BaseMessage], *, prefill: str = "") -> list[int]:
        """The ids of the prompt up to where the model speaks, `prefill` being what it has already said."""
        ids: list[int] = self.backend.encode(self.render(messages) + prefill, add_special_tokens=False).ids
        return ids

    def encode_text(self, text: str) -> list[int]:
        """The ids of a bare text."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def render(self, messages: Sequence[BaseMessage]) -> str:
        """The prompt as text; ModelError `refused` if the template does not take such a conversation."""
        from jinja2.exceptions import TemplateError

        turns = [{"role": _role(message), "content": self._content(message)} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ModelError(
                f"the model's chat template refuses the messages: {error}", code="refused"
            ) from error
        return str(text)

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
