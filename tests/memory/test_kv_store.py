"""Blocks on disk: what comes back is what was put, whatever happens to the files, within a budget."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from agentctx.memory.errors import ConfigError, StoreError
from agentctx.memory.kv import store as module
from agentctx.memory.kv.chain import blocks
from agentctx.memory.kv.shelf import Shelf
from agentctx.memory.kv.store import BlockStore

ROOT = Path(__file__).parents[2]
PLENTY = 1 << 30


def store(root: Path, *, budget: int = PLENTY, codec: str = "plain", model: str = "m") -> BlockStore:
    return BlockStore(root, model, budget=budget, codec=codec, name="tiny")


def drawn(tokens: int = 64, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, 1, tokens, 16, generator=chance).to(dtype)
    return k, v


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*/*.kv"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 63, 64])
def test_a_block_comes_back_bit_for_bit(root: Path, dtype: torch.dtype, tokens: int) -> None:
    k, v = drawn(tokens, dtype=dtype)
    store(root).put("ab1", k, v)
    found = store(root).get("ab1", dtype)
    assert found is not None and torch.equal(found[0], k) and torch.equal(found[1], v)
    assert store(root).get("ab2", dtype) is None
    assert "ab1" in store(root) and "ab2" not in store(root)


@pytest.mark.parametrize(("codec", "steps", "share"), [("int8", 127, 0.27), ("int4", 7, 0.15)])
def test_codes_are_within_half_a_step_and_their_own_codes_again(
    root: Path, codec: str, steps: int, share: float
) -> None:
    k, v = drawn()
    plain, coded = store(root / "a"), store(root / "b", codec=codec)
    for one in (plain, coded):
        one.put("ab1", k, v)
    found = coded.get("ab1", torch.float32)
    assert found is not None
    for given_, got in zip((k, v), found, strict=True):
        step = given_.abs().amax(2, keepdim=True) / steps
        assert bool(((given_ - got).abs() <= 0.51 * step * 1.01).all())
    coded.put("ab2", *found)
    again = coded.get("ab2", torch.float32)
    assert again is not None and torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])
    (size,), (whole,) = ([f.stat().st_size for f in files(r)][:1] for r in (root / "b", root / "a"))
    assert size < (share + 0.12) * whole  # scales and header, which weigh on so small a block
    coded.put("ab3", *drawn(5))
    short = coded.get("ab3", torch.float32)
    assert short is not None and torch.equal(short[0], drawn(5)[0])


def test_an_unknown_codec_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="codec 'zip'"):
        store(root, codec="zip")


def test_what_is_kept_is_private(root: Path) -> None:
    store(root).put("ab1", *drawn())
    assert files(root)[0].stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in root.rglob("*"))


def test_every_flipped_byte_is_found_out(root: Path) -> None:
    """Of the header every byte, of the tensors some; a flip that changes nothing may pass."""
    some = store(root)
    k, v = drawn(3)
    some.put("ab1", k, v)
    (path,) = files(root)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(head), *range(head, len(whole), 37), len(whole) - 1]:
        for flip in (0x01, 0x10, 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= flip
            path.write_bytes(damaged)
            try:
                found = some.get("ab1", torch.float32)
            except StoreError as error:
                assert error.code == "corrupt" and str(path) in error.message
                assert not path.exists()
            else:
                assert found is not None and torch.equal(found[0], k) and torch.equal(found[1], v)


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_file_cut_short_is_found_out(cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        some = store(Path(folder))
        some.put("ab1", *drawn(3))
        (path,) = files(Path(folder))
        path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
        with pytest.raises(StoreError) as caught:
            some.get("ab1", torch.float32)
        assert caught.value.code == "corrupt"
        some.put("ab1", *drawn(3))
        assert some.get("ab1", torch.float32) is not None


def test_another_version_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "VERSION", "2")
        store(root).put("ab1", *drawn())
    with pytest.raises(StoreError, match="version 2, this program reads 1") as caught:
        store(root).get("ab1", torch.float32)
    assert caught.value.code == "version" and "kv rm --all" in caught.value.hint
    assert files(root)  # not ours to delete


def test_a_foreign_safetensors_file_is_damage(root: Path) -> None:
    path = root / "m" / "ab" / "ab1.kv"
    path.parent.mkdir(parents=True)
    save_file({"k": torch.zeros(2)}, path)
    with pytest.raises(StoreError) as caught:
        store(root).get("ab1", torch.float32)
    assert caught.value.code == "corrupt"


def test_the_least_recently_used_leave_and_the_last_stays(root: Path) -> None:
    one = len_of_block(root / "probe")
    some = store(root / "kv", budget=10 * one)
    for number in range(10):
        some.put(f"ab{number}", *drawn(seed=number))
    some.used(["ab0", "ab1"])
    some.put("ab10", *drawn(seed=10))
    kept = {path.stem for path in files(root / "kv")}
    assert {"ab0", "ab1", "ab10"} <= kept and "ab2" not in kept
    assert some.shelf.used_bytes <= 10 * one


def test_pinned_files_stay_and_the_budget_holds(root: Path) -> None:
    one = len_of_block(root / "probe")
    some = store(root / "kv", budget=10 * one)
    for number in range(8):
        some.put(f"ab{number}", *drawn(seed=number))
    some.shelf.pin(some.files(["ab0", "ab1", "absent"]))
    for number in range(8, 30):
        some.put(f"ab{number}", *drawn(seed=number))
        assert some.shelf.used_bytes <= 10 * one
    assert some.shelf.pinned() == set(some.files(["ab0", "ab1"]))
    names = [path.stem for path in files(root / "kv")]
    assert {"ab0", "ab1"} <= set(names)
    with pytest.raises(StoreError, match="would be pinned") as caught:
        store(root / "kv", budget=3 * one).shelf.pin(some.files(["ab29"]))
    assert caught.value.code == "no_space"
    small = store(root / "kv", budget=2 * one)
    with pytest.raises(StoreError, match="are pinned") as caught:
        small.put("ab30", *drawn(seed=30))
    assert caught.value.code == "no_space"
    assert {path.stem for path in files(root / "kv")} == set(names)  # nothing left for what does not fit
    some.shelf.unpin(some.files(["ab0", "absent"]))
    small.put("ab30", *drawn(seed=30))
    assert {path.stem for path in files(root / "kv")} == {"ab1", "ab30"}
    assert some.shelf.delete(some.files(["ab1"])) == one


def test_the_end_of_a_text_leaves_before_its_beginning(root: Path) -> None:
    one = len_of_block(root / "probe")
    some = store(root / "kv", budget=6 * one)
    names = [block.name for block in blocks(range(64 * 6), "root")]
    for number, name in enumerate(names):
        some.put(name, *drawn(seed=number))
    some.used(names)
    some.put("ab1", *drawn(seed=9))
    assert [name in some for name in names] == sorted((name in some for name in names), reverse=True)
    assert names[0] in some


def test_a_block_larger_than_the_budget_is_refused(root: Path) -> None:
    with pytest.raises(StoreError, match="exceeds the budget of 100") as caught:
        store(root, budget=100).put("ab1", *drawn())
    assert caught.value.code == "no_space"
    assert not files(root)


class Budget(RuleBasedStateMachine):
    """Two handles on one folder, as two processes have, against a list of what must still be there."""

    @initialize(blocks_=st.integers(1, 6))
    def begin(self, blocks_: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.one = len_of_block(root / "probe")
        self.budget = blocks_ * self.one + 10
        self.root = root / "kv"
        self.stores = [store(self.root, budget=self.budget, model=model) for model in ("m", "m", "n")]
        self.last: tuple[BlockStore, str, int] | None = None

    @rule(which=st.integers(0, 2), number=st.integers(0, 20))
    def put(self, which: int, number: int) -> None:
        self.stores[which].put(f"ab{number}", *drawn(seed=number))
        self.last = (self.stores[which], f"ab{number}", number)

    @rule(which=st.integers(0, 2), number=st.integers(0, 20))
    def get(self, which: int, number: int) -> None:
        found = self.stores[which].get(f"ab{number}", torch.float32)
        assert found is None or torch.equal(found[0], drawn(seed=number)[0])

    @rule(which=st.integers(0, 2), numbers=st.lists(st.integers(0, 20)), document=st.sampled_from("xy"))
    def own(self, which: int, numbers: list[int], document: str) -> None:
        self.stores[which].own([f"ab{number}" for number in numbers], [document])
        self.last = None

    @rule(which=st.integers(0, 2), at=st.integers(200, 2000))
    def damage(self, which: int, at: int) -> None:
        some = self.stores[which]
        for path in sorted(some.folder.glob("*/*.kv"))[:1]:
            data = bytearray(path.read_bytes())
            data[at] ^= 255
            path.write_bytes(data)
            with pytest.raises(StoreError):
                some.get(path.stem, torch.float32)
            if self.last and self.last[1] == path.stem:
                self.last = None

    @rule(model=st.sampled_from(["m", "n", None]))
    def remove(self, model: str | None) -> None:
        before = self.stores[0].shelf.used_bytes
        freed = self.stores[0].shelf.remove(None if model is None else [model])
        assert self.stores[0].shelf.used_bytes == before - freed
        self.last = None

    @invariant()
    def the_budget_holds(self) -> None:
        assert self.stores[0].shelf.used_bytes <= self.budget

    @invariant()
    def what_was_put_last_is_there(self) -> None:
        if self.last:
            assert self.last[1] in self.last[0]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestBudget = Budget.TestCase
TestBudget.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)


def len_of_block(root: Path) -> int:
    store(root).put("ab1", *drawn())
    return files(root)[0].stat().st_size


def test_what_is_listed_is_what_is_there_and_can_be_deleted(root: Path) -> None:
    assert Shelf(root, budget=0).held() == []
    store(root, model="m1").put("ab1", *drawn())
    store(root, model="m2").put("ab1", *drawn(30))
    (root / "m2" / "about.json").write_text("{")
    held = Shelf(root, budget=0).held()
    assert [(one.model, one.name, one.tokens) for one in held] == [("m2", "m2", 0), ("m1", "tiny", 64)]
    assert sum(one.bytes for one in held) == Shelf(root, budget=0).used_bytes
    assert Shelf(root, budget=0).remove(["tiny"]) == held[1].bytes
    assert [one.model for one in Shelf(root, budget=0).held()] == ["m2"]
    assert Shelf(root, budget=0).remove() == held[0].bytes
    assert Shelf(root, budget=0).held() == []


@contextmanager
def small_files() -> Iterator[None]:
    """Writes beyond 2 kB of a file fail, as on a full disk: only meanwhile, for pytest may write to a file
    too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_write_that_fails_half_way_leaves_nothing(root: Path) -> None:
    some = store(root)
    with pytest.raises(StoreError, match=str(root)) as caught, small_files():
        some.put("ab1", *drawn())
    assert caught.value.code == "unwritable"
    assert not files(root) and not list(root.glob("*/*/.*"))


