"What a registry must survive: any items in any order, many writers, sudden death, files that others wrote."
import itertools, json, multiprocessing, os, signal, sqlite3, subprocess, sys, tempfile, threading, time
import traceback
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from conftest import real_data
from hypothesis import given, settings, strategies as st
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from semid.config import ConfigError, DataError, SemidError, ShapeMismatchError
from semid.feature_files import write_features
from semid.features import open_features
from semid.semantic_ids import id_publishing, id_registry
from semid.semantic_ids.formatting import codes_to_ids
from semid.semantic_ids.id_database import IDS, VERSIONS, pack_codes, unpack_codes
from semid.semantic_ids.id_registry import IdRegistry
from semid.semantic_ids.interchange import import_index, index_of, read_index, tokens_of, write_index
from semid.semantic_ids.prefix_trie import PrefixConstraint, PrefixTrie
from semid.semantic_ids.relocation import relocate
from semid.semantic_ids.resolvers import RelocationResolver
from semid.semantic_ids.rq_kmeans import RQKMeans
from semid.semantic_ids.uniqueness import UniqueIdResolver


class Given:
    "A model whose vectors are their codes."
    def __init__(self, n_clusters, mark="a"):
        self.n_clusters, self.mark = n_clusters, mark
        self.codebooks_ = [np.zeros((k, len(n_clusters)), np.float32) for k in n_clusters]
        for level, book in enumerate(self.codebooks_): book[:, level] = np.arange(len(book))
    def encode(self, X): return np.asarray(X).round().astype(np.int32)
    def latents(self, X): return np.asarray(X, np.float32)
    def fingerprint(self): return self.mark * 64


def content(path):
    "All that a database holds."
    connection = sqlite3.connect(path)
    try: return "\n".join(connection.iterdump())
    finally: connection.close()


# few codes and few items, so that they meet often
codes = st.tuples(st.integers(0, 2), st.integers(0, 11))
names = st.sampled_from(["1", "2", "a", "A", "a ", "1-1", "'; DROP TABLE x; --", 'q"\\', "é😀", "%", "_"])
calls = st.lists(st.dictionaries(names, codes, max_size=6), max_size=6)


@settings(max_examples=40, deadline=None)
@given(calls, st.sampled_from(["plain", "token"]))
def test_suffixes_are_those_of_the_resolver(calls, fmt):
    with tempfile.TemporaryDirectory() as folder:
        version = IdRegistry(f"{folder}/ids.db").add_version("v", Given([3, 12]), fmt=fmt)
        resolver, seen = UniqueIdResolver(suffix="number"), {}
        for call in calls:
            ids = version.assign(list(call), np.array([*call.values()], float).reshape(-1, 2))
            semantic = codes_to_ids(np.array([*call.values()], int).reshape(-1, 2), fmt=fmt)
            assert ids == resolver.assign(semantic, list(call))
            seen |= dict(zip(call, ids))
        assert len(version) == len(seen) == len(set(seen.values()))
        assert version.ids_of(list(seen)) == list(seen.values())
        assert version.items_of(list(seen.values())) == [[item] for item in seen]
        assert version.table()["id"].to_pylist() == list(seen)
        assert version.table()["unique_id"].to_pylist() == list(seen.values())


@settings(max_examples=30, deadline=None)
@given(calls, st.sampled_from(["suffix", "relocate", "share"]))
def test_nothing_published_ever_moves(calls, collisions):
    with tempfile.TemporaryDirectory() as folder:
        version = IdRegistry(f"{folder}/ids.db").add_version("v", Given([3, 12]), collisions=collisions)
        published = {}
        for call in calls:
            rows = np.array([*call.values()], float).reshape(-1, 2)
            ids = dict(zip(call, version.assign(list(call), rows)))
            assert all(ids[item] == published[item] for item in ids if item in published)
            published |= ids
            before = content(f"{folder}/ids.db")
            assert version.assign(list(call), 11 - rows) == list(ids.values())  # other vectors, the same IDs
            assert content(f"{folder}/ids.db") == before
        if collisions != "share": assert len(set(published.values())) == len(published)
        if collisions != "suffix": assert all(text.count("-") == 1 for text in published.values())


wide_codes = st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(0, 1199))


