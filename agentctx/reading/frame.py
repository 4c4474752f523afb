"""A text and a question in one turn of a chat, the text first: whatever is asked, it stands where it stood.

The text is data. It stands in the user's turn, never the system's, between delimiters that it cannot know
(`workflows.fence`), behind the rule that nothing in it is an order.
"""

from __future__ import annotations

from dataclasses import dataclass

from langchain_core.messages import HumanMessage

from agentctx.memory.errors import ModelError
from agentctx.models.template import ChatTemplate
from agentctx.reading.tokens import Tokens
from agentctx.workflows.roles import DATA_RULE

_PLACE = "agentctx-content-of-the-turn"


@dataclass(frozen=True, slots=True)
class Frame:
    """`before` the text, `between` it and the question, `after` the question up to where the model speaks."""

    before: str
    between: str
    after: str

    def question(self, tokens: Tokens, question: str) -> list[int]:
        """The ids of all that follows the text."""
        return tokens.data(self.between + question).ids + tokens.prompt(self.after)


def chat_frame(template: ChatTemplate, tag: str) -> Frame:
    """Around a text in which the digits `tag` do not occur."""
    opened, closed = turn(template)
    rule = DATA_RULE.format(tag=tag)
    return Frame(f"{opened}{rule}\n\n<text-{tag}>\n", f"\n</text-{tag}>\n\n", closed)


def own_frame(template: ChatTemplate | None, prefix: str) -> Frame:
    """Behind a beginning of the caller's, who opened the turn that a question closes."""
    return Frame(prefix, "\n\n", turn(template)[1] if template else "")


def turn(template: ChatTemplate) -> tuple[str, str]:
    """What a chat template puts before and after the content of a user's turn, to be answered."""
    opened, found, closed = template.render([HumanMessage(_PLACE)]).partition(_PLACE)
    if not found or _PLACE in closed:
        raise ModelError(
            "the model's chat template does not show a user's words once and as they are",
            code="unsupported",
            hint="give the beginning of the prompt as prefix=, and use generate",
        )
    return opened, closed
