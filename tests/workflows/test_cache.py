from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    cache._db.execute("PRAGMA user_version = 99")
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


def test_what_may_wait_is_there_at_once_and_written_with_the_next(tmp_path):
    path = tmp_path / "calls.db"
    cache, beside = LeafCache(path), LeafCache(path)
    cache.put_soon("reply", 1)
    assert (cache.get("reply"), cache.get_many(["reply"]), beside.get("reply")) == (1, {"reply": 1}, None)
    cache.put("record", 2)
    assert beside.get_many(["reply", "record"]) == {"reply": 1, "record": 2}
    cache.put_soon("last", 3)
    cache.close()
    assert beside.get("last") == 3
    beside.close()


def test_threads_share_it(tmp_path):
    cache = LeafCache(tmp_path / "calls.db")

    def work(number):
        for n in range(50):
            cache.put_soon(f"soon {number} {n}", n)
            cache.put(f"{number} {n}", n)
            assert cache.get_many([f"{number} {n}", f"soon {number} {n}"]).keys() >= {f"{number} {n}"}

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    keys = [f"{kind}{number} {n}" for kind in ("", "soon ") for number in range(4) for n in range(50)]
    assert len(cache.get_many(keys)) == len(keys)
    cache.close()
