"""Features: any data in any layout, broken files, killed writers, memory."""
import os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

import semid.feature_files
import semid.features
from semid.config import ConfigError, DataError, ShapeMismatchError
from semid.feature_files import FeatureWriter, write_features
from semid.features import open_features, read_features
from semid.sources import Fingerprint, data_fingerprint, features_from_npy, load_source

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
quick = settings(max_examples=40, deadline=None)


@st.composite
def datasets(draw, dtype=np.float32):
    ids = draw(st.lists(texts, unique=True, max_size=40))
    shape = len(ids), draw(st.integers(1, 5))
    width = np.finfo(dtype).bits
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return ids, draw(arrays(dtype, shape, elements=numbers))


@pytest.fixture
def data():
    return [f"i{n}" for n in range(500)], np.random.default_rng(1).standard_normal((500, 6), dtype=np.float32)


# --- round trips

@quick
@given(datasets(), st.integers(1, 50), st.integers(1, 50))
def test_round_trip_in_shards_and_batches(tmp_path_factory, data, rows_per_shard, batch_size):
    (ids, X), folder = data, tmp_path_factory.mktemp("f")
    write_features(folder / "shards", ids, X, rows_per_shard=rows_per_shard)
    features = open_features(folder / "shards")
    got = list(features.batches(batch_size))
    assert [i for batch, _ in got for i in batch] == ids
    assert all(len(batch) == batch_size for batch, _ in got[:-1])
    assert np.array_equal(np.concatenate([np.empty((0, X.shape[1])), *(x for _, x in got)]), X)
    assert (features.n_rows, features.dim, features.report.kept) == (len(ids), X.shape[1], len(ids))
    assert data_fingerprint(features) == data_fingerprint(ids, X)


@quick
@given(datasets(np.float16), st.integers(1, 20))
def test_float16_is_exact_and_pieces_leave_no_trace(tmp_path_factory, data, step):
    (ids, X), folder = data, tmp_path_factory.mktemp("f")
    write_features(folder / "whole.parquet", ids, X, dtype="float16")
    with FeatureWriter(folder / "pieces.parquet", X.shape[1], np.float16) as writer:
        for i in range(0, len(ids), step): writer.write(ids[i:i+step], X[i:i+step])
    assert (folder / "whole.parquet").read_bytes() == (folder / "pieces.parquet").read_bytes()
    for dtype in (np.float16, np.float32, np.float64):
        got = read_features(folder / "whole.parquet", dtype)[1]
        assert got.dtype == dtype and np.array_equal(got, X)


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64(), pa.int32()])
@pytest.mark.parametrize("layout", [pa.list_, pa.large_list, lambda t: pa.list_(t, 3)])
@pytest.mark.parametrize("ids", [pa.int64(), pa.uint8(), pa.string(), pa.large_string(), pa.binary(),
                                 pa.dictionary(pa.int32(), pa.string())])
def test_every_layout(tmp_path, value, layout, ids):
    names = pa.array(["1", "2", "3"]) if ids != pa.int64() and ids != pa.uint8() else pa.array([1, 2, 3])
    vectors = pa.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], layout(value))
    table = pa.table({"pid": names.cast(ids), "embedding": vectors})
    pq.write_table(table, tmp_path / "f.parquet")
    got, X = read_features(tmp_path / "f.parquet", id_column="pid", feature_column="embedding")
    assert got.tolist() == ["1", "2", "3"] and X.dtype == np.float32
    assert X.ravel().tolist() == list(range(1, 10))


def test_row_groups_do_not_change_the_bytes_of_a_large_file(tmp_path):
    X = np.random.default_rng(0).standard_normal((150_000, 2), dtype=np.float32)
    write_features(tmp_path / "a.parquet", np.arange(len(X)), X)
    with FeatureWriter(tmp_path / "b.parquet", 2) as writer:
        for i in range(0, len(X), 33_333): writer.write(np.arange(i, min(i + 33_333, len(X))), X[i:i+33_333])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 3
    assert np.array_equal(read_features(tmp_path / "b.parquet")[1], X)


# --- what can't be used

bad_rows = {
    "null id": (None, [1., 2.]), "null feature": ("x", None), "wrong dimension": ("x", [1.]),
    "null element": ("x", [None, 1.]), "NaN": ("x", [1., np.nan]), "Inf": ("x", [-np.inf, 1.]),
    "zero norm": ("x", [0., -0.]), "good": ("x", [1., 2.]),
}

