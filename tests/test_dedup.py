"Deduplication against brute force, its guarantees, and the same bytes from everywhere."
import json, os, platform, subprocess, sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from semid.clustering import dedup, pairs as search, rows, seeding
from semid.clustering.dedup import Duplicates, SemanticDeduplicator, write_kept
from semid.clustering.duplicates import check_room
from semid.clustering.inference import KMeansInference
from semid.clustering.kmeans import KMeans
from semid.config import ConfigError, DataError, ShapeMismatchError
from semid.feature_files import write_features
from semid.features import open_features, read_features

SOME = settings(max_examples=60, deadline=None)


def near_copies(n=900, dim=24, seed=0, noise=0.25):
    "Vectors of which many resemble another, some in chains and some byte for byte."
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, dim)) + 0.3
    X[n // 3:] = X[rng.integers(0, n // 3, n - n // 3)] + noise * rng.normal(size=(n - n // 3, dim))
    X[-40:-20] = X[:20]
    return X.astype(np.float32), [f"item-{i:05d}" for i in range(n)]


def all_cosines(X, Y=None):
    "Cosines by the fixed-order sum, all pairs."
    Y = X if Y is None else Y
    both = np.concatenate([X, Y]).astype(np.float32)
    i, j = np.divmod(np.arange(len(X) * len(Y)), len(Y))
    return search.cosines(both, rows.squared_lengths(both), i, j + len(X)).reshape(len(X), len(Y))


def choose(order, near, fixed=()):
    "The greedy choice in plain Python: an item stays unless something that stays is near it."
    stays = list(fixed)
    for i in order:
        if not any(near[i][j] for j in stays): stays.append(i)
    return stays


def most_similar(i, stays, cosines, place):
    return max(stays, key=lambda j: (cosines[i][j], -place[j]))


@st.composite
def small_sets(draw, most=36):
    "Whole numbers: many exact copies, proportional vectors and ties."
    dim = draw(st.integers(1, 6))
    rows = draw(st.integers(1, most))
    X = draw(hnp.arrays(np.float32, (rows, dim), elements=st.integers(-3, 3).map(float)))
    X[~X.any(1), 0] = 1
    return X


@SOME
@given(X=small_sets(), threshold=st.sampled_from([0.5, 0.8, 0.96, 0.99, 1.0]), n_clusters=st.integers(1, 5),
       keep=st.sampled_from(["hard", "easy", "random", "size"]), block=st.sampled_from([1, 3, 2048]),
       n_threads=st.sampled_from([1, 2]), seed=st.integers(0, 3))
def test_brute_force_agrees(X, threshold, n_clusters, keep, block, n_threads, seed):
    ids = [f"{i * 7919 % 1000:03d}" for i in range(len(X))]
    size = (np.arange(len(X)) * 31 % 7).astype(float)
    options = dict(probes=99, keep=keep, block_rows=block, random_state=seed, n_threads=n_threads)
    found = SemanticDeduplicator(threshold, n_clusters, **options).deduplicate(X, ids, priority=size)
    cosines = all_cosines(X)
    np.testing.assert_allclose(cosines, np.minimum(1, cosines.T), atol=0)
    order = np.argsort(np.array(ids), kind="stable")
    if keep == "size": order = order[np.argsort(-size[order], kind="stable")]
    else:  # the order is the deduplicator's own: its groups are numbered in it
        rank = found.items["group"].to_numpy()
        order = np.lexsort((np.array(ids), ~found.items["first"].to_numpy(), rank))
    stays = choose(order, cosines >= threshold)
    place = {i: n for n, i in enumerate(order)}
    assert list(found.kept) == [ids[i] for i in sorted(stays)]
    wanted = []
    for i in sorted({*range(len(X))} - {*stays}):
        j = most_similar(i, stays, cosines, place)
        same = [k for k in stays if X[k].tobytes() == X[i].tobytes()]  # before what is only parallel
        j = same[0] if same else j
        wanted.append((ids[i], ids[j], 1. if same else cosines[i][j]))
    table = found.removed.to_pydict()
    assert [*zip(table["id"], table["kept_id"], table["cosine"])] == wanted
    assert found.estimated_miss_rate == 0
    assert sum(found.counts().values()) == 2 * found.counts()["rows_in"]


@SOME
@given(new=small_sets(20), old=small_sets(20), threshold=st.sampled_from([0.8, 0.96, 1.0]),
       within=st.booleans(), n_clusters=st.integers(1, 3))
def test_brute_force_agrees_against_a_reference(new, old, threshold, within, n_clusters):
    dim = min(new.shape[1], old.shape[1])
    new, old = new[:, :dim], old[:, :dim]
    new[~new.any(1), 0] = old[~old.any(1), 0] = 1
    finder = SemanticDeduplicator(threshold, n_clusters, probes=99, keep="value")
    found = finder.deduplicate(new, against=old, within=within, priority=-np.arange(len(new)))
    X, n = np.concatenate([new, old]), len(new)
    near = all_cosines(X) >= threshold
    if not within: near[:n, :n] = False
    stays = [i for i in choose(sorted(range(n)), near, range(n, len(X))) if i < n]
    assert list(found.kept_rows) == stays
    assert found.counts()["rows_in"] == n and len(found.removed) == n - len(stays)
    if not within: assert len(found.leaks) == len(found.removed)
    for row in found.leaks.to_pylist(): assert near[int(row["id"]), n + int(row["kept_id"])]


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
@pytest.mark.parametrize("probes", [1, 2])
def test_guarantees(keep, probes):
    X, ids = near_copies()
    found = SemanticDeduplicator(0.9, 12, probes=probes, keep=keep).deduplicate(X, ids)
    of, kept, cosines = {i: n for n, i in enumerate(ids)}, {*found.kept}, all_cosines(X)
    assert found.removed.num_rows > 200 and kept.isdisjoint(found.removed["id"].to_pylist())
    for row in found.removed.to_pylist():
        i, j = of[row["id"]], of[row["kept_id"]]
        assert row["kept_id"] in kept and row["cosine"] == cosines[i, j] >= 0.9
        x, y = X[[i, j]].astype(float)
        direct = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert abs(direct - row["cosine"]) < 1e-12
    stays = np.isin(found.items["group"].to_numpy(), found.items["group"].to_numpy()[found.kept_rows])
    group = found.items["group"].to_numpy()
    a, b = found.pairs["a"].to_numpy(), found.pairs["b"].to_numpy()
    alive = {*group[stays]}
    assert not [1 for p, q in zip(a, b) if p in alive and q in alive]  # no pair that was seen is kept whole
    homes = found.items["cluster"].to_numpy()
    same = (homes[:, None] == homes) & (cosines >= 0.9) & ~np.eye(len(X), dtype=bool)
    keeps = np.isin(ids, found.kept)
    assert not (same & keeps[:, None] & keeps).any()  # and pairs inside a cluster are always seen
    assert found.counts() == dict(rows_in=900, kept=len(kept), removed=len(found.removed), quarantined=0)
    assert found.exact_duplicate_ratio == 20 / 900


def test_hard_and_easy_go_by_the_distance_to_the_centroid():
    X = np.array([[1, 0], [1, 0.1], [1, 0.25]], np.float32)  # the middle one is nearest to the mean
    assert list(SemanticDeduplicator(0.9, keep="easy").deduplicate(X, [*"abc"]).kept) == ["b"]
    assert list(SemanticDeduplicator(0.9, keep="hard").deduplicate(X, [*"abc"]).kept) == ["c"]


def test_the_miss_rate_is_what_it_says():
    X, ids = near_copies(2000, noise=0.35)
    found = SemanticDeduplicator(0.9, 40, probes=1, miss_sample=10**6).deduplicate(X, ids)
    truth = np.triu(all_cosines(np.unique(X, axis=0)) >= 0.9, 1).sum()
    assert 0.01 < found.estimated_miss_rate == pytest.approx(1 - len(found.pairs) / truth)
    assert SemanticDeduplicator(0.9, 40, miss_sample=0).deduplicate(X, ids).estimated_miss_rate is None
    more = [SemanticDeduplicator(0.9, 40, probes=p).deduplicate(X).estimated_miss_rate for p in (1, 2, 4)]
    assert more[0] > more[1] > more[2]


def test_the_miss_rate_says_what_it_rests_on(tmp_path):
    X, ids = near_copies(2000, noise=0.35)
    finder = SemanticDeduplicator(0.9, 40, probes=1, miss_sample=10**6)
    every = finder.deduplicate(X, ids)
    truth = int(np.triu(all_cosines(np.unique(X, axis=0)) >= 0.9, 1).sum())
    assert every.sampled_pairs == truth  # each once, though both of its ends are sampled
    held = []
    for seed in range(12):
        some = SemanticDeduplicator(0.9, 40, probes=1, miss_sample=150, random_state=seed).deduplicate(X, ids)
        low, high = some.estimated_miss_interval
        assert 0 <= low <= some.estimated_miss_rate <= high <= 1 and 0 < some.sampled_pairs < truth
        held.append(low <= 1 - len(some.pairs) / truth <= high)
    assert sum(held) >= 10
    assert some.rethreshold(0.97).sampled_pairs < some.sampled_pairs
    manifest = json.loads((some.save(tmp_path / "result") / "manifest.json").read_text())
    assert manifest["estimated_miss_interval"] == [low, high]
    assert manifest["sampled_pairs"] == some.sampled_pairs
    assert Duplicates.load(tmp_path / "result").estimated_miss_interval == (low, high)
    none = SemanticDeduplicator(0.9, 40, miss_sample=0).deduplicate(X, ids)
    assert none.estimated_miss_interval is None and none.sampled_pairs == 0
    assert SemanticDeduplicator(0.9).deduplicate(X, ids).estimated_miss_interval == (0, 0)


def test_rethreshold_is_a_new_run():
    X, ids = near_copies()
    low = SemanticDeduplicator(0.85, 10).deduplicate(X, ids)
    for t in (0.85, 0.9, 0.97, 1):
        again, fresh = low.rethreshold(t), SemanticDeduplicator(t, 10).deduplicate(X, ids)
        assert again.removed == fresh.removed and list(again.kept) == list(fresh.kept)
        assert again.counts() == fresh.counts()
    with pytest.raises(ConfigError, match="0.85"): low.rethreshold(0.84)
    for wrong in ("0.99", None, [0.9]):
        with pytest.raises(ConfigError, match="threshold must be a number"): low.rethreshold(wrong)


def saved(result, folder):
    result.save(folder)
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    X, ids = near_copies(3000)
    scores = np.random.default_rng(1).integers(0, 50, len(X))
    write_features(folder / "features", ids, X, rows_per_shard=700)
    for n, path in enumerate(sorted((folder / "features").iterdir())):
        table = pq.read_table(path)
        pq.write_table(table.append_column("score", pa.array(scores[n * 700:n * 700 + len(table)])), path)
    return folder / "features", X, ids, scores


@pytest.fixture
def ray(local_ray): return local_ray


def test_the_same_bytes_from_everywhere(files, ray, tmp_path):
    folder, X, ids, scores = files
    options = dict(threshold=0.9, n_clusters=15, keep="score")
    wanted = saved(SemanticDeduplicator(**options).deduplicate(X, ids, priority=scores), tmp_path / "wanted")
    shards = sorted(folder.iterdir())
    runs = dict(parquet=(folder, {}), shuffled=([str(p) for p in shards[::-1]], {}),
                glob=(f"{folder}/*.parquet", {}),
                features=(open_features(folder, metric="cosine", columns="score"), {}),
                block=(folder, dict(block_rows=7)), threads=(folder, dict(n_threads=1, block_rows=100)),
                one=(folder, dict(n_workers=1)), two=(folder, dict(n_workers=2, block_rows=64)))
    for name, (source, more) in runs.items():
        found = SemanticDeduplicator(**options, **more).deduplicate(source)
        assert saved(found, tmp_path / name) == wanted, name
    array = SemanticDeduplicator(**options, n_workers=2, n_threads=3).deduplicate(X, ids, priority=scores)
    assert saved(array, tmp_path / "array") == wanted


@pytest.mark.parametrize("keep", ["hard", "random"])
def test_the_order_of_the_items_is_no_matter(keep):
    X, ids = near_copies()
    turn = np.random.default_rng(3).permutation(len(X))
    one = SemanticDeduplicator(0.9, 9, keep=keep).deduplicate(X, ids)
    other = SemanticDeduplicator(0.9, 9, keep=keep).deduplicate(X[turn], [ids[i] for i in turn])
    assert {*one.kept} == {*other.kept}
    assert sorted(map(str, one.removed.to_pylist())) == sorted(map(str, other.removed.to_pylist()))
    assert [ids[i] for i in turn if ids[i] in {*one.kept}] == list(other.kept)


def spiky(n, dim, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, dim)) ** 5
    X[n // 2:] = X[:n - n // 2] + rng.normal(size=(n - n // 2, dim)) * rng.uniform(0, 0.5, (n - n // 2, 1))
    return X


@pytest.mark.parametrize("scale", [1e-18, 1, 1e17])
@pytest.mark.parametrize("dim", [1, 3, 64, 1500])
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_the_screen_loses_nothing(scale, dim, backend, monkeypatch):
    monkeypatch.setattr(seeding, "backend_of", lambda name: backend)
    X = (spiky(160, dim, dim) * scale).astype(np.float32)
    X = X[X.any(1) & (np.einsum("ij,ij->i", X, X) > 0)]
    cosines = all_cosines(X)
    for threshold in (0.3, 0.9, 0.999, 1):
        found = SemanticDeduplicator(threshold, 3, probes=3).deduplicate(X)
        group = found.items["group"].to_numpy()
        seen = {*zip(found.pairs["a"].to_pylist(), found.pairs["b"].to_pylist())}
        i, j = np.nonzero(np.triu(cosines >= threshold, 1))
        ends = np.sort(np.stack([group[i], group[j]]), 0)
        assert {*zip(*ends.tolist())} - {(g, g) for g in group} == seen


def test_bounds_that_are_only_just_reached():
    "Pairs whose cosine is the threshold to the last bit, or one bit below."
    X, ids = near_copies(300)
    values = np.unique(all_cosines(X))
    for value in values[(values > 0.8) & (values < 0.99)][::400]:
        exactly = SemanticDeduplicator(value).deduplicate(X, ids)
        assert value in exactly.pairs["cosine"].to_pylist()
        assert value not in exactly.rethreshold(np.nextafter(value, 2)).removed["cosine"].to_pylist()
        above = SemanticDeduplicator(np.nextafter(value, 2)).deduplicate(X, ids)
        assert len(exactly.pairs) > len(above.pairs)


def test_one_value_many_times():
    X = np.repeat(np.random.default_rng(0).normal(size=(50, 16)), 2000, 0)
    found = SemanticDeduplicator(0.999).deduplicate(X)
    assert len(found.kept) == 50 and found.exact_duplicate_ratio == found.duplicate_ratio == 1 - 50 / 100_000
    assert len(found.pairs) == 0 and set(found.removed["cosine"].to_pylist()) == {1}


def test_too_many_pairs_are_refused():
    X = np.random.default_rng(0).normal(size=(500, 4)) + 50
    with pytest.raises(DataError, match="max_pairs"): SemanticDeduplicator(0.9, max_pairs=1000).deduplicate(X)


def test_what_cannot_be_compared_is_counted(tmp_path):
    X, ids = near_copies(300)
    X[4], X[7, 2], X[9, 1] = 0, np.nan, np.inf
    with pytest.raises(DataError, match="1 zero norm, 1 NaN, 1 Inf.*item-00004"):
        SemanticDeduplicator(0.9).deduplicate(X, ids)
    some = SemanticDeduplicator(0.9, max_bad_fraction=0.1, quarantine=tmp_path / "q.parquet")
    found = some.deduplicate(X, ids)
    assert found.counts()["quarantined"] == 3
    assert pq.read_table(tmp_path / "q.parquet")["reason"].to_pylist() == ["zero norm", "NaN", "Inf"]
    good = np.setdiff1d(np.arange(300), [4, 7, 9])
    assert found.removed == SemanticDeduplicator(0.9).deduplicate(X[good], [ids[i] for i in good]).removed
    value = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), X.shape[1])
    pq.write_table(pa.table(dict(id=ids, feature=value)), tmp_path / "in.parquet")
    from_file = some.deduplicate(tmp_path / "in.parquet")
    assert from_file.counts() == found.counts() and from_file.removed == found.removed
    assert pq.read_table(tmp_path / "q.parquet")["row"].to_pylist() == [4, 7, 9]
    with pytest.raises(DataError): SemanticDeduplicator(0.9).deduplicate(tmp_path / "in.parquet")
    with pytest.raises(DataError, match="no row"):
        SemanticDeduplicator(max_bad_fraction=1).deduplicate(np.zeros((3, 2)))


