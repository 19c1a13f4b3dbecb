"What a store must survive: many writers, sudden death, and any order of any names."
import multiprocessing, os, signal, sqlite3, subprocess, sys, tempfile, threading, time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from semid.config import DataError, SemidError
from semid.semantic_ids.engine import SemanticIdEngine
from semid.semantic_ids.uniqueness import (
    CollisionStore, InMemoryCollisionStore, SQLiteCollisionStore, UniqueIdResolver)

# few letters, so that raw and suffixed IDs meet often
names = st.lists(st.text("a1-", min_size=1, max_size=4), max_size=40)
items = st.lists(st.sampled_from(["1", "2", "a", "a-1", "x", 'q"\\', "é😀"]), min_size=40, max_size=40)


class Plain(CollisionStore):
    def __init__(self): self.counts = Counter()
    def next_suffix(self, key):
        self.counts[key] += 1
        return self.counts[key] - 1


def stores(folder): return [InMemoryCollisionStore(), Plain(), SQLiteCollisionStore(Path(folder) / "c.db")]


def in_batches(resolver, keys, item_ids, cuts):
    ends = sorted({min(c, len(keys)) for c in cuts} | {0, len(keys)})
    return [unique for a, b in zip(ends, ends[1:])
            for unique in resolver.assign(keys[a:b], item_ids and item_ids[a:b])]


@settings(max_examples=60, deadline=None)
@given(keys=names, cuts=st.lists(st.integers(0, 40), max_size=4), sep=st.sampled_from(["-", "", "--1"]))
def test_no_two_ids_are_equal(keys, cuts, sep):
    with tempfile.TemporaryDirectory() as folder:
        for store in stores(folder):
            resolver = UniqueIdResolver(store)
            ids = in_batches(resolver, keys, None, cuts) + resolver.assign(keys, sep=sep)
            assert len(set(ids)) == len(ids)
            assert all(unique.startswith(key) for unique, key in zip(ids, keys + keys))


@settings(max_examples=60, deadline=None)
@given(keys=names, item_ids=items, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_an_item_has_one_id_and_an_id_one_item(keys, item_ids, cuts):
    item_ids = item_ids[:len(keys)]
    with tempfile.TemporaryDirectory() as folder:
        for store in stores(folder):
            ids = in_batches(UniqueIdResolver(store), keys, item_ids, cuts)
            pairs = set(zip(item_ids, ids))
            assert len(pairs) == len(set(item_ids)) == len(set(ids))


@settings(max_examples=60, deadline=None)
@given(keys=names, item_ids=st.none() | items, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_the_cut_into_batches_changes_nothing(keys, item_ids, cuts):
    item_ids = item_ids and item_ids[:len(keys)]
    with tempfile.TemporaryDirectory() as folder:
        whole = UniqueIdResolver().assign(keys, item_ids)
        assert in_batches(UniqueIdResolver(), keys, item_ids, cuts) == whole
        sqlite = UniqueIdResolver(SQLiteCollisionStore(f"{folder}/c.db"))
        assert in_batches(sqlite, keys, item_ids, cuts) == whole


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=20))
def test_any_text_is_kept_as_it_is(keys):
    with tempfile.TemporaryDirectory() as folder:
        sqlite, memory = UniqueIdResolver(SQLiteCollisionStore(f"{folder}/c.db")), UniqueIdResolver()
        for item_ids in (None, [f"i{key}" for key in keys], [f"i{key}" for key in keys]):
            assert sqlite.assign(keys, item_ids) == memory.assign(keys, item_ids)


def test_a_bad_batch_takes_nothing(tmp_path):
    resolver = UniqueIdResolver(SQLiteCollisionStore(tmp_path / "c.db"))
    for bad in (["a", "b\0"], ["a", "\ud800"], ["a", 1], ["a", None]):
        with pytest.raises(DataError): resolver.assign(bad)
    with pytest.raises(DataError): resolver.assign(["a", "a"], ["1", "2\0"])
    assert resolver.assign(["a"]) == ["a"]


def test_threads_share_a_store(tmp_path):
    for store in (InMemoryCollisionStore(), Plain(), SQLiteCollisionStore(tmp_path / "c.db")):
        resolver, ids = UniqueIdResolver(store), []
        def work(resolver=resolver, ids=ids):
            for _ in range(20): ids.extend(resolver.assign(["a", "a-1", "b"] * 5))
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(ids) == len(set(ids)) == 6 * 20 * 15