@quick
@given(st.lists(st.sampled_from(list(bad_rows)), max_size=30), st.integers(1, 30), st.booleans())
def test_every_row_is_kept_or_quarantined(tmp_path_factory, kinds, per_file, repeat):
    folder = tmp_path_factory.mktemp("f")
    rows = [(i and (i if repeat else f"{i}{n}"), x) for n, (i, x) in enumerate(map(bad_rows.get, kinds))]
    for n, at in enumerate(range(0, len(rows) or 1, per_file)):
        ids, X = zip(*rows[at:at+per_file]) if rows else ((), ())
        table = pa.table({"id": pa.array(ids, pa.string()), "feature": pa.array(X, pa.list_(pa.float32()))})
        pq.write_table(table, folder / f"{n:03}.parquet")
    features = open_features(folder, dim=2, metric="cosine", max_bad_fraction=1, quarantine=folder)
    try: kept, X = features.read()
    except DataError: kept, X = np.array([]), np.empty((0, 2))
    n_good = kinds.count("good")
    n_kept = min(n_good, 1) if repeat else n_good
    expected = {k: kinds.count(k) for k in kinds if k != "good"} | {"duplicate id": n_good - n_kept}
    assert len(kept) == n_kept and np.array_equal(X, [[1., 2.]] * n_kept or X)
    assert features.report.bad == {k: n for k, n in expected.items() if n}
    listed = pq.read_table(folder / "quarantine.parquet").to_pylist()
    assert len(listed) == len(rows) - n_kept == sum(features.report.bad.values())
    for line in listed: assert rows[int(Path(line["file"]).stem) * per_file + line["row"]][0] == line["id"]


def test_null_rows_of_fixed_size_lists(tmp_path):
    "pyarrow itself can't read them back."
    feature = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float16(), 2))
    pq.write_table(pa.table({"id": ["a", "b", "c"], "feature": feature}), tmp_path / "f.parquet")
    features = open_features(tmp_path / "f.parquet", max_bad_fraction=.5)
    assert features.read()[0].tolist() == ["a", "c"] and features.report.bad == {"null feature": 1}


def test_the_first_usable_duplicate_is_kept(tmp_path):
    write = lambda name, ids, X: pq.write_table(pa.table({"id": ids, "feature": X}), tmp_path / name)
    write("a.parquet", ["1", "2"], [[np.nan], [1.]])
    write("b.parquet", [1, 2, 3], [[2.], [3.], [4.]])  # whole numbers are the same ids
    features = open_features(tmp_path, max_bad_fraction=.5)
    ids, X = features.read()
    assert (ids.tolist(), X.ravel().tolist()) == (["2", "1", "3"], [1., 2., 4.])
    assert features.report.bad == {"NaN": 1, "duplicate id": 1}
    assert features.read()[0].tolist() == ids.tolist()  # a second pass finds the same


