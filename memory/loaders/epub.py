"""EPUB: the chapters in reading order (the spine), each read as HTML.

A chapter goes by its first heading, or by its place in the book if it has none.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import unquote
from xml.etree.ElementTree import Element
from zipfile import ZipFile

from defusedxml.ElementTree import fromstring

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.archive import FAULTS, faults_told, open_archive
from agentctx.memory.loaders.decode import decode
from agentctx.memory.loaders.html import extract
from agentctx.memory.loaders.parts import Part
from agentctx.memory.types import Notice

CONTAINER = "META-INF/container.xml"
ENCRYPTION = "META-INF/encryption.xml"


def read(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """One part per chapter that has text. Raises InputError `corrupt`, `encrypted`, or `empty`."""
    book = open_archive(file)
    with faults_told():
        names = _spine(book)
        locked = _locked(book)
    if locked.intersection(names):
        raise InputError("the chapters are encrypted (DRM)", code="encrypted")
    count = 0
    for place, name in enumerate(names, 1):
        try:
            decoded = decode(book.read(name), encoding)
        except (*FAULTS, InputError) as error:
            yield Part("", (), (Notice("corrupt", f"chapter {place} ({name}) cannot be read: {error}"),))
            continue
        page = extract(decoded.text)
        if page.text.strip():
            count += 1
            title = str(page.locators[0].value) if page.locators else str(place)
            part = Part.whole(page.text, "chapter", title, page.locators)
            yield Part(part.text, part.locators, decoded.notices)
    if not count:
        raise InputError("no chapter has text", code="empty")


def _spine(book: ZipFile) -> list[str]:
    """Archive names of the chapters, in order, each once: a small book could name one a million times."""
    package_name = unquote(_first(_xml(book, CONTAINER), "rootfile").get("full-path", ""))
    package = _xml(book, package_name)
    folder = posixpath.dirname(package_name)
    targets = {
        item.get("id"): posixpath.normpath(posixpath.join(folder, unquote(item.get("href", ""))))
        for item in package.iterfind(".//{*}item")
    }
    named = (at.get("idref") for at in package.iterfind(".//{*}itemref"))
    return list(dict.fromkeys(targets[name] for name in named if name in targets))


def _locked(book: ZipFile) -> set[str]:
    """What the file says is encrypted; often only its fonts are."""
    if ENCRYPTION not in book.namelist():
        return set()
    return {unquote(at.get("URI", "")) for at in _xml(book, ENCRYPTION).iterfind(".//{*}CipherReference")}


def _xml(book: ZipFile, name: str) -> Element:
    root: Element = fromstring(book.read(name))
    return root


def _first(root: Element, tag: str) -> Element:
    found = root.find(f".//{{*}}{tag}")
    if found is None:
        raise KeyError(f"no {tag} in {CONTAINER}")
    return found