def test_clear_refusals(tmp_path):
    X, ids = near_copies(50)
    wrong = dict(threshold=0), dict(threshold=1.5), dict(n_clusters=0), dict(probes=0), dict(n_workers=-1), \
        dict(max_bad_fraction=1.5)
    for options in wrong:
        with pytest.raises(ConfigError): SemanticDeduplicator(**options)
    finder = SemanticDeduplicator()
    with pytest.raises(ConfigError, match="priority"): SemanticDeduplicator(keep="score").deduplicate(X, ids)
    with pytest.raises(DataError, match="unique"): finder.deduplicate(X, ["a"] * 50)
    with pytest.raises(DataError, match="double: use strings"): finder.deduplicate(X, np.arange(50) / 2)
    no_text = [b"\xff%d" % i for i in range(50)]
    with pytest.raises(DataError, match="be read"): finder.deduplicate(X, no_text)
    with pytest.raises(DataError, match="null"): finder.deduplicate(X, [None, *ids[1:]])
    with pytest.raises(ShapeMismatchError): finder.deduplicate(X, ids[1:])
    with pytest.raises(ShapeMismatchError, match="D=24"): finder.deduplicate(X, against=X[:, :3])
    write_features(tmp_path / "in.parquet", ids, X)
    with pytest.raises(ConfigError, match="leave out"): finder.deduplicate(tmp_path / "in.parquet", ids)
    features = open_features(tmp_path / "in.parquet")
    with pytest.raises(ConfigError, match="cosine"): finder.deduplicate(features)
    with pytest.raises(DataError): finder.deduplicate(tmp_path / "nothing.parquet")
    with pytest.raises(DataError): SemanticDeduplicator(keep="score").deduplicate(tmp_path / "in.parquet")


