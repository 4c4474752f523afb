"""Settings from five places, and where each value came from.

A flag beats `AGENTCTX_*`, which beats the project's file (`./agentctx.toml`, else `[tool.agentctx]` in
`./pyproject.toml`), which beats the user's file, which beats the default. Unknown keys are errors: a setting
that is misspelt and ignored is worse than none.

A project's file may have come with hostile documents. So it cannot send text anywhere or loosen what the user
tightened: it may not set endpoints, keys, remote models or what is kept on disk, nor switch `offline` or
`ephemeral` off, nor raise a limit above the user's own.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.dtype import KVDtype
from agentctx.memory.types import Budget
from agentctx.models.table import TABLE, Linears
from agentctx.paths import KV_BYTES, Paths

PREFIX = "AGENTCTX_"
SECRETS = ("api_key", "checkpoints")
LOCAL = ("attention", "exact", "linears", "kv_dtype")  # without effect at an endpoint
LIMITS = ("max_calls", "max_input_tokens", "max_output_tokens", "max_seconds", "max_depth")
NOT_SETTINGS = {"AGENTCTX_HOME", "AGENTCTX_ROOTS"}  # read by `Paths`, before any setting; by `studio`

AtLeastOne = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """The values that hold for one command. Made by `load`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    model: str = Field("smollm2", min_length=1)
    base_url: str | None = None
    api_key: SecretStr | None = None
    checkpoints: SecretStr | None = None  # the address of a Postgres; None: SQLite beside each run
    strategy: str = "auto"
    window: Annotated[int, Field(ge=256)] | None = None  # tokens
    kv_bytes: Annotated[int, Field(ge=0)] = KV_BYTES  # of disk, for what local models have read; 0: nothing
    memory_bytes: AtLeastOne | None = None  # of memory, for a local model and what it reads
    concurrency: AtLeastOne | None = None  # calls in flight at an endpoint
    attention: str = "auto"
    exact: bool = False  # a sparse attention only drafts; answers are those of dense attention
    linears: Linears = "auto"
    embed: str = Field("auto", min_length=1)  # the embedding model
    kv_dtype: KVDtype = "auto"  # of what a local model has read, in memory
    max_calls: AtLeastOne | None = None
    max_input_tokens: AtLeastOne | None = None
    max_output_tokens: AtLeastOne | None = None
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    max_depth: Annotated[int, Field(ge=0)] | None = None
    offline: bool = False
    ephemeral: bool = False

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` merged: it reads the environment itself, to know the origins."""
        return (init_settings,)

    @classmethod
    def load(cls, flags: Mapping[str, Any], config: Path | None = None, cwd: Path | None = None) -> Settings:
        """Merge all layers. A flag that is None was not given; `config` takes the place of both files."""
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for layer in _layers(cls, flags, config, cwd or Path.cwd()):
            values |= layer.values
            origins |= {key: layer.origin_of(key) for key in layer.values}
        try:
            settings = cls(**values)
        except ValidationError as error:
            raise _explain(error, origins) from None
        settings._origins.update(origins)
        return settings

    def origin(self, name: str) -> str:
        """Where the value of a setting came from."""
        return self._origins.get(name, "default")

    def local(self) -> dict[str, Any]:
        """How a local model is opened. An endpoint is asked for what a flag says, and refuses it; what stands
        in a file or the environment is for the local models of other commands.
        """
        from agentctx.models.load import ENDPOINT

        remote = self.model.startswith(ENDPOINT)
        return {name: getattr(self, name) for name in LOCAL if not remote or self.origin(name)[:2] == "--"}

    def export_key(self) -> None:
        """Put secrets from a file where they are looked for, so that no argument carries them."""
        for name in SECRETS:
            if value := getattr(self, name):
                os.environ[PREFIX + name.upper()] = value.get_secret_value()

    def budget(self) -> Budget:
        """The limits as a run takes them."""
        return Budget(*(getattr(self, name) for name in LIMITS))


@dataclass(frozen=True)
class _Layer:
    values: dict[str, Any]
    name: str  # "flag", "environment", or a file

    def origin_of(self, key: str) -> str:
        if self.name == "flag":
            return "--" + key.replace("_", "-")
        return PREFIX + key.upper() if self.name == "environment" else self.name


def _layers(
    cls: type[Settings], flags: Mapping[str, Any], config: Path | None, cwd: Path
) -> Iterator[_Layer]:
    """From the weakest to the strongest."""
    if config:
        yield _private(_from_file(config, _read(config, must_exist=True)))
    else:
        path = Paths.default().config / "config.toml"
        user = _private(_from_file(path, _read(path)))
        yield user
        project, table = cwd / "agentctx.toml", _read(cwd / "agentctx.toml")
        if not project.exists():
            project = cwd / "pyproject.toml"
            table = _table(_table(_read(project), "tool", project), "agentctx", project)
        yield _harmless(cls, _from_file(project, table), user)
    for name in os.environ:
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            _known(name.removeprefix(PREFIX).lower(), f"the environment variable {name}")
    yield _Layer(EnvSettingsSource(cls)(), "environment")
    yield _Layer({key: value for key, value in flags.items() if value is not None}, "flag")


def _read(path: Path, *, must_exist: bool = False) -> dict[str, Any]:
    if not path.exists() and not must_exist:
        return {}
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="name a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", hint="correct or remove it") from error


def _table(outer: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = outer.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name} is {table!r}, not a table", hint="write [tool.agentctx]")
    return table


def _from_file(path: Path, table: dict[str, Any]) -> _Layer:
    for key in table:
        _known(key, str(path))
    return _Layer(table, str(path))


def _known(key: str, where: str) -> None:
    if key not in Settings.model_fields:
        near = difflib.get_close_matches(key, Settings.model_fields, n=1)
        raise ConfigError(
            f"{where} sets {key!r}, which is no setting",
            hint=f"did you mean {near[0]!r}?" if near else "`agentctx config show` lists all settings",
        )


def _private(layer: _Layer) -> _Layer:
    """A user's file may hold a secret, if nobody else can read it."""
    secret = next((name for name in SECRETS if name in layer.values), None)
    if secret and Path(layer.name).stat().st_mode & 0o077:
        raise ConfigError(
            f"{layer.name} holds {secret} and can be read by other users", hint=f"chmod 600 {layer.name}"
        )
    return layer


def _harmless(cls: type[Settings], layer: _Layer, user: _Layer) -> _Layer:
    """A project's file may neither send text away nor loosen what the user tightened."""
    refused = {"base_url", "kv_bytes", *SECRETS} & layer.values.keys()
    model = str(layer.values.get("model", "smollm2"))
    folder = Path(layer.name).parent / model
    if model not in TABLE and (model.startswith(("openai:", "~")) or not folder.is_dir()):
        refused.add("model")
    if not refused:  # compared as what pydantic makes of them: "no" and 0 are False, "9" is 9
        here, own = (_taken(cls, one, ("offline", "ephemeral", *LIMITS)) for one in (layer, user))
        refused |= {key for key in here if key not in LIMITS and not here[key]}
        refused |= {key for key in here if key in LIMITS and here[key] > own.get(key, math.inf)}
    if refused:
        key = min(refused)
        said = "" if key in SECRETS else f" to {layer.values[key]!r}"
        raise ConfigError(
            f"{layer.name} sets {key}{said}, which a project's file may not",
            hint=f"remove it; if you trust it, set {PREFIX}{key.upper()} or your own config.toml",
        )
    return layer


def _taken(cls: type[Settings], layer: _Layer, keys: Iterable[str]) -> dict[str, Any]:
    """What a layer says of `keys`, as settings hold it."""
    given = {key: layer.values[key] for key in keys if key in layer.values}
    try:
        settings = cls(**given)
    except ValidationError as error:
        raise _explain(error, dict.fromkeys(given, layer.name)) from None
    return {key: getattr(settings, key) for key in given}


def _explain(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    first = error.errors(include_url=False, include_context=False)[0]
    key = str(first["loc"][0])
    said = "" if key in SECRETS else f" is {first['input']!r}"
    return ConfigError(f"{key}{said} ({origins.get(key, 'default')}): {first['msg']}", hint=f"correct {key}")
