"""Where the checkpoints of a run are kept: SQLite beside its trace, or a Postgres that the user named.

The address comes from the environment (the setting `checkpoints` puts it there), because it holds a password:
it is no argument and stands in no manifest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from agentctx.blocking import blocking
from agentctx.memory.errors import ConfigError, StoreError

VARIABLE = "AGENTCTX_CHECKPOINTS"


@contextlib.asynccontextmanager
async def open_saver(folder: Path | None) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """The saver of a run that is kept in `folder`; memory for one that leaves nothing behind (None).

    Raises ConfigError for an address that is none of Postgres', or without the extra; StoreError if the
    database cannot be reached.
    """
    # Strict: a checkpoint may hold plain JSON only, so loading one can build no object of a foreign class.
    serde = JsonPlusSerializer(allowed_msgpack_modules=None)
    address = os.environ.get(VARIABLE, "")
    if folder is None:
        yield InMemorySaver(serde=serde)
    elif address:
        async with _postgres(address, serde) as saver:
            yield saver
    else:
        async with AsyncSqliteSaver.from_conn_string(str(folder / "checkpoints.db")) as sqlite:
            sqlite.serde = serde
            yield sqlite


async def _forget(threads: Iterable[str]) -> None:
    """Delete what a database that the user named keeps of these threads; SQLite goes with its run's folder.

    Raises what `open_saver` raises.
    """
    if address := os.environ.get(VARIABLE, ""):
        async with _postgres(address, JsonPlusSerializer(allowed_msgpack_modules=None)) as saver:
            for thread in threads:
                await saver.adelete_thread(thread)


forget = blocking(_forget)


@contextlib.asynccontextmanager
async def _postgres(address: str, serde: JsonPlusSerializer) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    if urlsplit(address).scheme not in ("postgresql", "postgres"):
        raise ConfigError(
            "the setting checkpoints is no address of a Postgres database",
            hint="postgresql://USER@HOST/DATABASE, or leave it unset for SQLite",
        )
    try:
        import psycopg
        from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
    except ImportError as error:
        raise ConfigError(
            "checkpoints in Postgres need the extra postgres", hint="pip install 'agentctx[postgres]'"
        ) from error
    async with contextlib.AsyncExitStack() as stack:
        try:
            connection = AsyncPostgresSaver.from_conn_string(address, serde=serde)
            saver = await stack.enter_async_context(connection)
            await saver.setup()
        except psycopg.Error as error:
            raise StoreError(
                f"the database of the checkpoints on {urlsplit(address).hostname or 'this machine'} "
                f"cannot be used ({type(error).__name__})",
                code="unavailable",
                hint=f"check {VARIABLE}, or leave it unset for SQLite",
            ) from None  # the cause may print the password
        yield saver
