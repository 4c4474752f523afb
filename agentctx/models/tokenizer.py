"""The tokenizer of a local model, from its folder: what `tokenizers` makes of tokenizer.json, with the
special tokens and the chat template that stand beside it.

transformers' own classes give the same ids (tests/agentctx/models/test_tokenizer.py), and take a third of the
time in which a command line tool should have started. They serve a folder that has no tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"


class Tokenizer:
    """Text to ids and back. `backend` has the offsets; `specials` are tokens by name, such as `eos_token`."""

    def __init__(self, backend: Backend, specials: Mapping[str, str], chat_template: str | None) -> None:
        backend.no_truncation()  # some tokenizer.json cut texts in silence
        backend.no_padding()
        self.backend = backend
        self.specials = dict(specials)
        self.chat_template = chat_template

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a model's folder. Raises OSError or ValueError for what is missing or cannot be read."""
        if not (folder / "tokenizer.json").is_file():
            from transformers import AutoTokenizer

            loader: Any = AutoTokenizer
            return cls.of(loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except BaseException as error:
            if type(error) is not Exception:  # that very class is what the library raises
                raise
            raise ValueError(f"tokenizer.json: {error}") from error
        config = json_object(folder / CONFIG)
        if "added_tokens_decoder" not in config:  # an older folder
            config |= json_object(folder / "special_tokens_map.json")
        specials = {name: text for name, value in config.items() if (text := _special(name, value))}
        _add_tokens(backend, config, specials)
        return cls(backend, specials, _chat_template(folder, config))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
        """What a tokenizer of transformers is made of. ValueError for one that has no fast backend."""
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer has no tokenizer.json")
        fast: Any = tokenizer
        return cls(fast.backend_tokenizer, fast.special_tokens_map, fast.chat_template)

    @property
    def end(self) -> int | None:
        """The token that ends a sequence."""
        name = self.specials.get("eos_token")
        return None if name is None else self.backend.token_to_id(name)

    @property
    def opening(self) -> list[int]:
        """What a sequence opens with."""
        whole, bare = self.encode("x", special=True), self.encode("x")
        return whole[: whole.index(bare[0])]

    @property
    def controls(self) -> frozenset[str]:
        """The texts of all special tokens."""
        return frozenset(
            token.content for token in self.backend.get_added_tokens_decoder().values() if token.special
        )

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text; with `special`, with what opens and ends a sequence."""
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [
            list(one.ids) for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids; with `special`, with that of special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)


class Detokenizer:
    """Text from tokens as they come, in whole characters.

    `DecodeStream` of tokenizers does the same, and gives up at a byte that belongs to no character: where a
    vocabulary falls back to bytes a run of them is decoded at once, so that a wrong one turns those before
    it, which were passed on already, into replacement characters as well.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        """With `special`, special tokens have a text."""
        self._decode = partial(tokenizer.decode, special=special)
        self._before: list[int] = []  # passed on; the next token is written as after these
        self._said = ""  # they alone
        self._new: list[int] = []

    def step(self, token: int) -> str:
        """What can be passed on now; nothing while a character is not whole."""
        self._new.append(token)
        text = self._decode(self._before + self._new)
        added = text[len(self._said) :] if text.startswith(self._said) else self._decode(self._new)
        if not added or added.endswith("\ufffd"):
            return ""
        self._before, self._new = self._new, []
        self._said = self._decode(self._before)
        return added


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file. ValueError names the file."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _special(name: str, value: object) -> str | None:
    """The text of a special token, which older files describe by an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if name.endswith("_token") and isinstance(text, str) else None


def _add_tokens(backend: Backend, config: Mapping[str, Any], specials: Mapping[str, str]) -> None:
    """Know the tokens of the config that tokenizer.json lacks."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            backend.add_tokens(
                [AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})]
            )
            known.add(token["content"])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    more = extra.values() if isinstance(extra, dict) else extra
    texts = [token["content"] if isinstance(token, dict) else token for token in more]
    backend.add_special_tokens([text for text in (*specials.values(), *texts) if text not in known])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own comes before the config, which may list several by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found if isinstance(found, str) else None