def test_a_result_takes_the_place_of_nothing_else(tmp_path):
    X = np.eye(4, dtype=np.float32)
    result = SemanticDeduplicator().deduplicate(X)
    write_features(tmp_path / "in" / "items.parquet", list("abcd"), X)
    before = (tmp_path / "in" / "items.parquet").read_bytes()
    with pytest.raises(ConfigError, match="items.parquet, which is not ours"): result.save(tmp_path / "in")
    assert (tmp_path / "in" / "items.parquet").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"type": "codes"}')
    with pytest.raises(ConfigError, match="manifest.json of codes"): result.save(tmp_path / "other")
    result.save(tmp_path / "mine")
    result.save(tmp_path / "mine")
    with pytest.raises(ConfigError, match="result's own"):
        check_room(tmp_path / "mine", tmp_path / "mine" / "kept.parquet")


def test_columns_that_decide_who_stays(tmp_path):
    X = np.repeat(np.eye(3, dtype=np.float32), 2, 0)
    for name, at, score in ("a", 0, pa.array([1, 5, 2])), ("b", 3, pa.array([0.5, 9.0, 2.5])):
        write_features(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(3)], X[at:at + 3])
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pq.read_table(path).append_column("score", score), path)
    result = SemanticDeduplicator(keep="score").deduplicate(tmp_path)
    assert sorted(pa.array(result.kept).to_pylist()) == ["a1", "a2", "b1"]
    by_priority = SemanticDeduplicator(keep="priority")
    with pytest.raises(DataError, match="one type"): by_priority.deduplicate(X, priority=[1, "a", 2, 3, 4, 5])
    with pytest.raises(DataError, match="no order"): by_priority.deduplicate(X, priority=[[1]] * 6)


