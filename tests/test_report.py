"Reports against direct computation, pair by pair; drift against known changes and against brute force."
import copy
import json
import os
import subprocess
import sys
from itertools import combinations, permutations, product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics.cluster import contingency_matrix

from semid.config import ConfigError, DataError, ShapeMismatchError
from semid.semantic_ids import collisions as C
from semid.semantic_ids import prefixes as P
from semid.semantic_ids.drift import _best_names, _names_by_items, compare
from semid.semantic_ids.report import load_report, report
from semid.semantic_ids.rq_kmeans import RQKMeans

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=60, deadline=None)


def random_case(seed, n, levels=3, k_codes=3, d=4):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)).astype(rng.choice([np.float32, np.float64]))
    if n > 3: X[rng.integers(n)], X[rng.integers(n)] = 0, X[rng.integers(n)]
    return X, rng.integers(0, k_codes, (n, levels))


def groups_of(codes, length):
    found = {}
    for i, code in enumerate(codes[:, :length].tolist()): found.setdefault(tuple(code), []).append(i)
    return list(found.values())


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 3), st.integers(1, 5))
def test_cosine_within_prefixes_pair_by_pair(seed, n, levels, k_codes):
    X, codes = random_case(seed, n, levels, k_codes)
    found, rows = P.prefix_cosine(X, codes), X.astype(np.float64)
    length = np.sqrt((rows**2).sum(1))
    def mean_of(group):
        pairs = [(i, j) for i, j in combinations(group, 2) if length[i] and length[j]]
        return np.mean([rows[i] @ rows[j] / (length[i] * length[j]) for i, j in pairs]) if pairs else None
    for l in range(1, levels + 1):
        groups = [[i for i in group if length[i]] for group in groups_of(codes, l)]
        groups = [group for group in groups if len(group) > 1]
        means, g = [mean_of(group) for group in groups], np.array([len(group) for group in groups], float)
        assert (found["n_groups"][l - 1], found["n_items"][l - 1]) == (len(groups), g.sum())
        for name, weight in (("groups", g * 0 + 1), ("items", g), ("pairs", g * (g - 1))):
            want = np.average(means, weights=weight) if groups else None
            assert found[name][l - 1] == (None if want is None else pytest.approx(want, abs=1e-12))
    want = mean_of(range(n))
    assert found["any_pair"] == (None if want is None else pytest.approx(want, abs=1e-12))


def test_copies_are_as_alike_as_can_be():
    X = np.tile(np.random.default_rng(0).normal(size=(1, 7)), (1000, 1)) * np.logspace(-9, 9, 1000)[:, None]
    assert P.prefix_cosine(X, np.zeros((1000, 1), int))["pairs"][0] == pytest.approx(1, abs=1e-12)


@quick
@given(seeds, st.integers(1, 30), st.integers(1, 5))
def test_preference_discrimination_pair_by_pair(seed, n, k_codes):
    X, codes = random_case(seed, n, 2, k_codes)
    for l, value in enumerate(P.preference_discrimination(X, codes)["pd"], 1):
        means = [X[group].astype(np.float64).mean(0) for group in groups_of(codes, l)]
        means = [m / np.linalg.norm(m) if m.any() else m for m in means]
        near = [np.exp(-2 * (1 - a @ b)) for a, b in combinations(means, 2)]
        assert value == (pytest.approx(np.log(np.mean(near)), abs=1e-9) if near else None)


@quick
@given(seeds, st.integers(1, 60), st.integers(1, 5), st.integers(1, 4))
def test_purity_agrees_with_sklearn(seed, n, k_codes, n_labels):
    _, codes = random_case(seed, n, 3, k_codes)
    labels = np.array(list("abcd"))[np.random.default_rng(seed).integers(0, n_labels, n)]
    found = P.prefix_purity(codes, labels)
    for l in range(1, 4):
        table = contingency_matrix(labels, np.unique(codes[:, :l], axis=0, return_inverse=True)[1].ravel())
        several = table.sum(0) > 1
        assert found["all"][l - 1] == table.max(0).sum() / n
        shared = table[:, several]
        assert found["shared"][l - 1] == (shared.max(0).sum() / shared.sum() if several.any() else None)