@settings(max_examples=40, deadline=None)
@given(st.lists(wide_codes, max_size=30), st.data())
def test_a_prefix_finds_what_is_under_it(rows, data):
    prefixes = [(), *(row[:n] for row in rows for n in (1, 2, 3)), (1,), (10,), (99, 0), (5, 2, 1199)]
    with tempfile.TemporaryDirectory() as folder:
        version = IdRegistry(f"{folder}/ids.db").add_version("v", Given([100, 4, 1200]), collisions="share")
        version.assign(range(len(rows)), np.array(rows, float).reshape(-1, 3))
        for prefix in data.draw(st.lists(st.sampled_from(prefixes), max_size=8)):
            expected = sorted((row, i) for i, row in enumerate(rows) if row[:len(prefix)] == tuple(prefix))
            found = version.items(prefix)
            assert sorted(found) == sorted(str(i) for _, i in expected)
            assert [rows[int(i)] for i in found] == [row for row, _ in expected]
            assert version.items("-".join(map(str, prefix))) == found
            assert version.items(prefix, limit=3) == found[:3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12_000), min_size=1, max_size=6), st.data())
def test_codes_survive_packing_and_sort_as_numbers(n_clusters, data):
    rows = data.draw(st.lists(st.tuples(*(st.integers(0, k - 1) for k in n_clusters)), max_size=20))
    packed = pack_codes(np.array(rows, int).reshape(-1, len(n_clusters)), n_clusters)
    assert unpack_codes(packed, n_clusters).tolist() == [list(row) for row in rows]
    assert [rows[i] for i in np.argsort(packed, kind="stable")] == sorted(rows)


def test_a_bad_call_takes_nothing(tmp_path):
    model = RQKMeans(2, 4, random_state=0).fit(np.random.default_rng(0).normal(size=(20, 3)))
    registry = IdRegistry(tmp_path / "ids.db")
    version = registry.add_version("v", model)
    version.assign(["a"], np.zeros((1, 3)))
    before = content(tmp_path / "ids.db")
    two = np.zeros((2, 3))
    wrong = [["b", "b"], ["b", None], ["b", ""], ["b", "c\0"], ["b", "\ud800"], ["b", 1.5], ["b", "c" * 513]]
    bad = [*((items, two) for items in [*wrong, "bc", ["b"]]), (["b", "c"], two * np.nan),
           (["b", "c"], np.zeros((2, 4))), (["b", "c"], np.zeros(2)), (["b"], 5),
           (["b", "c"], [[1, 2, 3], [1]]), (["b", "c"], [["x"] * 3] * 2)]
    for items, X in bad:
        with pytest.raises((DataError, ShapeMismatchError)) as caught: version.assign(items, X)
        assert "\n" not in str(caught.value)
        assert content(tmp_path / "ids.db") == before
    broken = registry.add_version("broken", Given([2, 2]))
    with pytest.raises(ShapeMismatchError, match="3 levels"): broken.assign(["a", "b"], np.zeros((2, 3)))
    with pytest.raises(DataError, match="only 0 to 1"): broken.assign(["a", "b"], [[1, 1], [2, 1]])
    with pytest.raises(DataError, match="-1"): broken.assign(["a", "b"], [[1, 1], [-1, 1]])
    assert len(broken) == 0
    assert version.ids_of(["a", "b"]) == [version.get("a"), None]


def test_a_failure_within_the_transaction_leaves_nothing(tmp_path, monkeypatch):
    version = IdRegistry(tmp_path / "ids.db").add_version("v", Given([9, 9]))
    version.assign(["old"], [[1, 1]])
    before, written = content(tmp_path / "ids.db"), id_publishing.PORTION * 3
    X, real, n = np.zeros((written, 2)), sa.Connection.execute, itertools.count()
    def execute(self, statement, *args, **kwargs):
        if statement.is_dml and next(n) == 2: raise OSError("the disk is full")
        return real(self, statement, *args, **kwargs)
    monkeypatch.setattr(sa.Connection, "execute", execute)
    with pytest.raises(OSError, match="disk is full"): version.assign(range(written), X)
    monkeypatch.undo()
    assert content(tmp_path / "ids.db") == before
    assert len(set(version.assign(range(written), X))) == written


