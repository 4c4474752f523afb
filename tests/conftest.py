"""What tests get: no network beyond this machine, the C++ kernels built once, a tiny model made on the spot,
and the embedded one.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_socket

from agentctx.paths import Paths

if TYPE_CHECKING:
    from agentctx.models.load import Model

TINY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _only_loopback() -> Iterator[None]:
    """Connections elsewhere raise; child processes (pip) are not covered."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)
    yield
    pytest_socket.enable_socket()


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The folder of the C++ kernels, loaded before a test gives itself another home: to build takes a minute.

    A child process with a home of its own gets a link to this folder as `cache/kernels` in it.
    """
    from agentctx.kernels.cpu import build

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a compiler torch serves, here as well
        build.reason(build.best())
    return build.cache_folder()


@pytest.fixture(scope="session")
def tiny_model(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights and a tokenizer of single bytes: fast nonsense."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(specials + letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    wrapper: Any = PreTrainedTokenizerFast
    tokenizer = wrapper(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", unk_token="<|endoftext|>"
    )
    tokenizer.chat_template = TINY_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(specials) + len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=2,
        bos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fallback_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a vocabulary that falls back to bytes, as those of SentencePiece do."""
    from tokenizers import Tokenizer, decoders, models

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("fallback") / "model")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(0xF5)), *(f"▁{one}" for one in "abcdefghijk")]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token=specials[0]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(specials)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def deep_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with four layers: methods are dense in the first two."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("deep") / "model")
    config: Any = LlamaConfig.from_pretrained(tiny_model)
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():  # attention that prefers some keys
        if "proj" in name:
            weight.data.mul_(8)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded(kernels: Path) -> Paths:
    """The folders of this user with the embedded model in them: 93 MB are downloaded the first time."""
    from agentctx.models.catalog import ensure
    from agentctx.models.table import SMOLLM2

    paths = Paths.default()
    ensure(SMOLLM2, paths)
    return paths


@pytest.fixture(scope="session")
def embedded_model(embedded: Paths) -> Model:
    """The embedded model, loaded once for all tests."""
    from agentctx.models.load import open_model

    return open_model("smollm2", paths=embedded)