@pytest.mark.parametrize("make", [
    lambda texts, _: pa.array(texts).dictionary_encode(), lambda texts, _: pa.array(texts, pa.string_view()),
    lambda texts, _: pa.chunked_array([texts[:2], texts[2:]]).dictionary_encode(),
    lambda texts, _: pa.array([t.encode() for t in texts], pa.binary_view()),
    lambda _, numbers: pa.array(np.array(numbers, np.float16)),
    lambda _, numbers: pa.array(numbers).dictionary_encode()])
def test_categories_views_and_halves_have_an_order(make, tmp_path):
    X, column = np.repeat(np.eye(3), 2, 0), make([*"abdcef"], [1, 2, 4, 3, 5, 6])
    finder = SemanticDeduplicator(keep="score")
    assert finder.deduplicate(X, [*"uvwxyz"], priority=column).kept.tolist() == ["v", "w", "z"]
    table = pa.table(dict(id=[*"uvwxyz"], feature=list(X), score=column))
    pq.write_table(table, tmp_path / "in.parquet")
    assert finder.deduplicate(tmp_path / "in.parquet").kept.tolist() == ["v", "w", "z"]


def test_a_column_without_an_order_is_refused_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "search_tiles", lambda *_: pytest.fail("it was searched"))
    monkeypatch.setattr(dedup, "prepare_search", lambda *_: pytest.fail("it was searched"))
    X, finder = np.eye(3), SemanticDeduplicator(keep="score")
    with pytest.raises(DataError, match="have no order"): finder.deduplicate(X, priority=[[1], [2], [3]])
    pq.write_table(pa.table(dict(id=[*"abc"], feature=list(X), score=[[1]] * 3)), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="have no order"): finder.deduplicate(tmp_path / "in.parquet")