@quick
@given(seeds, st.integers(2, 15), st.integers(1, 12), st.integers(1, 4))
def test_lift_pair_by_pair(seed, n, m, k_codes):
    _, codes = random_case(seed, n, 2, k_codes)
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, n, (m, 2))
    pairs[0] = 0, 1
    found = P.co_occurrence_lift(codes, pairs)
    used = [(a, b) for a, b in pairs.tolist() if a != b]
    crossed = [(a, b) for (a, _), (_, b) in product(used, used) if a != b]
    assert (found["n_pairs"], found["n_repeats"]) == (len(used), m - len(used))
    for l in (1, 2):
        share = lambda some, l=l: np.mean([(codes[a, :l] == codes[b, :l]).all() for a, b in some])
        together, chance, popular = share(used), share(list(combinations(range(n), 2))), share(crossed)
        assert found["together"][l - 1] == pytest.approx(together, abs=1e-12)
        assert found["by_chance"][l - 1] == pytest.approx(chance, abs=1e-12)
        assert found["by_popularity"][l - 1] == pytest.approx(popular, abs=1e-12)
        assert found["lift"][l - 1] == (pytest.approx(together / chance) if chance else None)


@quick
@given(st.lists(st.lists(st.integers(0, 50), max_size=5), max_size=8))
def test_pairs_of_sequences(sequences):
    want = [pair for s in sequences for pair in zip(s, s[1:])]
    if not any(sequences):
        with pytest.raises(DataError): P.consecutive_pairs(sequences)
        return
    ids = [f"i{n}" for n in range(51)]
    column = pa.array([[ids[i] for i in s] for s in sequences], pa.list_(pa.string()))
    halves = pa.chunked_array([column[:len(column) // 2], column[len(column) // 2:]])
    for found in (P.consecutive_pairs(sequences), P.consecutive_pairs([np.array(s, int) for s in sequences]),
                  P.consecutive_pairs(column, ids), P.consecutive_pairs(halves, pa.array(ids))):
        assert found.tolist() == [list(pair) for pair in want]


@quick
@given(seeds, st.integers(1, 200), st.integers(1, 4), st.integers(1, 12))
def test_collisions_use_and_entropy(seed, n, levels, k_codes):
    codes = np.random.default_rng(seed).integers(0, k_codes, (n, levels))
    found = C.collisions_per_level(codes)
    for l in range(1, levels + 1):
        sizes = np.array([len(group) for group in groups_of(codes, l)])
        assert found["uniquely_identified"][l - 1] == (sizes == 1).sum() / n
        assert found["bucket_collision"][l - 1] == (sizes > 1).mean()
        assert found["largest_bucket"][l - 1] == sizes.max()
        assert found["items_in_collision"][l - 1] == pytest.approx(1 - found["uniquely_identified"][l - 1])
    ratios = C.entropy_ratios(codes, k_codes)
    assert ratios["entropy"] == pytest.approx(entropy(sizes), abs=1e-12)
    assert n == 1 or ratios["of_items"] == pytest.approx(entropy(sizes) / np.log(n), abs=1e-12)
    for column, top, unequal in zip(codes.T, C.top_share_per_level(codes), C.gini_per_level(codes, k_codes)):
        counts = np.bincount(column, minlength=k_codes)
        assert top == counts.max() / n
        spread = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
        assert unequal == pytest.approx(spread, abs=1e-12)


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    kind = rng.integers(30, size=900)
    X = (rng.normal(size=(30, 8))[kind] * 2 + rng.normal(size=(900, 8))).astype(np.float32)
    model = RQKMeans(3, 16, random_state=0).fit(X[:700])
    return X[:700], X[700:], model, model.encode(X[:700])


def test_other_numbers_for_the_same_codes_change_nothing(items):
    X, new, model, codes = items
    rng = np.random.default_rng(1)
    other = np.stack([rng.permutation(16)[column] for column in codes.T], axis=1)
    pairs, labels = rng.integers(0, 700, (500, 2)), rng.integers(0, 5, 700)
    a, b = (report(X, c, pairs=pairs, labels=labels, n_clusters=16).values for c in (codes, other))
    def flat(value):
        return [x for part in value.values() for x in flat(part)] if isinstance(value, dict) else [value]
    for x, y in zip(flat(a), flat(b), strict=True): assert x == pytest.approx(y, rel=1e-12)
    assert a["lift"] == b["lift"] and a["collisions"] == b["collisions"] and a["purity"] == b["purity"]


def test_a_report_for_cosine_sees_only_directions(items):
    X, new, _, _ = items
    model = RQKMeans(2, 16, metric="cosine", random_state=0).fit(X)
    codes, stretch = model.encode(X), 2.0 ** np.random.default_rng(0).integers(-3, 4, (700, 1))
    assert report(X * stretch, codes, model).values == report(X, codes, model).values


def test_the_number_of_threads_changes_no_byte(tmp_path):
    code = """
import sys
import numpy as np
from semid.semantic_ids.report import report
rng = np.random.default_rng(0)
X = rng.normal(size=(3000, 33)).astype(np.float32)
codes = np.digitize(X[:, :4], [-1, 0, 1])
report(X[:2000], codes[:2000], held_out=(X[2000:], codes[2000:]), sequences=[[1, 2, 3]]).save(sys.argv[1])
"""
    for threads in "12":
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / threads)], check=True, env=env)
    for name in ("report.json", "report.arrow", "report.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert load_report(tmp_path / "1").values["held_out"]["n_items"] == 1000
    (tmp_path / "1" / "report.arrow").write_bytes(b"no arrow")
    whole = json.loads((tmp_path / "1" / "report.json").read_text())
    for damaged in ([], {}, {"files": {}}, {"files": 3}, whole | {"files": {}}, whole):
        (tmp_path / "1" / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="save"): load_report(tmp_path / "1")


def test_gaps_are_held_out_less_as_many_training_items(items):
    X, new, model, codes = items
    values = report(X, codes, model, held_out=new).values
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["training_sample"]["n_items"] == values["held_out"]["n_items"] == 200
    for section in ("collisions", "use", "whole_code", "cohesion", "retrieval"):
        for metric, gap in values["gaps"][section].items():
            new_value, old = (values[part][section][metric] for part in ("held_out", "training_sample"))
            listed = isinstance(gap, list)
            sides = zip(new_value, old) if listed else [(new_value, old)]
            wanted = [None if None in (a, b) else a - b for a, b in sides]
            assert gap == (wanted if listed else wanted[0])
    error = values["gaps"]["error"]["relative_mse"]
    assert error == values["held_out"]["error"]["relative_mse"] - values["error"]["relative_mse"] > 0
    seen = {*map(tuple, codes.tolist())}
    taken = np.mean([tuple(code) in seen for code in model.encode(new).tolist()])
    assert values["held_out"]["taken"][-1] == taken


def test_an_encoder_that_decodes_no_prefix_has_one_error(items):
    X, _, model, codes = items
    class Doubling:
        n_clusters = [16] * 3
        def decode(self, codes): return model.decode(codes) * 2
    error = report(X, codes, Doubling()).values["error"]
    assert "relative_mse_per_level" not in error and error["relative_mse"] > .5


def test_held_out_codes_may_be_new_where_sizes_are_guessed():
    values = report(None, [[0, 0], [1, 1]], held_out=(None, [[2, 0]])).values
    assert values["n_clusters"] == [3, 2] and values["held_out"]["taken"] == [0, 0]
    with pytest.raises(DataError, match="n_clusters=2 ends at 1"):
        report(None, [[0, 0], [1, 1]], held_out=(None, [[2, 0]]), n_clusters=2)


def test_gaps_are_of_measures_only(items):
    X, held_out, model, codes = items
    gaps = report(X, codes, model, held_out=held_out).values["gaps"]
    assert "recall" in gaps["retrieval"] and not {"k", "n_queries"} & {*gaps["retrieval"]}


# drift

@quick
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_no_names_keep_more_items(seed, n_old, n_new):
    overlap = np.random.default_rng(seed).integers(0, 4, (n_old, n_new))
    names = _best_names(overlap)
    kept = sum(overlap[old, new] for new, old in enumerate(names) if old >= 0)
    few, many = (overlap, overlap.T)[n_old > n_new], max(n_old, n_new)
    best = max(sum(few[i, j] for i, j in enumerate(chosen)) for chosen in permutations(range(many), len(few)))
    assert kept == best
    assert len({*names[names >= 0]}) == (names >= 0).sum() == min(n_old, n_new)


@quick
@given(seeds, st.integers(1, 60), st.integers(1, 3), st.integers(1, 6))
def test_codebooks_in_another_order_have_no_churn(seed, n, levels, k_codes):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, k_codes, (n, levels))
    other = np.stack([rng.permutation(k_codes)[column] for column in codes.T], axis=1)
    mixed, ids = rng.permutation(n), np.arange(n)
    for match in ("items", "tree"):
        drift = compare((codes, ids), (other[mixed], ids[mixed]), match=match)
        assert drift.values["churn"]["prefix_after"] == [0] * levels
        assert drift.values["n_moved"] == (codes != other).any(1).sum()
        assert set(drift.values["reasons"]) <= {"relabelled"}