def _work(store, worker):
    resolver = UniqueIdResolver(store)
    common = [f"item{i}" for i in range(30)]  # every worker brings these
    return [(resolver.assign(["a", "a-1"] * 10), resolver.assign(["b"] * 30, common)) for _ in range(10)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_store(tmp_path, method):
    store = SQLiteCollisionStore(tmp_path / "c.db")
    store.assign_batch(["a"])
    with multiprocessing.get_context(method).Pool(3) as pool:
        results = pool.starmap(_work, [(store, n) for n in range(3)])
    counted = [unique for rounds in results for ids, _ in rounds for unique in ids]
    by_item = {tuple(ids) for rounds in results for _, ids in rounds}
    assert len(counted) == len(set(counted)) == 3 * 10 * 20
    assert len(by_item) == 1 and len(set(*by_item)) == 30


BATCHES = """
import sys
from semid.semantic_ids.uniqueness import SQLiteCollisionStore, UniqueIdResolver
resolver = UniqueIdResolver(SQLiteCollisionStore(sys.argv[1]))
print("ready", flush=True)
for batch in range(40):
    keys = [f"{i * 7 % 50}-{i * 3 % 4}" for i in range(batch * 2000, batch * 2000 + 2000)]
    resolver.assign(keys, range(batch * 2000, batch * 2000 + 2000))
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_kill_9_loses_nothing_and_doubles_nothing(tmp_path):
    keys = [f"{i * 7 % 50}-{i * 3 % 4}" for i in range(80_000)]
    expected = UniqueIdResolver().assign(keys, range(len(keys)))
    command = [sys.executable, "-c", BATCHES, str(tmp_path / "c.db")]
    rng, deaths, done = np.random.default_rng(0), 0, []
    for delay in rng.uniform(0, 0.6, 8):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
        process.stdout.close()
        done.append(len(SQLiteCollisionStore(tmp_path / "c.db")))
        assert done[-1] % 2000 == 0  # whole batches only
    assert deaths and done == sorted(done)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    store = SQLiteCollisionStore(tmp_path / "c.db")
    assert UniqueIdResolver(store).assign(keys, range(len(keys))) == expected
    assert len(store) == len(keys) == len(set(expected))
    connection = sqlite3.connect(tmp_path / "c.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_backup_during_writes_is_whole(tmp_path):
    store, stop = SQLiteCollisionStore(tmp_path / "c.db"), threading.Event()
    def write():
        n = 0
        while not stop.is_set():
            store.assign_batch([f"{n}-{i}" for i in range(500)])
            n += 1
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(10):
            store.backup(tmp_path / "backup.db")
            assert len(SQLiteCollisionStore(tmp_path / "backup.db")) % 500 == 0
    finally:
        stop.set()
        thread.join()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_who_waits_too_long_is_told(tmp_path):
    store = SQLiteCollisionStore(tmp_path / "c.db", timeout=0.1)
    other = sqlite3.connect(tmp_path / "c.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(SemidError, match="another process"): store.assign_batch(["a"])
    other.execute("ROLLBACK")
    other.close()
    assert store.assign_batch(["a"]) == ["a"]


def test_equal_items_are_not_quadratic(tmp_path):
    taken = [f"a-{i}" for i in range(1, 30_001)]
    for store in (InMemoryCollisionStore(), SQLiteCollisionStore(tmp_path / "c.db")):
        resolver, start = UniqueIdResolver(store), time.perf_counter()
        resolver.assign(taken)
        ids = resolver.assign(["a"] * 60_000) + resolver.assign(["a"] * 60_000)
        assert len(set(ids) | set(taken)) == 150_000
        assert time.perf_counter() - start < 20


class Constant:
    def __init__(self, code=0): self.code = code
    def encode(self, X): return np.full((len(X), 2), self.code)
    def save(self, path):
        for part in range(5): (Path(path) / f"{part}.txt").write_text(str(self.code))
    @classmethod
    def load(cls, path):
        parts = {(Path(path) / f"{part}.txt").read_text() for part in range(5)}
        assert len(parts) == 1  # of one save
        return cls(int(*parts))


def _save_forever(path, started):
    engine = SemanticIdEngine.load(path, encoder_class=Constant)
    started.set()
    while True:
        engine.encoder.code += 1
        engine.unique_ids([0, 0], formatter=str)
        engine.save(path)


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize("where", ["memory", "sqlite"])
def test_a_killed_save_leaves_a_whole_engine(tmp_path, where):
    path, fork = tmp_path / "engine", multiprocessing.get_context("fork")
    store = SQLiteCollisionStore(tmp_path / "c.db") if where == "sqlite" else InMemoryCollisionStore()
    SemanticIdEngine(Constant(), UniqueIdResolver(store)).save(path)
    codes = [0]
    for delay in np.random.default_rng(0).uniform(0.01, 0.1, 25):
        process = fork.Process(target=_save_forever, args=(path, started := fork.Event()))
        process.start()
        assert started.wait(20)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        engine = SemanticIdEngine.load(path, encoder_class=Constant)
        codes.append(engine.encoder.code)
        if where == "memory":  # encoder and counts are of one save
            assert len(engine.unique_resolver.store) == 2 * codes[-1]
    assert codes == sorted(codes) and codes[-1] > 0