def test_nothing_that_is_read_is_overwritten(tmp_path):
    X = np.repeat(np.eye(3, dtype=np.float32), 2, 0)
    X[0] = 0
    new, old = tmp_path / "new.parquet", tmp_path / "old.parquet"
    for path, ids in ((new, "abcdef"), (old, "uvwxyz")): write_features(path, [*ids], X)
    before = [path.read_bytes() for path in (new, old)]
    opened = open_features(new, metric="cosine", max_bad_fraction=1, quarantine=tmp_path / "old.parquet")
    for source, listed in ((new, new), (new, old), (X, old), (opened, None)):
        finder = SemanticDeduplicator(max_bad_fraction=1, quarantine=listed)
        with pytest.raises(ConfigError, match="what is read"): finder.deduplicate(source, against=old)
    result = SemanticDeduplicator(max_bad_fraction=1).deduplicate(new, against=old)
    for path in (new, old):
        with pytest.raises(ConfigError, match="what is read"): write_kept(result, new, path)
        with pytest.raises(ConfigError, match="what is read"):
            check_room(tmp_path / "result", path, read=[new, old])
    with pytest.raises(ConfigError, match="is a folder"): check_room(tmp_path / "result", tmp_path)
    result.save(tmp_path / "result")
    with pytest.raises(ConfigError, match="what is read"):
        check_room(tmp_path / "result", read=[tmp_path / "result" / "items.parquet"])
    assert [path.read_bytes() for path in (new, old)] == before


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_arrays_and_files_list_their_bad_rows_in_the_same_place(make, tmp_path):
    X, ids, lists = np.eye(4, dtype=np.float32), [*"abcd"], []
    X[1] = 0
    write_features(tmp_path / "in.parquet", ids, X)
    for name, source in (("array", (X, ids)), ("file", (tmp_path / "in.parquet",))):
        make(tmp_path / name)
        SemanticDeduplicator(max_bad_fraction=1, quarantine=tmp_path / name).deduplicate(*source)
        (path,) = (p for p in (tmp_path / name, tmp_path / name / "quarantine.parquet") if p.is_file())
        lists.append((path.relative_to(tmp_path / name), pq.read_table(path).drop("file")))
    assert lists[0] == lists[1] and lists[0][1]["id"].to_pylist() == ["b"]