def test_each_level_keeps_as_many_prefixes_as_any_names_could():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 3, (2, 40, 2))
        names, agree = _names_by_items(a, b, [3, 3], [3, 3])
        first = [np.array(p) for p in permutations(range(3))]
        assert agree[:, 0].sum() == max((p[b[:, 0]] == a[:, 0]).sum() for p in first)
        assert agree[:, 1].sum() == max((agree[:, 0] & (p[b[:, 1]] == a[:, 1])).sum() for p in first)


def changed(model, **books):
    model = copy.deepcopy(model)
    model.codebooks_ = [np.array(books.get(f"level{i}", book)) for i, book in enumerate(model.codebooks_)]
    return model


@pytest.mark.parametrize("implementation", ["kmeans", "constrained"])
def test_planted_changes_are_found_with_their_reason(items, implementation):
    X = items[0]
    then = RQKMeans(3, 16, implementation=implementation, slack=.5, random_state=0).fit(X)
    ids, codes = np.arange(700), then.encode(X)
    mirrored = X.copy()
    mirrored[[5, 50, 500]] *= -1
    moved = compare((codes, ids), (then.encode(mirrored), ids), then, then, X, mirrored)
    assert moved.values["reasons"] == {"vector": 3} and moved.moved["id"].to_pylist() == ["5", "50", "500"]
    assert (moved.moved["margin_new"].to_numpy() >= 0).all()
    book = then.codebooks_[1].copy()
    book[3] += .3
    now = changed(then, level1=book)
    moved = compare((codes, ids), (now.encode(X), ids), then, now, X, X, match="centroids")
    assert set(moved.values["reasons"]) == {"codebook"}
    left = moved.moved.filter(pc.equal(moved.moved["level"], 2))
    assert len(left) and moved.values["churn"]["prefix_after"][0] == 0
    assert (moved.moved["margin_old"].to_numpy() >= -1e-6).all()
    assert (moved.moved["margin_new"].to_numpy() >= -1e-6).all()
    both = compare((codes, ids), (now.encode(mirrored), ids), then, now, X, mirrored, match="centroids")
    assert set(both.values["reasons"]) <= {"codebook", "vector", "both"}
    assert both.values["reasons"]["vector"] >= 1


