"""Open a ZIP archive within limits: docx, pptx, xlsx and EPUB are ZIP archives.

The sizes that the index declares are what counts: `zipfile` never gives more bytes of a member than it
declares, so a member that lies about its size is cut there and fails its checksum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

from agentctx.memory.errors import InputError

MAX_MEMBERS = 10_000
MAX_UNPACKED_BYTES = 512_000_000
MAX_RATIO = 100
RATIO_FREE_BYTES = 10_000_000  # small files of repetitive XML pack better than 100:1 and harm nobody
ENCRYPTED_FLAG = 1
# what reading the members of a damaged archive raises, or parsing what they hold
FAULTS = (
    BadZipFile,
    zlib.error,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    SyntaxError,
    ValueError,
)


def open_archive(file: BinaryIO) -> ZipFile:
    """The archive. Raises InputError `corrupt`, `too_large`, or `encrypted`."""
    try:
        archive = ZipFile(file)
    except FAULTS as error:
        raise damaged(error) from error
    members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    packed = max(file.seek(0, 2), 1)
    file.seek(0)
    if len(members) > MAX_MEMBERS:
        raise _too_large(f"{len(members):,} members, the limit is {MAX_MEMBERS:,}")
    if unpacked > MAX_UNPACKED_BYTES:
        raise _too_large(f"{unpacked:,} bytes unpacked, the limit is {MAX_UNPACKED_BYTES:,}")
    if unpacked > RATIO_FREE_BYTES and unpacked / packed > MAX_RATIO:
        raise _too_large(f"unpacks to {unpacked / packed:.0f} times its size, the limit is {MAX_RATIO}")
    if any(member.flag_bits & ENCRYPTED_FLAG for member in members):
        raise InputError("encrypted archive", code="encrypted", hint="save a copy without the password")
    return archive


def damaged(error: BaseException) -> InputError:
    """The InputError `corrupt` for one of the faults."""
    message = f"damaged, {type(error).__name__}: {error}"[:200]
    return InputError(message, code="corrupt", hint="get an undamaged copy of the file")


@contextmanager
def faults_told() -> Iterator[None]:
    """Turn the faults of a damaged archive into InputError `corrupt`."""
    try:
        yield
    except FAULTS as error:
        raise damaged(error) from error


def _too_large(message: str) -> InputError:
    return InputError(message, code="too_large", hint="unpack it and name the parts that matter")