@pytest.mark.parametrize("as_files", [True, False])
def test_bad_rows_of_both_sets_are_listed_and_counted(as_files, tmp_path):
    def rows(name, n, *bad):
        X, ids = np.random.default_rng(len(name)).normal(size=(n, 32)), [f"{name}-{i}" for i in range(n)]
        X[list(bad)] = 0
        write_features(tmp_path / f"{name}.parquet", ids, X)
        return X, ids
    (new, new_ids), (old, old_ids) = rows("new", 30, 3), rows("reference", 40, 5, 7)
    if as_files: source, other = (tmp_path / "new.parquet",), dict(against=tmp_path / "reference.parquet")
    else: source, other = (new, new_ids), dict(against=old, against_ids=old_ids)
    finder = SemanticDeduplicator(0.9, max_bad_fraction=0.1, quarantine=tmp_path / "q.parquet")
    result = finder.deduplicate(*source, **other)
    lines = pq.read_table(tmp_path / "q.parquet")
    assert lines["id"].to_pylist() == ["new-3", "reference-5", "reference-7"]
    paths = [str(tmp_path / f"{name}.parquet") for name in ("new", "reference", "reference")]
    assert lines["file"].to_pylist() == (paths if as_files else [None] * 3)
    assert lines["reason"].to_pylist() == ["zero norm"] * 3
    assert result.counts() == dict(rows_in=30, kept=29, removed=0, quarantined=1)
    assert (result.about["against_rows"], result.about["against_quarantined"]) == (40, 2)
    about = json.loads((result.save(tmp_path / "result") / "manifest.json").read_text())["about"]
    assert (about["against_rows"], about["against_quarantined"]) == (40, 2)
    finder.max_bad_fraction = 0.04  # of the new set 1 in 30 is bad, of the other 1 in 20
    with pytest.raises(DataError, match="2 of 40 rows"): finder.deduplicate(*source, **other)
    assert pq.read_table(tmp_path / "q.parquet") == lines


def test_bad_rows_of_opened_features_are_listed_too(tmp_path):
    X = np.eye(4, dtype=np.float32)
    X[1] = 0
    write_features(tmp_path / "in.parquet", [*"abcd"], X)
    opened = open_features(tmp_path / "in.parquet", metric="cosine", max_bad_fraction=1)
    finder = SemanticDeduplicator(max_bad_fraction=1, quarantine=tmp_path / "q.parquet")
    assert finder.deduplicate(opened).counts()["quarantined"] == 1
    assert pq.read_table(tmp_path / "q.parquet")["id"].to_pylist() == ["b"]


def test_a_joined_cluster_needs_a_folder_that_all_machines_see(files, ray, tmp_path, monkeypatch):
    X, ids = near_copies(100)
    finder = SemanticDeduplicator(0.9, n_workers=1, address="auto")
    here = dict(Alive=True, NodeManagerHostname=platform.node())
    monkeypatch.setattr(ray, "nodes", lambda: [here, here | dict(NodeManagerHostname="another")])
    with pytest.raises(ConfigError, match="give staging"): finder.deduplicate(X, ids)
    staged = SemanticDeduplicator(0.9, n_workers=1, address="auto", staging=tmp_path).deduplicate(X, ids)
    monkeypatch.setattr(ray, "nodes", lambda: [here])
    assert finder.deduplicate(X, ids).removed == staged.removed  # a cluster of this machine alone
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="give staging"): finder.deduplicate(X, ids)