def test_equal_hashes_are_no_duplicates(tmp_path, monkeypatch, data):
    for module in semid.feature_files, semid.features:
        monkeypatch.setattr(module, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    write_features(tmp_path / "f.parquet", *data)
    assert read_features(tmp_path / "f.parquet")[0].tolist() == data[0]
    with pytest.raises(DataError, match="'i3' is there twice"):
        write_features(tmp_path / "g.parquet", ["i1", "i3", "i3"], data[1][:3])


def test_most_rows_decide_the_dimension(tmp_path, data):
    ids, X = data
    write_features(tmp_path / "a.parquet", ["odd"], X[:1, :4])
    write_features(tmp_path / "b.parquet", ids, X)
    features = open_features(tmp_path, max_bad_fraction=.01)
    assert features.read()[1].shape == (500, 6) and features.report.bad == {"wrong dimension": 1}
    with pytest.raises(DataError, match="500 × wrong dimension"): read_features(tmp_path, dim=4)


def test_values_that_the_asked_type_cannot_hold(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b"], "feature": [[1e300], [1.]]}), tmp_path / "f.parquet")
    with pytest.raises(DataError, match="1 × Inf"): read_features(tmp_path / "f.parquet")
    assert read_features(tmp_path / "f.parquet", np.float64)[1].ravel().tolist() == [1e300, 1.]
    with pytest.raises(ConfigError, match="floats"): read_features(tmp_path / "f.parquet", int)


def test_small_but_not_zero(tmp_path):
    write_features(tmp_path / "f.parquet", ["a"], [[1e-4, 0.]], dtype="float16")
    assert len(read_features(tmp_path / "f.parquet", np.float16, metric="cosine")[0]) == 1


def test_wrong_layout(tmp_path, data):
    ids, X = data
    write_features(tmp_path / "a.parquet", ids, X)
    pq.write_table(pa.table({"id": ["x", "y"], "vector": [[1.], [2.]]}), tmp_path / "b.parquet")
    words = "2 of 502 rows and 1 of 2 files can't be used.*2 × wrong layout.*b.parquet"
    with pytest.raises(DataError, match=words): read_features(tmp_path)
    assert len(read_features(tmp_path, max_bad_fraction=.5)[0]) == 500
    for column in ([.5], [[b"x"]], ["text"]):
        pq.write_table(pa.table({"id": ["x"], "feature": column}), tmp_path / "c.parquet")
        with pytest.raises(DataError, match="use lists of floats"): open_features(tmp_path / "c.parquet")
    pq.write_table(pa.table({"id": [.5], "feature": [[1.]]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="ids that are double: use strings or integers"):
        open_features(tmp_path / "c.parquet")


def test_nothing_usable(tmp_path):
    (tmp_path / "f.parquet").write_bytes(b"no parquet")
    features = open_features(tmp_path, max_bad_fraction=1, quarantine=tmp_path / "q.parquet")
    with pytest.raises(DataError, match="nothing is left: 1 × unreadable"): features.read()
    (line,) = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert line == {"file": str(tmp_path / "f.parquet"), "row": None, "id": None, "reason": "unreadable"}


def test_a_reader_that_stops_early_leaves_no_list(tmp_path, data):
    write_features(tmp_path / "f.parquet", *data)
    (tmp_path / "q.parquet").write_text("the old one")
    for _ in open_features(tmp_path / "f.parquet", quarantine=tmp_path / "q.parquet").batches(10): break
    assert (tmp_path / "q.parquet").read_text() == "the old one"
    read_features(tmp_path / "f.parquet", quarantine=tmp_path / "q.parquet")
    assert len(pq.read_table(tmp_path / "q.parquet")) == 0


@pytest.mark.parametrize("read, listed", [
    ("in.parquet", "in.parquet"), (".", "a/../in.parquet"), ("*.parquet", "link.parquet"),
    ("a/quarantine.parquet", "a")])
def test_the_list_of_bad_rows_never_replaces_what_is_read(read, listed, tmp_path):
    for name in ("in.parquet", "a/quarantine.parquet"):
        write_features(tmp_path / name, ["x", "y"], np.eye(2))
    (tmp_path / "link.parquet").symlink_to(tmp_path / "in.parquet")
    before = (tmp_path / "in.parquet").read_bytes()
    with pytest.raises(ConfigError, match="is what is read: write to another file"):
        open_features(tmp_path / read, quarantine=tmp_path / listed)
    assert (tmp_path / "in.parquet").read_bytes() == before
    read_features(tmp_path / "in.parquet", quarantine=tmp_path / "a")


def test_ids_that_are_no_text_are_refused_from_memory_and_set_aside_from_files(tmp_path):
    ids, X = pa.array([b"\xff", b"a"]), np.eye(2)
    with pytest.raises(DataError, match="one list"): write_features(tmp_path / "f.parquet", ids, X)
    with pytest.raises(DataError, match="one list"): write_features(tmp_path / "f.parquet", 7, X)
    pq.write_table(pa.table(dict(id=ids, feature=list(X))), tmp_path / "f.parquet")
    with pytest.raises(DataError, match="2 × unreadable"): read_features(tmp_path / "f.parquet")


def test_other_columns(tmp_path):
    table = pa.table({"id": ["a", "b", "a"], "feature": [[1.], [np.nan], [3.]], "n": [1, 2, 3],
                      "caption": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "f.parquet")
    features = open_features(tmp_path, columns=["caption", "n", "id"], max_bad_fraction=1)
    ids, X, more = features.read()
    assert ids.tolist() == ["a"] and more.to_pylist() == [{"caption": "x", "n": 1, "id": "a"}]


# --- broken files

def test_every_truncation_is_found(tmp_path, data):
    ids, X = data
    whole = write_features(tmp_path / "w.parquet", ids[:40], X[:40]).read_bytes()
    for n in range(0, len(whole), 7):
        (tmp_path / "t.parquet").write_bytes(whole[:n])
        with pytest.raises(DataError, match="unreadable"): read_features(tmp_path / "t.parquet")


def test_every_flipped_bit_in_the_data_is_found(tmp_path, data):
    ids, X = data
    whole = write_features(tmp_path / "w.parquet", ids[:40], X[:40]).read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for n in range(4, footer, 5):
        (tmp_path / "t.parquet").write_bytes(whole[:n] + bytes([whole[n] ^ 1 << n % 8]) + whole[n + 1:])
        try: got = read_features(tmp_path / "t.parquet")
        except DataError: continue
        assert got[0].tolist() == ids[:40] and np.array_equal(got[1], X[:40])  # a bit that nobody reads


def test_a_file_that_breaks_off_in_the_middle(tmp_path):
    X = np.random.default_rng(0).standard_normal((200_000, 2), dtype=np.float32)
    path = write_features(tmp_path / "f.parquet", np.arange(len(X)), X)
    at = pq.read_metadata(path).row_group(2).column(1).data_page_offset + 1000
    broken = bytearray(path.read_bytes())
    broken[at] ^= 255
    path.write_bytes(broken)
    features = open_features(path, max_bad_fraction=1, quarantine=tmp_path)
    ids, got = features.read()
    assert 0 < len(ids) < len(X) and np.array_equal(got, X[:len(ids)])
    assert features.report.bad == {"unreadable": len(X) - len(ids)} and features.report.bad_fraction == 1
    (line,) = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert (line["row"], line["reason"]) == (len(ids), "unreadable")


def test_ids_that_are_no_text(tmp_path):
    offsets = pa.py_buffer(np.array([0, 2], np.int32))
    broken = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"id": broken, "feature": [[1.]]}), tmp_path / "f.parquet")
    with pytest.raises(DataError, match="unreadable"): read_features(tmp_path / "f.parquet")


# --- writing

@pytest.mark.parametrize("ids, X, error, words", [
    (["a", None], [[1.], [2.]], DataError, "null"),
    (["a", "a"], [[1.], [2.]], DataError, "'a' is there twice"),
    (["a"], [[1.], [2.]], ShapeMismatchError, "shape"),
    (["a"], [1.], ShapeMismatchError, "shape"),
    (["a", "b"], [[1.], [2., 3.]], ShapeMismatchError, "one length"),
    (["a"], [[np.inf]], DataError, "'a' holds Inf"),
    (["a"], [["x"]], DataError, "floats"),
    (["a"], [[1e300]], DataError, "more than float32 can hold"),
    (["a"], np.empty((1, 0)), ShapeMismatchError, "at least one number"),
    ([1.5], [[1.]], DataError, "strings or integers"),
])
@pytest.mark.parametrize("rows_per_shard", [None, 5])
def test_refusals_leave_what_was_there(tmp_path, ids, X, error, words, rows_per_shard):
    path = tmp_path / "f"
    write_features(path, ["old"], [[1.]], rows_per_shard=rows_per_shard)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(error, match=words): write_features(path, ids, X, rows_per_shard=rows_per_shard)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_refused_types_and_places(tmp_path, data):
    path = write_features(tmp_path / "f", *data)
    with pytest.raises(ConfigError, match="float32 or float16, not int8"):
        write_features(path, *data, dtype="int8")
    with pytest.raises(ConfigError, match="rows_per_shard"):
        write_features(tmp_path / "s", *data, rows_per_shard=0)
    with pytest.raises(DataError, match="is a folder"): write_features(tmp_path, *data)
    with pytest.raises(DataError, match="not a folder of shards"):
        write_features(path, *data, rows_per_shard=9)
    with pytest.raises(ConfigError, match="l2 or cosine"): open_features(path, metric="dot")
    with pytest.raises(ConfigError, match="share"): open_features(path, max_bad_fraction=2)


KILLED = """
import sys, numpy as np
from semid.feature_files import FeatureWriter
X = np.ones((20000, 64), np.float32)
with FeatureWriter(sys.argv[1], 64) as writer:
    for i in range(10**6):
        writer.write(np.arange(i * 20000, (i + 1) * 20000), X)
        if i == 3: print("writing", flush=True)
"""

def test_a_killed_writer_leaves_the_old_file(tmp_path, data):
    path = write_features(tmp_path / "f.parquet", *data)
    before = path.read_bytes()
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert path.read_bytes() == before
    assert open_features(tmp_path).files == [path]  # the half-written temporary file is no shard


def test_a_failed_swap_of_folders_brings_the_old_one_back(tmp_path, monkeypatch, data):
    ids, X = data
    write_features(tmp_path / "s", ids, X, rows_per_shard=100)
    rename = Path.rename
    def fail(self, target):
        if self.name == "new": raise OSError("disk")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk"):
        write_features(tmp_path / "s", ids[:5], X[:5], rows_per_shard=100)
    assert len(read_features(tmp_path / "s")[0]) == 500 and os.listdir(tmp_path) == ["s"]


# --- fingerprints and .npy

@quick
@given(datasets(), st.lists(st.integers(0, 40), max_size=4))
def test_fingerprint_of_any_batches(data, cuts):
    ids, X = data
    whole, parts = data_fingerprint(ids, X), Fingerprint()
    cuts = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    for a, b in zip(cuts, cuts[1:]): parts.update(ids[a:b], X[a:b])
    assert parts.hexdigest() == whole
    if len(ids) > 1: assert data_fingerprint([ids[0] + ids[1], "", *ids[2:]], X) != whole or not ids[1]


def test_npy(tmp_path, data):
    ids, X = data
    np.save(tmp_path / "X.npy", X.astype(np.float64))
    np.save(tmp_path / "ids.npy", np.array(ids))
    (tmp_path / "ids.txt").write_bytes("\r\n".join(ids).encode())
    prints = {data_fingerprint(features_from_npy(tmp_path / "X.npy", tmp_path / "o.parquet", i))
              for i in (ids, tmp_path / "ids.npy", str(tmp_path / "ids.txt"))}
    assert prints == {data_fingerprint(ids, X)}
    np.save(tmp_path / "F.npy", np.asfortranarray(X.astype(np.float16)))
    features_from_npy(tmp_path / "F.npy", tmp_path / "F.parquet")
    assert np.array_equal(read_features(tmp_path / "F.parquet", np.float16)[1], X.astype(np.float16))
    assert pq.read_schema(tmp_path / "F.parquet").field("feature").type == pa.list_(pa.float16(), 6)


def test_nothing_is_unpickled(tmp_path):
    import pickle
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "opened"),)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "b.npy", np.array([Bomb()], object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", np.ones((2, 2)))
    np.save(tmp_path / "X.npy", np.ones((1, 2)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "X.npy").read_bytes()[:-1])
    for name in ("b.pkl", "b.npy", "b.npz", "cut.npy", "absent.npy"):
        with pytest.raises(DataError, match="allow_pickle=False|no file"):
            features_from_npy(tmp_path / name, tmp_path / "o.parquet")
        if not name.startswith("cut"):
            with pytest.raises(DataError):
                features_from_npy(tmp_path / "X.npy", tmp_path / "o.parquet", ids=tmp_path / name)
    assert not (tmp_path / "opened").exists() and not (tmp_path / "o.parquet").exists()


def test_source_settings_start_at_the_root(tmp_path, monkeypatch, data):
    (tmp_path / "params.yaml").write_text(
        "features: {source: features, path: data/*.parquet, id_column: pid, max_bad_fraction: 0}")
    write_features(tmp_path / "data" / "f.parquet", *data, id_column="pid")
    (tmp_path / "deep").mkdir()
    monkeypatch.delenv("SEMID_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "deep")
    from semid.config import params
    assert load_source(params("features"))[0].tolist() == data[0]
    with pytest.raises(ConfigError, match="needs a path"): load_source("features")


# --- size

STREAM = """
import resource, sys
import numpy as np
from semid.features import open_features
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = peak()
assert sum(len(X) for _, X in open_features(sys.argv[1]).batches(16384)) == 300_000
print(peak() - start)
"""

@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_one_huge_row_group_streams_in_little_memory(tmp_path):
    n, dim = 300_000, 256
    some = np.random.default_rng(0).standard_normal((1000, dim)).astype(np.float16)
    X = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(some, (n // 1000, 1)).ravel()), dim)
    table = pa.table({"id": np.arange(n), "feature": X})
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=n, use_dictionary=False, compression="none")
    assert (tmp_path / "f.parquet").stat().st_size > 150e6
    command = [sys.executable, "-c", STREAM, str(tmp_path / "f.parquet")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 250  # MB; the matrix alone is 307


def test_two_million_ids_are_checked_quickly(tmp_path):
    n = 2_000_000
    ids = np.char.add("item-", np.arange(n).astype(str))
    ids[-1] = ids[5]
    ones = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(n, np.float16)), 1)
    table = pa.table({"id": ids, "feature": ones})
    pq.write_table(table, tmp_path / "f.parquet")
    start = time.perf_counter()
    features = open_features(tmp_path / "f.parquet", max_bad_fraction=.1)
    assert sum(len(i) for i, _ in features.batches()) == n - 1
    assert features.report.bad == {"duplicate id": 1} and time.perf_counter() - start < 30
