"""Tests of `impl="triton"` in this folder run on a GPU: their tensors are carried there and back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import carried
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _carried(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("impl") == "triton" and not INTERPRETED


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    for item in items:
        if _carried(item):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(absent)


@pytest.fixture(autouse=True)
def _on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if not _carried(request.node):
        yield
        return
    with carried.elsewhere(lambda x: x.to("cuda")):
        yield
