"""What must not be known to others: the user's own secret, and the login that a URL may hold.

Nobody who writes documents can know the secret. The delimiters around documents are derived from it. It is
kept, because what was read between delimiters can be used again only between the same ones.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from urllib.parse import urlsplit

from agentctx.memory.atomic import write_bytes
from agentctx.memory.errors import StoreError

SIZE = 32  # bytes


def kept_secret(path: Path) -> bytes:
    """The secret in this file, made when it is first needed. Raises StoreError if it cannot be kept."""
    try:
        if not path.is_file() or path.stat().st_size != SIZE:
            write_bytes(path, secrets.token_bytes(SIZE))
        return path.read_bytes()
    except OSError as error:
        hint = "free some space, point AGENTCTX_HOME to a folder that can be written, or pass --ephemeral"
        raise StoreError(f"cannot keep {path}: {error.strerror or error}", code="write", hint=hint) from error


def without_login(url: str) -> str:
    """The URL as it may be kept and shown: without a user's name and password. ValueError if it is none."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