def test_a_full_disk_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    some = store(root)
    with pytest.raises(StoreError, match="No space left") as caught:
        some.put("ab1", *drawn())
    assert caught.value.code == "no_space" and "kv_bytes" in caught.value.hint
    monkeypatch.undo()
    assert not files(root) and not list(root.glob("*/*/.*"))
    some.put("ab1", *drawn())
    assert some.get("ab1", torch.float32) is not None


@pytest.mark.parametrize("damage", [bytes(32), b"", b"12\0\0", b"-5"])
def test_a_count_that_cannot_be_read_is_made_again(root: Path, damage: bytes) -> None:
    some = store(root)
    some.put("ab1", *drawn())
    lock = root / "lock"
    for name, one in (("ab2", some), ("ab3", store(root))):  # that has counted, that has not
        lock.write_bytes(damage)
        one.put(name, *drawn())
        assert int(lock.read_bytes()) == Shelf(root, budget=PLENTY).used_bytes > 0
    assert len(files(root)) == 3


def test_what_a_killed_process_left_is_swept(root: Path) -> None:
    store(root).put("ab1", *drawn())
    torn = root / "m" / "ab" / ".torn"
    torn.write_bytes(b"x" * 1000)
    store(root).put("ab2", *drawn())
    assert not torn.exists() and len(files(root)) == 2


def test_processes_that_write_at_once_keep_the_budget_and_every_block_right(root: Path) -> None:
    one = len_of_block(root.parent / "probe")
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        import torch
        from agentctx.memory.kv.store import BlockStore

        some = BlockStore(Path({str(root)!r}), "m", budget={8 * one})
        for number in range(40):
            k = torch.full((2, 1, 64, 16), float(number))
            some.put(f"ab{{number}}", k, -k)
            found = some.get(f"ab{{number - 3}}", torch.float32)
            assert found is None or bool((found[0] == number - 3).all())
            assert some.shelf.used_bytes <= {8 * one}
    """)
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert not list(root.glob("*/*/.*"))
    for path in files(root):
        with safe_open(path, "pt") as file:
            assert bool((file.get_tensor("k") == float(path.stem[2:])).all())