def test_writers_that_meet_begin_again(tmp_path, monkeypatch):
    "As without SQLite's lock: what was looked up is stale, the constraint speaks, and all ends well."
    registry = IdRegistry(tmp_path / "ids.db")
    version = registry.add_version("v", Given([9, 9]))
    version.assign(["a", "b"], [[1, 1], [2, 2]])
    stale, find, highest = [2, 2], id_publishing.find, id_publishing._highest
    def old_find(version, connection, names):
        stale[0] -= 1
        found, slots = find(version, connection, names)
        return (np.full(len(found), None, object), slots) if stale[0] >= 0 else (found, slots)
    def old_highest(version, connection, codes):
        stale[1] -= 1
        return np.full(len(codes), -2) if stale[1] >= 0 else highest(version, connection, codes)
    monkeypatch.setattr(id_publishing, "find", old_find)
    monkeypatch.setattr(id_publishing, "_highest", old_highest)
    assert version.assign(["b", "c"], [[2, 2], [1, 1]]) == ["2-2", "1-1-1"]
    assert stale[1] < 0 and len(version) == 3
    monkeypatch.setattr(id_publishing, "_highest", lambda *a: np.full(len(a[2]), -2))
    monkeypatch.setattr(id_publishing.time, "sleep", lambda seconds: None)
    with pytest.raises(SemidError, match="try again"): version.assign(["d"], [[1, 1]])


def _work(path, worker, collisions):
    "Append twenty batches: some items are this worker's own, some everybody's; all have one of 40 codes."
    registry = IdRegistry(path)
    version = registry.add_version("v", Given([4, 120]), collisions=collisions)
    rng, ids = np.random.default_rng(worker), {}
    for batch in range(20):
        items = [f"{worker}-{batch}-{i}" for i in range(8)] + [f"common-{batch}-{i}" for i in range(8)]
        rng.shuffle(items)
        ids |= dict(zip(items, version.assign(items, rng.integers(0, [4, 10], (16, 2)))))
    return ids


def _check_shared(path, answers, collisions):
    ids = {}
    for answer in answers:
        assert all(ids.get(item, text) == text for item, text in answer.items())  # all were told the same
        ids |= answer
    version = IdRegistry(path)["v"]
    assert len(ids) == len(version) == len(version.table()) == len(answers) * 160 + 160
    assert len(set(ids.values())) == len(ids)
    assert version.ids_of(list(ids)) == list(ids.values())
    if collisions == "relocate": assert all(text.count("-") == 1 for text in ids.values())
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sorted(p for p, in connection.execute("SELECT position FROM semid_ids")) == list(range(len(ids)))
    connection.close()


@pytest.mark.parametrize("method, collisions", [("fork", "suffix"), ("spawn", "relocate")])
def test_processes_append_at_once(tmp_path, method, collisions):
    "They also make the database and the version at once."
    path = str(tmp_path / "ids.db")
    with multiprocessing.get_context(method).Pool(2) as pool:
        answers = pool.starmap(_work, [(path, worker, collisions) for worker in range(2)], chunksize=1)
    _check_shared(path, answers, collisions)


def test_threads_share_a_registry(tmp_path):
    registry, answers = IdRegistry(tmp_path / "ids.db"), []
    version = registry.add_version("v", Given([4, 120]))
    def work(worker):
        ids = {}
        for batch in range(20):
            items = [f"{worker}-{batch}-{i}" for i in range(8)] + [f"common-{batch}-{i}" for i in range(8)]
            ids |= dict(zip(items, version.assign(items, [[1, i % 3] for i in range(16)])))
        answers.append(ids)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    _check_shared(tmp_path / "ids.db", answers, "suffix")


def test_readers_do_not_wait_for_a_writer(tmp_path):
    registry = IdRegistry(tmp_path / "ids.db", timeout=0.1)
    version = registry.add_version("v", Given([4, 4]))
    version.assign(["a"], [[1, 1]])
    with registry.database.transaction(write=True) as connection:
        connection.execute(sa.delete(IDS))
        assert version.get("a") == "1-1"
        assert IdRegistry(tmp_path / "ids.db", timeout=0.1).lookup("1-1") == ["a"]
        with pytest.raises(SemidError, match="another process holds it"): version.assign(["b"], [[1, 1]])
        connection.rollback()
    assert version.assign(["b"], [[1, 1]]) == ["1-1-1"]


