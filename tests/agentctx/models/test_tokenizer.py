"""Our tokenizer and chat templates against those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agentctx.memory.errors import ModelError
from agentctx.models.jinja import compiled
from agentctx.models.template import ChatTemplate
from agentctx.models.tokenizer import Detokenizer, Tokenizer
from agentctx.paths import Paths

TEXTS = (
    "",
    " ",
    "The court ruled on 3 May 2021.",
    "naïve façade — 日本語 😀👍🏽\t\n\n  x \r\n",
    "def f(a):\n    return a  # ünïcode",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>x<|im_end|",
    "[INST] <s> a </s> [/INST]",
    "\x00\x7f\u200b\ud7ff\U0010ffff",
    "a" * 500,
)
TURNS = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": " be brief \n"}, {"role": "user", "content": "{{ 1 }} <b>&amp;"}],
    [
        {"role": role, "content": f"turn {role}"}
        for role in ("user", "assistant", "user", "assistant", "user")
    ],
)


def ours_and_theirs(folder: Path) -> tuple[Tokenizer, Any]:
    loader: Any = PreTrainedTokenizerFast
    return Tokenizer.load(folder), loader.from_pretrained(folder, local_files_only=True)


def assert_same(folder: Path) -> None:
    ours, theirs = ours_and_theirs(folder)
    assert ours.end == theirs.eos_token_id
    assert ours.controls == {str(one) for one in theirs.added_tokens_decoder.values() if one.special}
    assert ours.specials == theirs.special_tokens_map
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.encode(text, special=True) == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, special=True) == theirs.decode(ids)
        offsets = theirs(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        assert ours.backend.encode(text, add_special_tokens=False).offsets == [tuple(one) for one in offsets]
    assert ours.encode_all(TEXTS) == [ours.encode(text) for text in TEXTS]
    if theirs.chat_template:
        assert ours.chat_template == theirs.chat_template
        render = compiled(str(ours.chat_template), ours.specials)
        for turns in TURNS:
            assert render(turns) == theirs.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )


@pytest.mark.model
def test_the_embedded_tokenizer(embedded: Paths) -> None:
    folder = embedded.models / "smollm2" / "safetensors"
    assert_same(folder)
    ours, chosen = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)

    @settings(deadline=None, derandomize=True, max_examples=100)
    @given(st.text(max_size=200))
    def alike(text: str) -> None:
        ids = ours.encode(text)
        assert ids == chosen.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == chosen.decode(ids, skip_special_tokens=True)

    alike()


def words(special: tuple[str, ...] = ("<s>", "</s>", "<unk>")) -> Backend:
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "Ġth"]
    backend = Backend(models.BPE(vocab={one: at for at, one in enumerate(vocabulary)}, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


@pytest.fixture
def byte_folder(tmp_path: Path) -> Path:
    """tokenizer.json without any special token, which the config adds as older ones do."""
    words().save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False},
        "unk_token": "<unk>",
        "additional_special_tokens": ["[INST]", "[/INST]"],
        "added_tokens_decoder": {
            "300": {"content": "<extra>", "special": False, "lstrip": True},
            "299": {"content": "<other>", "special": True},
        },
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {
                "name": "default",
                "template": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
                "{% generation %}{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}{% continue %}"
                "{% endif %}[INST] {{ m['content'] | tojson }} [/INST]{% endfor %}",
            },
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_ends(backend: Backend) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )


def lowered(backend: Backend) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def cutting(backend: Backend) -> None:
    backend.add_special_tokens(["<s>", "[INST]"])


@pytest.mark.parametrize("made", [with_ends, lowered, cutting])
@pytest.mark.parametrize(
    "fields",
    [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}, {"chat_template": None}],
)
def test_what_the_files_say_is_honoured(
    byte_folder: Path, made: Callable[[Backend], None], fields: dict[str, Any]
) -> None:
    backend = words()
    made(backend)
    backend.save(str(byte_folder / "tokenizer.json"))
    change(byte_folder, **fields)
    ours, theirs = ours_and_theirs(byte_folder)
    if ours.chat_template:  # transformers keeps all templates and asks for the default one later
        theirs.chat_template = theirs.chat_template["default"]
        theirs.save_pretrained(byte_folder / "again")
        assert (byte_folder / "again" / "chat_template.jinja").is_file()
        assert_same(byte_folder / "again")
        assert Tokenizer.load(byte_folder).chat_template == theirs.chat_template
        change(byte_folder, chat_template=theirs.chat_template)
    assert_same(byte_folder)


def test_specials_of_a_file_of_their_own(byte_folder: Path) -> None:
    (byte_folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    (byte_folder / "tokenizer_config.json").write_text("{}")
    assert_same(byte_folder)


def test_a_cutting_and_padding_tokenizer_is_cured(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode("abcd") == Tokenizer.load(tiny_model).encode("abcd")
    assert Tokenizer.load(tiny_model).opening == []


def test_a_folder_without_tokenizer_json_is_left_to_transformers(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "##b"]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    found = Tokenizer.load(tmp_path)
    assert found.encode("ab") == [5, 6] and found.opening == [1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}'])
def test_a_damaged_file_is_an_error(byte_folder: Path, content: str) -> None:
    (byte_folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(byte_folder)


def spelt(tokenizer: Tokenizer, ids: list[int]) -> str:
    return "".join(map(Detokenizer(tokenizer).step, ids))


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=40))
@example("é e\u0301 日本 😀a 😀😀")
def test_text_comes_whole_token_by_token(fallback_model: Path, tiny_model: Path, text: str) -> None:
    for folder in (fallback_model, tiny_model):
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode(text)
        pieces = list(map(Detokenizer(tokenizer).step, ids))
        whole = tokenizer.decode(ids)
        assert whole.startswith("".join(pieces)) and "".join(pieces).rstrip("\ufffd") == whole.rstrip(
            "\ufffd"
        )


@settings(deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(3, 258), st.sampled_from([93, 154, 248])), max_size=60))
@example([93, 154, 248])
def test_bytes_that_are_no_characters_end_nothing(fallback_model: Path, ids: list[int]) -> None:
    """Each letter comes in its turn, whatever bytes stand between."""
    text = spelt(Tokenizer.load(fallback_model), [*ids, 248])
    assert text.endswith("a")
    left = iter(text)
    assert all(chr(ord("a") + token - 248) in left for token in ids if token >= 248)


def test_a_character_that_was_passed_on_stays_where_a_wrong_byte_follows(fallback_model: Path) -> None:
    tokenizer = Tokenizer.load(fallback_model)
    ids = [tokenizer.backend.token_to_id(token) for token in ("▁a", "<0x5A>", "<0x97>", "▁b", "▁c")]
    assert spelt(tokenizer, ids) == "aZ\ufffd b c"


# A template of the kind that large families use: macros, namespaces, dates, dictionaries, loop controls.
RICH = """
{%- set ns = namespace(first=true, found='') -%}
{%- macro said(m) -%}{{ m.content.split('</think>')[-1].strip() }}{%- endmacro -%}
{%- set names = dict(user='U', assistant='A') -%}
  {% for m in messages %}
    {%- if m.role not in names and not loop.first %}{{ raise_exception('no ' + m.role) }}{% endif -%}
    {%- if ns.first %}{% set ns.first = false %}{{ strftime_now('%Y') | length }}|{% endif -%}
{{ names.get(m.role, '?') }}:{{ said(m) }} {{ m | tojson(indent=2) }}
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if tools is none and tools is defined and not documents %}-{% endif %}
{% if add_generation_prompt %}A:{% endif %}
"""


@pytest.mark.parametrize("source", [RICH, "{{ messages[0].nothing.more }}", "{{ missing }}x{{ unk_token }}"])
def test_templates_are_rendered_alike(byte_folder: Path, source: str) -> None:
    (byte_folder / "chat_template.jinja").write_text(source)
    ours, theirs = ours_and_theirs(byte_folder)
    for turns in (*TURNS, [*TURNS[0], {"role": "tool", "content": ""}]):
        said = []
        for render in (
            lambda turns: compiled(str(ours.chat_template), ours.specials)(turns),
            lambda turns: theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
        ):
            try:
                said.append(render(turns))
            except TemplateError as error:
                said.append(f"refused: {error}")
        assert said[0] == said[1]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__init__.__globals__ }}{{ dict.mro() }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_template_reaches_nothing_beyond_its_turns(source: str) -> None:
    with pytest.raises(TemplateError):
        compiled(source, {})([{"role": "user", "content": "x"}])


def test_a_template_that_cannot_be_compiled_is_an_error() -> None:
    with pytest.raises(ModelError, match="template"):
        ChatTemplate(Tokenizer(words(), {}, "{% for %}"))