def test_margins_are_differences_of_squared_distances():
    X = np.array([[0.], [1.], [9.], [10.], [4.]], np.float32)
    then = RQKMeans(1, 2, random_state=0).fit(X[:4])
    low = int(then.encode(X[:1])[0, 0])
    book = then.codebooks_[0].copy()
    book[low] = -2
    now, ids = changed(then, level0=book), list("abcde")
    row, = compare((then.encode(X), ids), (now.encode(X), ids), then, now, X, X).moved.to_pylist()
    assert row["id"] == "e" and row["reason"] == "codebook" and row["level"] == 1
    assert row["margin_old"] == pytest.approx((9.5 - 4)**2 - (4 - .5)**2)
    assert row["margin_new"] == pytest.approx((4 + 2)**2 - (9.5 - 4)**2)


def test_items_that_come_and_go_and_published_ids():
    old = pa.table({"id": list("abcd"), "codes": [[0, 1]] * 2 + [[1, 0], [1, 1]],
                    "unique_id": ["0-1", "0-1-1", "1-0", "1-1"]})
    new = pa.table({"id": list("dbce"), "codes": [[1, 1], [0, 1], [1, 0], [0, 0]],
                    "unique_id": ["1-1", "0-1", "1-0", "0-0"]})
    drift = compare(old, new)
    assert (drift.added.to_pylist(), drift.removed.to_pylist()) == (["e"], ["a"])
    row, = drift.moved.to_pylist()
    assert (row["id"], row["reason"], row["level"]) == ("b", "suffix", None)
    assert (row["old_unique_id"], row["new_unique_id"]) == ("0-1-1", "0-1")
    assert drift.values["unique_id_churn"] == 1 / 3 and drift.values["churn"]["prefix_before"] == [0, 0]


