"""LangChain's own suites for chat models, on `LocalChat`, with sockets disabled.

Skips are the abilities that are not declared: tools, structured output, media, and a model chosen per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytest_socket
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from agentctx.models.load import Model
from agentctx.models.local import LocalChat
from agentctx.models.weights import Weights


class _Abilities:
    has_tool_calling = False
    has_structured_output = False
    supports_model_override = False

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return LocalChat

    @pytest.fixture(autouse=True)
    def _no_sockets(self, _only_loopback: None) -> Iterator[None]:
        pytest_socket.disable_socket(allow_unix_socket=True)  # the event loop needs a pair of them
        yield
        pytest_socket.enable_socket()


class TestUnit(_Abilities, ChatModelUnitTests):
    allowed_skips = frozenset({"test_init_from_env", "test_serdes"})

    @pytest.fixture(autouse=True)
    def _weights(self, tiny_weights: Weights) -> None:
        self._tiny = tiny_weights

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"weights": self._tiny, "model_name": "tiny", "context": self._tiny.context}


@pytest.mark.model
class TestIntegration(_Abilities, ChatModelIntegrationTests):
    allowed_skips = frozenset(
        {
            "test_invoke_with_model_override",
            "test_ainvoke_with_model_override",
            "test_stream_with_model_override",
            "test_astream_with_model_override",
            "test_tool_calling",
            "test_tool_calling_async",
            "test_bind_runnables_as_tools",
            "test_tool_message_histories_string_content",
            "test_tool_message_histories_list_content",
            "test_tool_choice",
            "test_tool_calling_with_no_arguments",
            "test_tool_message_error_status",
            "test_structured_few_shot_examples",
            "test_structured_output",
            "test_structured_output_async",
            "test_structured_output_pydantic_2_v1",
            "test_structured_output_optional_param",
            "test_json_mode",
            "test_pdf_inputs",
            "test_audio_inputs",
            "test_image_inputs",
            "test_image_tool_message",
            "test_pdf_tool_message",
            "test_anthropic_inputs",
            "test_agent_loop",
            "test_stream_time",
            "test_unicode_tool_call_integration",
        }
    )

    @pytest.fixture(autouse=True)
    def _embedded(self, embedded_model: Model) -> None:
        self._chat = embedded_model.chat

    @property
    def chat_model_params(self) -> dict[str, Any]:
        assert isinstance(self._chat, LocalChat)
        return {"weights": self._chat.weights, "model_name": "smollm2", "context": 8192, "max_tokens": 64}
