"""The dispatcher, with a C++ implementation of `pack_pages` made up for the test."""

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from agentctx.kernels import choose
from agentctx.kernels.cpu import build
from agentctx.kernels.errors import KernelUnavailable, Uncovered
from agentctx.kernels.records import KVPages
from agentctx.kernels.store import pack_pages

CACHES = (choose.unavailable, choose.function, choose._say_once)


@pytest.fixture
def cpp(monkeypatch):
    """The made-up module; the library that it would be bound to is its level's name."""
    for cache in CACHES:
        cache.cache_clear()
    monkeypatch.setattr(build, "reason", lambda level: None)
    monkeypatch.setattr(build, "load", lambda level: level)
    name = "agentctx.kernels.cpu.store"
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    yield module
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def kv():
    return KVPages(torch.randn(2, 1, 64, 32), torch.randn(2, 1, 64, 32), 64, 32)


def test_the_best_level_runs_unless_one_is_named(cpp, kv):
    cpp.pack_pages = lambda lib, pages: lib
    assert pack_pages(kv) == pack_pages(kv, impl="cpp") == build.best()
    assert pack_pages(kv, impl="cpp:avx2") == "avx2"
    assert pack_pages(kv, impl="torch").format == "packed"


@pytest.mark.parametrize("impl", ["gpu", "torch:avx2", "cpp2", "cpu"])
def test_an_unknown_implementation(kv, impl):
    with pytest.raises(
        ValueError, match=f"impl is '{impl}': use one of reference, torch, cpp, triton, or cpp:"
    ):
        pack_pages(kv, impl=impl)


def test_what_is_forced_and_cannot_run_says_why(cpp, kv, monkeypatch):
    with pytest.raises(KernelUnavailable, match="^pack_pages: cpp cannot run: cpp does not implement it$"):
        pack_pages(kv, impl="cpp")
    choose.unavailable.cache_clear()
    cpp.pack_pages = lambda lib, pages: lib
    monkeypatch.setattr(build, "reason", lambda level: f"this processor has no {level}")
    with pytest.raises(KernelUnavailable, match="cpp:avx512 cannot run: this processor has no avx512"):
        pack_pages(kv, impl="cpp:avx512")


def test_what_is_not_covered_runs_in_torch_and_is_told_once(cpp, kv, caplog):
    calls = []

    def refuse(lib, pages):
        calls.append(lib)
        raise Uncovered("pages of 48 tokens")

    cpp.pack_pages = refuse
    with caplog.at_level(logging.INFO, logger="agentctx.kernels"):
        first, second = pack_pages(kv), pack_pages(kv)
    assert torch.equal(first.k, second.k) and len(calls) == 2
    assert [r.getMessage() for r in caplog.records] == [
        "pack_pages runs in torch, not in cpp: pages of 48 tokens"
    ]
    with pytest.raises(KernelUnavailable, match="pack_pages: cpp cannot run: pages of 48 tokens"):
        pack_pages(kv, impl="cpp")


def test_an_error_of_the_arguments_is_no_reason_to_try_torch(cpp, kv):
    def fail(lib, pages):
        raise IndexError("block_table[0, 1] is 9: the pool has 2 pages")

    cpp.pack_pages = fail
    with pytest.raises(IndexError, match="the pool has 2 pages"):
        pack_pages(kv)


def test_available_is_complete(cpp):
    cpp.pack_pages = lambda lib, pages: lib
    told = choose.available()
    assert set(told) == set(choose.OPERATIONS)
    assert all(set(row) == {"reference", "torch", "cpp", "triton"} for row in told.values())
    assert all(why is None or why for row in told.values() for why in row.values())
    assert told["pack_pages"]["torch"] is None and told["pack_pages"]["cpp"] is None
    assert told["unpack_pages"]["cpp"] == "cpp does not implement it"
    if not torch.cuda.is_available():
        assert all(
            row["triton"] in ("no NVIDIA GPU", "triton does not implement it") for row in told.values()
        )