def test_a_model_gives_the_buckets(tmp_path):
    X, ids = near_copies()
    for metric in ("cosine", "l2"):
        model = KMeans(8, metric=metric, random_state=1).fit(X)
        model.save(tmp_path / metric)
        found = SemanticDeduplicator(0.9, model=tmp_path / metric).deduplicate(X, ids)
        inference = KMeansInference(tmp_path / metric)
        assert found.items["cluster"].to_pylist() == inference.predict(X).tolist()
        assert found.removed == SemanticDeduplicator(0.9, model=model).deduplicate(X, ids).removed
        assert found.removed == SemanticDeduplicator(0.9, model=inference).deduplicate(X, ids).removed


def test_a_result_survives_the_disk(files, tmp_path):
    folder, X, ids, _ = files
    found = SemanticDeduplicator(0.9, 15).deduplicate(folder)
    found.save(tmp_path / "result")
    again = Duplicates.load(tmp_path / "result")
    assert saved(again, tmp_path / "again") == saved(found, tmp_path / "result")
    assert again.rethreshold(0.95).removed == found.rethreshold(0.95).removed
    assert again.estimated_miss_rate == found.estimated_miss_rate and again.counts() == found.counts()
    kept, left = read_features(write_kept(again, folder, tmp_path / "kept.parquet"))
    assert list(kept) == list(found.kept)
    assert list(kept) == pq.read_table(tmp_path / "result" / "kept.parquet")["id"].to_pylist()
    assert np.array_equal(left, X[found.kept_rows])
    with pytest.raises(DataError): write_kept(again, X[:-1], tmp_path / "no.parquet", ids[:-1])
    with pytest.raises(DataError): write_kept(again, X, tmp_path / "no.parquet", ids[::-1])
    assert not (tmp_path / "no.parquet").exists()
    (tmp_path / "result" / "items.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="save it again"): Duplicates.load(tmp_path / "result")


def test_pictures_of_pairs():
    from io import BytesIO

    from PIL import Image
    X, ids = near_copies(200)
    found = SemanticDeduplicator(0.9).deduplicate(X, ids)
    buffer = BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, "PNG")
    looks = (lambda _: np.zeros((3, 3))), (lambda _: Image.new("L", (4, 4))), (lambda _: buffer.getvalue()), \
        (lambda _: {"bytes": buffer.getvalue(), "path": None})
    for look in looks: assert len(found.plot(look, n=3).axes) >= 3
    found.plot(dict.fromkeys(ids, np.eye(2)), n=2, closest=True, exact=True)
    SemanticDeduplicator(1).deduplicate(X[:3]).plot({})


PEAK = """
import sys, threading, time
from semid.clustering.dedup import SemanticDeduplicator
peak = 0
def watch():
    global peak
    while True:
        held = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        peak = max(peak, int(held.split()[1]) // 1024)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
finder = SemanticDeduplicator(0.9, 40, staging=sys.argv[2], block_rows=512, n_threads=2)
found = finder.deduplicate(sys.argv[1])
assert len(found.removed) > 100
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_vectors(tmp_path):
    peaks, rng = {}, np.random.default_rng(0)
    for n in (20_000, 80_000):
        X = rng.normal(size=(n, 512)).astype(np.float32)
        X[:200] = X[200:400]
        X[:200, 0] += 0.1
        write_features(tmp_path / f"{n}.parquet", range(n), X)
        command = [sys.executable, "-c", PEAK, tmp_path / f"{n}.parquet", tmp_path]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        peaks[n] = int(run.stdout)
    # 60,000 more vectors and their int8 form are 176 MiB; pages of mapped files are the system's to take back
    assert peaks[80_000] - peaks[20_000] < 60, peaks
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_no_rows_at_all(tmp_path):
    write_features(tmp_path / "none.parquet", [], np.empty((0, 4), np.float32))
    write_features(tmp_path / "some.parquet", ["a", "b"], np.eye(2, 4, dtype=np.float32))
    for against in (None, tmp_path / "some.parquet"):
        result = SemanticDeduplicator(0.9).deduplicate(tmp_path / "none.parquet", against=against)
        assert result.counts() == dict(rows_in=0, kept=0, removed=0, quarantined=0) and not len(result.kept)
        write_kept(result, tmp_path / "none.parquet", tmp_path / "kept.parquet")
        result.save(tmp_path / "result")
        assert Duplicates.load(tmp_path / "result").duplicate_ratio == 0


SLOW = """
import sys, time
from semid.clustering import dedup
def wait(*args):
    print("there", flush=True)
    time.sleep(100)