def test_a_larger_codebook_has_numbers_without_an_old_name(items):
    X, _, then, codes = items
    now = changed(then, level0=np.concatenate([then.codebooks_[0], X[:4]]))
    ids = np.arange(700)
    for match in ("items", "centroids"):
        drift = compare((codes, ids), (now.encode(X), ids), then, now, X, X, match=match)
        assert drift.names[0].tolist() == [*range(16), *[-1] * 4]
        new_home = now.encode(X)[:, 0] >= 16
        assert drift.values["churn"]["prefix_after"][0] == pytest.approx(new_home.mean())
        named = np.array(drift.moved["new_codes_in_old_names"].to_pylist())
        assert (named[:, 0] == -1).sum() == new_home.sum()
        assert set(drift.values["reasons"]) <= {"codebook", "relocated"}


@pytest.mark.parametrize("call, error, words", [
    (lambda a: compare(a, (a[0][:, :1], a[1])), ShapeMismatchError, "2 and of 1 levels"),
    (lambda a: compare(a, (a[0], [5, 6, 7])), DataError, "no item in common"),
    (lambda a: compare(a, (a[0], [1, 1, 2])), DataError, "ids twice"),
    (lambda a: compare(a, a, match="centroids"), ConfigError, "both encoders"),
    (lambda a: compare(a, a, old_vectors=a[0]), ConfigError, "of both versions"),
    (lambda a: report(None, a[0], pairs=[[0, 3]]), DataError, "there are 3 codes"),
    (lambda a: report(None, a[0], labels=[1]), ShapeMismatchError, "give one a code"),
    (lambda a: report(None, a[0], n_clusters=[2]), ShapeMismatchError, "2 levels"),
    (lambda a: report(a[0] * np.nan, a[0]), DataError, "NaN"),
])
def test_bad_input_is_refused_with_a_sentence(call, error, words):
    with pytest.raises(error, match=words): call((np.array([[0, 0], [0, 1], [1, 1]]), [1, 2, 3]))
