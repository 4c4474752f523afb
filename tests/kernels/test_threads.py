"""How many threads a call is worth, and what a call must leave to others."""

import threading
import time

import drawn
import pytest
import torch

from agentctx.kernels import choose, threads
from agentctx.kernels.cpu import build
from agentctx.kernels.decode import dense_decode


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpp():
    if why := choose.unavailable("dense_decode", "cpp"):
        pytest.skip(why)


def test_small_work_stays_on_its_thread(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "region_overhead_us", lambda n: pytest.fail("nothing to measure for it"))
    assert threads.worth(0, 0) == threads.worth(200_000, 1e6) == 1


def test_one_thread_is_one_thread(two_threads):
    torch.set_num_threads(1)
    assert threads.worth(1e12, 1e15) == 1


@pytest.mark.parametrize(("overhead", "wanted"), [(5.0, 2), (10_000.0, 1), (float("inf"), 1)])
def test_more_work_than_a_region_costs(two_threads, monkeypatch, overhead, wanted):
    monkeypatch.setattr(threads, "region_overhead_us", lambda n: overhead)
    assert threads.worth(8e7, 0) == threads.worth(0, 5e8) == wanted  # 10 ms, of which two threads save 5


def test_a_region_is_measured_once(two_threads):
    if build.reason(build.best()):
        pytest.skip("no library")
    threads.region_overhead_us.cache_clear()
    first = threads.region_overhead_us(2)
    assert 0 < first < float("inf") and threads.region_overhead_us(2) == first
    assert torch.get_num_threads() == 2


def test_without_a_library_a_region_is_never_worth_it(two_threads, monkeypatch):
    threads.region_overhead_us.cache_clear()
    monkeypatch.setattr(build, "reason", lambda level: "no C++ compiler")
    assert threads.worth(1e12, 1e15) == 1
    threads.region_overhead_us.cache_clear()


def long_case():
    """A decode of several hundred megabytes."""
    kv = drawn.KVPages.empty(1024, 2, 64, dtype=torch.float32)
    kv.k.normal_(generator=torch.Generator().manual_seed(1))
    kv.v.normal_(generator=torch.Generator().manual_seed(2))
    q = torch.randn(1, 8, 1, 64, generator=torch.Generator().manual_seed(3))
    table = torch.arange(1024, dtype=torch.int32).repeat(4)[None]
    return q, kv, table, torch.tensor([4096 * 64], dtype=torch.int32)


def test_python_goes_on_while_a_kernel_runs(cpp):
    """Somewhere in the middle half of one call another Python thread must have had its turn."""
    case, ticks, stop = long_case(), [], threading.Event()
    dense_decode(*case, impl="cpp")

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    other.start()
    spans = []
    for _ in range(5):
        began = time.perf_counter()
        dense_decode(*case, impl="cpp")
        spans.append((began, time.perf_counter()))
    stop.set()
    other.join()
    middles = [(b + (e - b) / 4, e - (e - b) / 4) for b, e in spans]
    assert any(low < at < high for at in ticks for low, high in middles)


def test_several_python_threads_at_once(cpp):
    case = long_case()
    want = dense_decode(*case, impl="cpp")
    got = [None] * 4

    def call(i):
        got[i] = dense_decode(*case, impl="cpp")

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not any(caller.is_alive() for caller in callers)
    assert all(torch.equal(each.out, want.out) and torch.equal(each.lse, want.lse) for each in got)


def test_results_do_not_depend_on_threads(cpp, two_threads, monkeypatch):
    case = long_case()
    monkeypatch.setattr(threads, "worth", lambda *work: 2)
    two = dense_decode(*case, impl="cpp")
    monkeypatch.setattr(threads, "worth", lambda *work: 1)
    one = dense_decode(*case, impl="cpp")
    assert torch.equal(one.out, two.out) and torch.equal(one.lse, two.lse)