def test_a_new_registry_waits_for_those_who_read_the_file(tmp_path):
    other = sqlite3.connect(tmp_path / "ids.db", isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE mine (x)")
    other.execute("BEGIN")
    other.execute("SELECT * FROM mine").fetchall()  # held until the transaction ends
    with pytest.raises(SemidError, match="another process holds it"):
        IdRegistry(tmp_path / "ids.db", timeout=0.2)
    release = threading.Timer(0.3, other.rollback)
    release.start()
    version = IdRegistry(tmp_path / "ids.db", timeout=60).add_version("v", Given([4, 4]))
    release.join()
    assert version.assign(["a"], [[1, 1]]) == ["1-1"]
    other.close()


APPEND = """
import sys
import numpy as np
import sqlalchemy as sa
sys.path.insert(0, sys.argv[2])
from test_id_registry import Given
from semid.semantic_ids.id_registry import IdRegistry
registry = IdRegistry(sys.argv[1])
small = lambda connection, _: connection.execute("PRAGMA cache_size = 10")  # rows reach the file early
sa.event.listen(registry.database._engine, "connect", small)
version = registry.add_version("v", Given([50, 40]))
codes = np.arange(30_000)[:, None] * [7, 3] % [50, 40]
version.assign(["old"], [[0, 0]])
print("ready", flush=True)
version.assign(range(30_000), codes)
print("done", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_kill_9_in_mid_append_leaves_the_former_state(tmp_path):
    command = [sys.executable, "-c", APPEND, str(tmp_path / "ids.db"), str(Path(__file__).parent)]
    def written():
        try: return (tmp_path / "ids.db-wal").stat().st_size
        except FileNotFoundError: return -1  # not yet, or folded into the database just now
    for enough in (0, 100_000, 1_000_000):  # bytes of the transaction that are in the file when it dies
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        before = content(tmp_path / "ids.db")
        while process.poll() is None and written() < enough: time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        version = IdRegistry(tmp_path / "ids.db")["v"]
        assert content(tmp_path / "ids.db") == before
        assert version.ids_of(["old", "0"]) == ["0-0", None] and len(version) == 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert len(version) == 30_001 == len(set(version.table()["unique_id"].to_pylist()))
    assert version.get("old") == "0-0" and version.get(0) == "0-0-1"
    connection = sqlite3.connect(tmp_path / "ids.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_files_go_on_where_they_stopped(tmp_path):
    X = np.random.default_rng(0).integers(0, 5, (50, 2))
    write_features(tmp_path / "f.parquet", range(50), X)
    whole = IdRegistry(tmp_path / "whole.db").add_version("v", Given([5, 5])).assign(range(50), X)
    version = IdRegistry(tmp_path / "ids.db").add_version("v", Given([5, 5]))
    class Stops(Given):
        n = 0
        def encode(self, X):
            self.n += 1
            if self.n == 4: raise KeyboardInterrupt
            return super().encode(X)
    version.model = Stops([5, 5])
    features = open_features(tmp_path / "f.parquet")
    with pytest.raises(KeyboardInterrupt): version.assign_features(features, batch_size=8)
    assert len(version) == 24
    assert version.assign_features(features, batch_size=8) == 50
    assert version.ids_of(range(50)) == whole


def statements_of(registry, work):
    "All statements that SQLAlchemy was given while `work` ran."
    seen = []
    def note(connection, statement, *_): seen.append(statement)
    sa.event.listen(registry.database._engine, "before_execute", note)
    work()
    sa.event.remove(registry.database._engine, "before_execute", note)
    return seen


def everything(registry, tmp_path):
    for collisions in ("suffix", "relocate", "share"):
        version = registry.add_version(collisions, Given([9, 9], collisions[0]), collisions=collisions)
        version.assign(["a", "b"], [[1, 1], [1, 1]])
        version.assign(["c", "b"], [[1, 1], [2, 2]])
        version.lookup("1-1"), version.items("1"), version.items("", limit=2), version.get("a"), len(version)
        version.table(), tokens_of(version), repr(version)
    registry.adopt("x", ["a"], [[1, 2]], [3])
    registry.current, registry.versions, registry["x"], "a" in registry


@pytest.mark.parametrize("kind", [postgresql, mysql])
def test_every_statement_is_good_for_servers(tmp_path, kind):
    registry, dialect = IdRegistry(tmp_path / "ids.db"), kind.dialect()
    statements = statements_of(registry, lambda: everything(registry, tmp_path))
    texts = {str(s.compile(dialect=dialect)) for s in statements}
    assert {text.split()[0] for text in texts} == {"SELECT", "INSERT", "UPDATE"} and len(texts) > 10
    assert any(text.endswith("FOR UPDATE") for text in texts)
    for text in texts: assert "PRAGMA" not in text and "json_each" not in text and "OR IGNORE" not in text
    ddl = [str(CreateTable(table).compile(dialect=dialect)) for table in (VERSIONS, IDS)]
    assert "UNIQUE (version, code, slot)" in ddl[1] and "PRIMARY KEY (version, item_id)" in ddl[1]
    assert "ROWID" not in ddl[1] and ("utf8mb4_bin" in ddl[1]) == (kind is mysql)


def test_no_question_reads_the_whole_table(tmp_path):
    registry = IdRegistry(tmp_path / "ids.db")
    version = registry.add_version("v", Given([9, 9]))
    version.assign(range(500), np.arange(500)[:, None] % [9, 9])
    statements = statements_of(registry, lambda: (
        version.get(3), version.lookup((1, 1)), version.items((1,)), version.assign(["new"], [[1, 1]])))
    with registry.database.transaction() as connection:
        for statement in statements:
            if not statement.is_select or IDS not in statement.get_final_froms(): continue
            text = str(statement.compile(connection, compile_kwargs={"literal_binds": True}))
            plan = " ".join(row[-1] for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + text))
            assert "AND" in plan and "SCAN" not in plan and "TEMP" not in plan, (text, plan)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 119), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_relocation_needs_to_know_only_the_codes_near(n_given, n_new, seed):
    "A version that asks the database for a few prefixes moves items as one that knows all codes."
    rng, model = np.random.default_rng(seed), Given([4, 5, 6])
    every = np.stack(np.unravel_index(rng.permutation(120), (4, 5, 6)), axis=1)
    given, n_new = every[:n_given], min(n_new, 120 - n_given)
    new = every[rng.integers(0, max(n_given, 1), n_new)]  # mostly codes that are taken
    X = (new + rng.uniform(-0.4, 0.4, new.shape)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        version = IdRegistry(f"{folder}/ids.db").add_version("v", model, collisions="relocate")
        version.assign(np.arange(n_given), given)
        ids = version.assign(np.arange(1000, 1000 + n_new), X)
    assert ids == codes_to_ids(relocate(X.round().astype(int), X, model.codebooks_, taken=given))


def test_an_append_does_not_read_all_codes(tmp_path):
    version = IdRegistry(tmp_path / "ids.db").add_version("v", Given([40, 40]), collisions="relocate")
    version.assign(range(1200), np.stack(np.divmod(np.arange(1200), 40), axis=1))
    fetched = []
    original = id_publishing.fetch
    def counting(connection, statement):
        columns = original(connection, statement)
        fetched.append(len(columns[0]))
        return columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_publishing, "fetch", counting)
        assert version.assign(["new"], [[35, 3]]) == ["35-3"] and fetched == []
        assert version.assign(["next"], [[35, 3]]) != ["35-3"] and fetched == [1]
        assert version.assign(["full"], [[5, 3]])[0].startswith(("29", "3")) and fetched[1:] == [40, 1202]


def test_a_model_is_known_by_its_fingerprint(tmp_path):
    registry = IdRegistry(f"sqlite:///{tmp_path}/deep/ids.db")
    registry.add_version("v", Given([3, 3]), fmt="token", collisions="share")
    before = content(tmp_path / "deep" / "ids.db")
    again = IdRegistry(tmp_path / "deep" / "ids.db").add_version("v", Given([3, 3]))
    assert (again.fmt, again.collisions, again.n_clusters) == ("token", "share", [3, 3])
    model = Given([3, 3])
    for wrong in (dict(model=Given([3, 3], "b")), dict(model=Given([3, 4])), dict(model=model, sep="_"),
                  dict(model=model, collisions="suffix")):
        with pytest.raises((DataError, ConfigError), match="another name"): registry.add_version("v", **wrong)
    for wrong in (dict(sep="1"), dict(sep=""), dict(fmt="xml"), dict(collisions="none")):
        with pytest.raises(ConfigError): registry.add_version("w", Given([3, 3]), **wrong)
    for name in ("", None, "n" * 256):
        with pytest.raises(ConfigError): registry.add_version(name, Given([3, 3]))
    for prefix in ("a", (1, 1, 1), (1.5,), (-1,), -1, None, "1--1"):
        with pytest.raises(DataError): again.items(prefix)
    for wrong in ("a", "<a_1>", "<a_1><b_1><c_1>", 5, None, (1,), (1, 1, 1), (1, 1.5), [[1, 1]]):
        with pytest.raises((DataError, ShapeMismatchError)): again.lookup(wrong)
    assert content(tmp_path / "deep" / "ids.db") == before
    with pytest.raises(ConfigError, match="can be made"): IdRegistry(tmp_path / "deep" / "ids.db" / "x.db")
    reader = IdRegistry(tmp_path / "deep" / "ids.db")
    with pytest.raises(ConfigError, match="without its model"): reader.assign(["a"], [[1, 1]])


def test_a_password_is_never_shown(tmp_path):
    sa.dialects.registry.register("secretive", "sqlalchemy.dialects.sqlite", "dialect")
    with pytest.raises((SemidError, ConfigError)) as caught:
        IdRegistry("secretive://user:hunter2@host/nowhere/at/all/ids.db")
    assert "hunter2" not in str(caught.value)


# index.json

triples = st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(-1, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(triples, min_size=1, max_size=12, unique=True), st.booleans())
def test_an_index_comes_back_as_it_was(rows, suffixes):
    index = {f"item {i}": [f"<a_{a}>", f"<b_{b}>", *([f"<c_{c}>"] if suffixes and c >= 0 else [])]
             for i, (a, b, c) in enumerate(rows)}
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "x.index.json"), Path(folder, "y.index.json")
        first.write_text(json.dumps(index))
        version = import_index(IdRegistry(Path(folder, "ids.db")), "v", first, n_levels=2, n_clusters=31)
        tokens = write_index(version, second, Path(folder, "tokens.json"))
        assert second.read_bytes() == first.read_bytes()
        assert json.loads(Path(folder, "tokens.json").read_text()) == tokens == tokens_of(version)
        assert {t for row in index.values() for t in row} <= set(tokens) and len(set(tokens)) == len(tokens)
        for item, row in index.items(): assert item in version.lookup("".join(row))


@pytest.mark.parametrize("options", [{}, {"collisions": "suffix"}])
def test_an_index_without_suffixes_is_taken_as_it_is(tmp_path, options):
    "No suffix is counted for an item that has none in the file."
    registry = IdRegistry(tmp_path / "ids.db")
    registry.adopt("v", ["a", "b"], [[0, 0], [0, 0]], [-1, 1], n_clusters=[4, 4], fmt="token")
    before = content(tmp_path / "ids.db")
    def read(index):
        (tmp_path / "x.json").write_text(json.dumps(index))
        return import_index(registry, "v", tmp_path / "x.json", **options)
    for index, says in (({"c": ["<a_0>", "<b_0>"]}, "'<a_0><b_0>' is held by another item"),
                        ({"b": ["<a_0>", "<b_0>"]}, "'b' has the ID '<a_0><b_0>-1'"),
                        ({"g": ["<a_2>", "<b_0>"], "h": ["<a_2>", "<b_0>"]}, "'g' and 'h' have the same ID")):
        with pytest.raises(DataError, match=says): read(index)
        assert content(tmp_path / "ids.db") == before
    version = read({"a": ["<a_0>", "<b_0>"], "g": ["<a_2>", "<b_0>"]})
    assert version.ids_of(["a", "g"]) == ["<a_0><b_0>", "<a_2><b_0>"]


def test_an_index_meets_what_others_published_meanwhile(tmp_path, monkeypatch):
    mine, others = (IdRegistry(tmp_path / "ids.db") for _ in range(2))
    (tmp_path / "x.json").write_text('{"c": ["<a_0>", "<b_0>"]}')
    def slow(*args, publish=id_publishing.publish):
        monkeypatch.undo()
        others.adopt("v", ["a"], [[0, 0]], [-1], n_clusters=[1, 1], fmt="token")
        return publish(*args)
    monkeypatch.setattr(id_registry, "publish", slow)
    with pytest.raises(DataError, match="held by another item"): import_index(mine, "v", tmp_path / "x.json")


def real(name, column):
    return pq.read_table(real_data(name), columns=["id", column])


@pytest.mark.parametrize("name", ["beauty", "instruments", "yelp"])
def test_letter_files_survive(tmp_path, name):
    table = real(f"sasrec_{name}.parquet", "letter_codes")
    rows = zip(table["id"].to_pylist(), table["letter_codes"].to_pylist())
    index = {item: [f"<{letter}_{code}>" for letter, code in zip("abcd", row)] for item, row in rows}
    (tmp_path / "in.json").write_text(json.dumps(index))
    version = import_index(IdRegistry(tmp_path / "ids.db"), "letter", tmp_path / "in.json", n_clusters=256)
    write_index(version, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "in.json").read_bytes()
    assert version.collisions == "share" and len(tokens_of(version)) == 1024


@pytest.mark.parametrize("name", ["industrial_and_scientific", "office_products"])
def test_minionerec_files_survive(tmp_path, name):
    table = real(f"items_{name}.parquet", "minionerec_tokens")
    index = dict(zip(table["id"].to_pylist(), table["minionerec_tokens"].to_pylist()))
    (tmp_path / "in.json").write_text(json.dumps(index))
    version = import_index(IdRegistry(tmp_path / "ids.db"), "mini", tmp_path / "in.json")
    assert index_of(version) == index
    trie = PrefixTrie.of(version)
    assert all(tuple(row) in trie for row in version.rows()[1].tolist())


# the trie

@settings(max_examples=60, deadline=None)
@given(st.lists(triples.map(lambda t: (t[0], t[1] % 4, t[2])), max_size=25), st.booleans())
def test_the_trie_knows_every_prefix(rows, suffixes):
    codes, slots = np.array(rows, int).reshape(-1, 3)[:, :2], [row[2] for row in rows]
    trie = PrefixTrie(codes, slots if suffixes else None)
    ids = {(*row[:2], *([row[2]] if suffixes and row[2] >= 0 else [])) for row in rows}
    assert len(trie) == len(ids)
    for n in range(4):
        for prefix in itertools.product(range(4), repeat=n):
            following = {full[n] for full in ids if full[:n] == prefix and len(full) > n}
            assert trie.allowed(prefix).tolist() == sorted(following)
            assert trie.ends(prefix) == (prefix in ids)


def beam_search(follow, prompt, n_beams, n_tokens, rng):
    "A plain beam search over random logits, as `generate` does it: off what is allowed lies minus infinity."
    beams = [(0.0, list(prompt))]
    for _ in range(6):
        grown = []
        for score, written in beams:
            if written[-1] == 2:
                grown.append((score, written))
                continue
            allowed = follow(0, np.array(written))
            assert allowed
            for token in allowed: grown.append((score + rng.normal(), written + [token]))
        beams = sorted(grown, key=lambda beam: -beam[0])[:n_beams]
    return [written[len(prompt):] for _, written in beams]


def test_decoding_writes_only_what_exists(tmp_path):
    version = IdRegistry(tmp_path / "ids.db").add_version("v", Given([5, 5]))
    X = np.random.default_rng(0).integers(0, 5, (40, 2))
    version.assign(range(40), X)
    tokens = tokens_of(version)
    token_ids = {token: 10 + i for i, token in enumerate(tokens)}
    follow = PrefixConstraint(PrefixTrie.of(version), token_ids, 2, prompt_length=2)
    written = beam_search(follow, [3, 4], 30, 100, np.random.default_rng(1))
    assert all(ids[-1] == 2 for ids in written)
    texts = ["".join(tokens[i - 10] for i in ids[:-1]) for ids in written]
    known = {"".join(row): item for item, row in index_of(version).items()}
    assert len(texts) == 30 and all(text in known for text in texts)
    as_tokens = IdRegistry(tmp_path / "token.db").add_version("v", Given([5, 5]), fmt="token")
    as_tokens.assign(range(40), X)
    assert [as_tokens.lookup(text) for text in texts] == [[known[text]] for text in texts]


def test_generate_obeys_the_trie():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    codes = np.random.default_rng(0).integers(0, 6, (12, 3))
    token_ids = {f"<{'abc'[i]}_{c}>": 10 + 6 * i + c for i in range(3) for c in range(6)}
    trie = PrefixTrie(codes)
    sizes = dict(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **sizes))
    follow = PrefixConstraint(trie, token_ids, 2, prompt_length=4)
    out = decoder.eval().generate(torch.tensor([[0, 5, 6, 7], [5, 5, 5, 5]]), max_new_tokens=6, num_beams=20,
                                  num_return_sequences=10, prefix_allowed_tokens_fn=follow)
    ids = {tuple(row) for row in (codes + np.array([10, 16, 22])).tolist()}
    for row in out[:, 4:].tolist(): assert tuple(row[:3]) in ids and row[3] == 2


def test_reading_nothing_unpickles(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\x80\x04\x95")
    with pytest.raises(DataError, match="can't be read"): read_index(tmp_path / "x.json")


def test_adopting_meets_what_others_published_meanwhile(tmp_path, monkeypatch):
    mine, others = (IdRegistry(tmp_path / "ids.db") for _ in range(2))
    for registry in (mine, others): registry.adopt("v", ["x"], [[0, 0]], n_clusters=[4, 4])
    def slow(version, *args, publish=id_publishing.publish):
        monkeypatch.undo()
        others.adopt("v", ["y"], [[1, 1]])
        return publish(version, *args)
    monkeypatch.setattr(id_registry, "publish", slow)
    with pytest.raises(DataError, match="'y' has the ID '1-1'"): mine.adopt("v", ["z", "y"], [[3, 3], [2, 2]])
    assert mine["v"].get("y") == "1-1" and mine["v"].get("z") is None


@pytest.mark.parametrize("collisions", ["suffix", "relocate"])
def test_models_of_others_may_know_no_devices(tmp_path, collisions):
    class Half(Given):
        def encode(self, X, device="cpu"): return super().encode(X)
    registry = IdRegistry(tmp_path / "ids.db")
    for model in (Given([4, 4]), Half([4, 4])):
        version = registry.add_version(type(model).__name__, model, collisions=collisions)
        assert version.assign(["a"], [[1, 1]]) == ["1-1"]
        if isinstance(model, Half) and collisions == "suffix":
            assert version.assign(["b"], [[2, 2]], device="cpu") == ["2-2"]
            continue
        wrong = r"latents\(X, device=None\)" if isinstance(model, Half) else r"encode\(X, device=None\)"
        with pytest.raises(ConfigError, match=wrong): version.assign(["b"], [[2, 2]], device="cpu")
        resolver, call = RelocationResolver(), dict(embeddings=np.ones((1, 2)), model=model, codes=[[1, 1]])
        with pytest.raises(ConfigError, match=r"latents\(X, device=None\)"):
            resolver.assign(["1-1"], device="cpu", **call)
        assert resolver.assign(["1-1"], **call) == ["1-1"]


def test_a_network_keeps_the_promises_of_a_registry(tmp_path):
    from semid.semantic_ids.rq_vae import RQVAE
    X = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    model = RQVAE(6, [16, 16], 4, layers=[8], epochs=2, random_state=0).fit(X)
    registry = IdRegistry(tmp_path / "ids.db")
    version = registry.add_version("v", model, collisions="relocate")
    first = version.assign(range(60), X[:60])
    every = version.assign(range(100), X, device="cpu")
    assert every[:60] == first and len({*every}) == 100 and version.assign(range(100), X) == every


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_registry_goes_on_in_a_fork(tmp_path):
    "What the child commits stays, also when the parent has the last word in between."
    version = IdRegistry(tmp_path / "ids.db").add_version("v", Given([9, 9]))
    version.assign(["a"], [[1, 1]])
    (read, write), (go, start) = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        for end in (read, start): os.close(end)  # whoever waits for somebody who has gone is told so
        try:
            first = version.assign(["b"], [[1, 1]]) + [version.get("a")]
            with version.database.transaction() as connection:
                version.count(connection)
                os.write(write, b"x")
                os.read(go, 1)
            os._exit(version.assign(["c"], [[1, 1]]) + first != ["1-1-2", "1-1-1", "1-1"])
        except BaseException: traceback.print_exc()
        finally: os._exit(9)
    for end in (write, go): os.close(end)
    try:
        assert os.read(read, 1) == b"x"
        assert version.get("b") == "1-1-1"
        version.database._engine.dispose()  # whatever the parent still has is closed
    finally:
        os.close(start)
        status = os.waitpid(pid, 0)[1]
    assert status == 0
    assert version.assign(["d"], [[1, 1]]) == ["1-1-3"]
    assert version.ids_of("a b c d".split()) == ["1-1", "1-1-1", "1-1-2", "1-1-3"]
    connection = sqlite3.connect(tmp_path / "ids.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_fork_has_connections_of_its_own(tmp_path):
    registry = IdRegistry(tmp_path / "ids.db")
    disposed = []
    registry.database._engine.dispose = lambda close=True: disposed.append(close)
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.write(write, str(disposed).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"[True, False]"  # the parent closes the file's, the child lets go
    assert disposed == [True]


def test_mysql_sees_no_space_at_the_end():
    from types import SimpleNamespace
    version = SimpleNamespace(database=SimpleNamespace(url=sa.make_url("mysql+pymysql://h/d")))
    with pytest.raises(DataError, match="'a ' ends in a space"):
        id_publishing._refuse_padded(version, id_publishing.item_names(["a", "a "]))
    id_publishing._refuse_padded(version, id_publishing.item_names(["a", " b"]))