dedup.search_tiles = wait
dedup.SemanticDeduplicator(0.9, staging=sys.argv[2]).deduplicate(sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="who is gone can't be told")
def test_the_folder_of_a_killed_search_is_removed_by_the_next_and_no_other(files, tmp_path):
    def start():
        run = subprocess.Popen([sys.executable, "-c", SLOW, files[0], tmp_path], stdout=subprocess.PIPE)
        assert run.stdout.readline().strip() == b"there"
        return run
    killed, alive = start(), start()
    left = {run: next(tmp_path.glob(f"semid-dedup-*-{run.pid}-*")) for run in (killed, alive)}
    killed.kill()
    killed.wait()
    name = left[killed].name
    gone, host = tmp_path / name, name.removeprefix("semid-dedup-").rsplit("-", 2)[0]
    others = [name.replace(host, host + "-2"), name.replace(host, "elsewhere"), "semid-dedup-mine",
              f"semid-dedup-{host}-999999999-abcdefg", f"semid-dedup-{host}-{os.getpid()}-abcdefgh"]
    for other in others: (tmp_path / other).mkdir()
    precious = tmp_path / f"semid-dedup-{host}-999999999-abcdefgh" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    (tmp_path / f"semid-dedup-{host}-999999999-linklink").symlink_to(precious.parent)
    (tmp_path / f"semid-dedup-{host}-999999999-filefile").write_text("mine")
    before = {*tmp_path.iterdir()}
    assert {"values", "quantised", ".lock"} <= {path.name for path in gone.iterdir()}
    try:
        SemanticDeduplicator(0.9, staging=tmp_path).deduplicate(files[0])
        assert before - {*tmp_path.iterdir()} == {gone} and precious.exists()
        assert {"values", ".lock"} <= {path.name for path in left[alive].iterdir()}
    finally:
        alive.kill()
        alive.wait()
    SemanticDeduplicator(0.9, staging=tmp_path).deduplicate(files[0])
    assert before - {*tmp_path.iterdir()} == {*left.values()}


@pytest.mark.parametrize("settings, says", [
    (dict(threshold="0.9"), "threshold must be a number above 0 and at most 1, not '0.9'"),
    (dict(threshold=float("nan")), "threshold must be a number above 0 and at most 1, not nan"),
    (dict(n_clusters=2.5), "n_clusters, where it is not 'auto', must be a whole number from 1, not 2.5"),
    (dict(probes=2.5), "probes must be a whole number from 1, not 2.5"),
    (dict(block_rows="64"), "block_rows must be a whole number from 1, not '64'"),
    (dict(n_workers=1.5), "n_workers must be a whole number from 0, not 1.5"),
    (dict(max_pairs=1e8), "max_pairs must be a whole number from 0, not 100000000.0"),
    (dict(max_iter="10"), "max_iter must be a whole number from 1, not '10'"),
    (dict(random_state=None), "random_state must be a whole number from 0, not None"),
    (dict(max_bad_fraction="0"), "max_bad_fraction must be a share from 0 to 1, not '0'"),
    (dict(keep=3), "keep must be hard, easy, random or the name of a column, not 3")])
def test_a_setting_of_the_wrong_type_is_named_with_its_value(settings, says):
    with pytest.raises(ConfigError) as refused: SemanticDeduplicator(**settings)
    assert says in str(refused.value)


def test_numbers_of_numpy_are_settings_and_can_be_saved(tmp_path):
    X, ids = near_copies(200)
    finder = SemanticDeduplicator(np.float64(0.9), np.int64(3), probes=np.int8(2), random_state=np.uint16(1))
    finder.deduplicate(X, ids).save(tmp_path / "result")
    assert repr(finder) == "SemanticDeduplicator(threshold=0.9, n_clusters=np.int64(3), random_state=1)"


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_a_model_of_other_vectors_is_refused(metric, tmp_path):
    X, ids = near_copies(200)
    model = KMeans(4, metric=metric, random_state=0).fit(X[:, :5])
    model.save(tmp_path / "model")
    for other in (model, tmp_path / "model", KMeansInference(tmp_path / "model")):
        with pytest.raises(ShapeMismatchError, match="vectors have D=24 and the model's centroids have D=5"):
            SemanticDeduplicator(model=other).deduplicate(X, ids)
    unfitted = SemanticDeduplicator(model=KMeans())
    with pytest.raises(ConfigError, match="no fitted k-means"): unfitted.deduplicate(X)


def test_too_many_pairs_are_the_same_error_on_ray(files, ray, tmp_path):
    said = set()
    for n_workers in 0, 1, 2:
        finder = SemanticDeduplicator(0.5, max_pairs=10, n_workers=n_workers, staging=tmp_path)
        with pytest.raises(DataError, match="max_pairs") as refused: finder.deduplicate(files[0])
        said.add((type(refused.value), str(refused.value)))
    assert len(said) == 1 and not [*tmp_path.iterdir()]
