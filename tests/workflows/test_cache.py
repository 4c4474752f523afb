import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.memory.errors import StoreError
from agentctx.workflows.cache import LeafCache, call_key

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), lambda v: st.lists(v), max_leaves=5
)


@given(values)
def test_what_was_put_is_got(value):
    cache = LeafCache(None)
    cache.put("k", value)
    assert cache.get("k") == value
    cache.close()


def test_it_survives_the_process(tmp_path):
    path = tmp_path / "cache" / "calls.db"
    cache = LeafCache(path)
    cache.put_many({str(n): n for n in range(1200)})
    cache.close()
    again = LeafCache(path)
    assert again.get_many([str(n) for n in range(1300)]) == {str(n): n for n in range(1200)}
    assert again.get("1201") is None
    assert path.stat().st_mode & 0o777 == 0o600
    again.close()


@pytest.mark.parametrize("damage", [b"", b"not a database at all" * 100])
def test_a_damaged_cache_is_put_aside_and_rebuilt(tmp_path, damage):
    path = tmp_path / "calls.db"
    path.write_bytes(damage)
    cache = LeafCache(path)
    cache.put("k", 1)
    assert cache.get("k") == 1
    assert bool(cache.warning) == bool(damage)
    assert len(list(tmp_path.glob("*.corrupt-*"))) == bool(damage)
    cache.close()


def test_a_cache_of_another_version_is_dropped(tmp_path):
    cache = LeafCache(tmp_path / "calls.db")
    cache.put("k", 1)
    with cache._db.write() as db:
        db.execute("PRAGMA user_version = 99")
    cache.close()
    again = LeafCache(tmp_path / "calls.db")
    assert again.get("k") is None
    again.close()


def test_two_processes_share_it(tmp_path):
    one, two = LeafCache(tmp_path / "calls.db"), LeafCache(tmp_path / "calls.db")
    one.put("k", 1)
    two.put("l", 2)
    assert (one.get("l"), two.get("k")) == (2, 1)
    one.close()
    two.close()


def test_any_part_of_a_call_changes_its_key():
    base = {"model": "m", "role": ["read", 1], "question": "q", "pieces": [["a", "b"]]}
    keys = {call_key(**base), *(call_key(**{**base, name: "other"}) for name in base)}
    assert len(keys) == 5
    assert call_key(**base) == call_key(**dict(reversed(base.items())))


def test_threads_share_it(tmp_path):
    cache = LeafCache(tmp_path / "calls.db")

    def work(number):
        for n in range(50):
            cache.put(f"{number} {n}", n)
            assert cache.get(f"{number} {n}") == n

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    keys = [f"{number} {n}" for number in range(4) for n in range(50)]
    assert len(cache.get_many(keys)) == len(keys)
    cache.close()


def test_a_lone_surrogate_is_kept(tmp_path):
    cache = LeafCache(tmp_path / "calls.db")
    cache.put("k", {"quote": "half a \ud83d sign"})
    cache.close()
    again = LeafCache(tmp_path / "calls.db")
    assert again.get("k") == {"quote": "half a \ud83d sign"}
    again.close()


def test_the_older_half_goes_when_it_is_too_large_and_nobody_else_has_it(tmp_path):
    path = tmp_path / "calls.db"
    cache = LeafCache(path)
    cache.put_many({str(n): "x" * 1000 for n in range(200)})
    cache.put("0", "again, so it is the newest")
    beside = LeafCache(path, limit=50_000)
    assert len(beside.get_many([str(n) for n in range(200)])) == 200
    beside.close()
    cache.close()
    alone = LeafCache(path, limit=50_000)
    assert alone.get_many([str(n) for n in range(200)]).keys() == {"0", *map(str, range(101, 200))}
    alone.close()


def test_a_full_disk_is_an_error_of_ours(tmp_path):
    cache = LeafCache(tmp_path / "calls.db")
    cache._db.rows("PRAGMA max_page_count = 4")
    with pytest.raises(StoreError) as caught:
        cache.put("k", "x" * 100_000)
    assert caught.value.code == "no_space"
    cache.put("small", 1)
    assert cache.get_many(["k", "small"]) == {"small": 1}
    cache.close()


def test_damage_that_is_met_later_is_an_error_of_ours(tmp_path):
    path = tmp_path / "calls.db"
    cache = LeafCache(path)
    cache.put_many({str(n): "x" * 1000 for n in range(200)})
    cache.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    cache = LeafCache(path)
    with pytest.raises(StoreError) as caught:
        cache.get_many([str(n) for n in range(200)])
    assert caught.value.code == "corrupt"
    cache.close()


def _opens(paths, barrier, me):
    for path in paths:
        barrier.wait(60)
        cache = LeafCache(path)
        for n in range(10):
            cache.put(f"{me} {n}", n)
            assert cache.get(f"{me} {n}") == n
        cache.close()


def test_processes_that_open_it_first_together_all_write_to_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    paths, barrier = [tmp_path / str(n) / "calls.db" for n in range(10)], context.Barrier(4)
    processes = [context.Process(target=_opens, args=(paths, barrier, me)) for me in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    for path in paths:
        cache = LeafCache(path)
        keys = [f"{me} {n}" for me in range(4) for n in range(10)]
        assert len(cache.get_many(keys)) == len(keys)
        cache.close()
