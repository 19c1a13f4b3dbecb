"""Metrics against brute force: all orders enumerated, tie-aware NDCG of sklearn, dictionaries, float64."""
import json
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import ndcg_score

from semid.config import ConfigError, DataError, ShapeMismatchError
from semid.semantic_ids import metrics as M
from semid.semantic_ids import neighbours

seeds = st.integers(0, 2**32 - 1)
metrics = st.sampled_from(["hierarchical", "hamming"])
dtypes = st.sampled_from([np.float16, np.float32, np.float64])
kinds = st.sampled_from("plain offset huge tiny outlier spread duplicates constant grid".split())
quick = settings(max_examples=60, deadline=None)


def random_case(seed, n, d=2, levels=3, k_codes=2, grid=3):
    "Vectors on a coarse grid (many equal distances, some duplicates) and random codes."
    rng = np.random.default_rng(seed)
    return rng.integers(0, grid, (n, d)).astype(np.float32), rng.integers(0, k_codes, (n, levels))


def distances_from(X, q):
    return ((X.astype(np.float64) - X[q].astype(np.float64)) ** 2).sum(1)


def code_distances_from(codes, q, metric):
    def hierarchical(a, b):
        common = 0
        while common < len(a) and a[common] == b[common]: common += 1
        return len(a) - common
    hamming = lambda a, b: sum(x != y for x, y in zip(a, b))
    return [(hierarchical if metric == "hierarchical" else hamming)(codes[q], c) for c in codes]


def gains_from(X, q, k):
    "The stated rule, rank by rank: {item: gain} of the relevant items of query q."
    d = distances_from(X, q)
    others = sorted((i for i in range(len(X)) if i != q), key=lambda i: d[i])
    gains = {}
    for i in others:
        ranks = [r for r, j in enumerate(others) if d[j] == d[i] and r < k]
        if ranks: gains[i] = float(np.mean([k - r for r in ranks]))
    return gains


def by_enumeration(X, codes, q, k, metric):
    "Mean recall and NDCG of query q over all orders that its code distances allow."
    gains, distance = gains_from(X, q, k), code_distances_from(codes, q, metric)
    discount = 1 / np.log2(np.arange(2, k + 2))
    best = sum(g * d for g, d in zip(sorted(gains.values(), reverse=True), discount))
    recall, ndcg = [], []
    for order in permutations(i for i in range(len(X)) if i != q):
        along = [distance[i] for i in order]
        if along != sorted(along): continue
        recall.append(sum(i in gains for i in order[:k]) / k)
        ndcg.append(sum(gains.get(i, 0) * d for i, d in zip(order, discount)) / best)
    return np.mean(recall), np.mean(ndcg)


@quick
@given(seeds, st.integers(3, 6), metrics, st.data())
def test_scores_are_the_mean_over_all_orders(seed, n, metric, data):
    X, codes = random_case(seed, n)
    k = data.draw(st.integers(1, n - 1))
    want = np.mean([by_enumeration(X, codes, q, k, metric) for q in range(n)], axis=0)
    got = M.recall_at_k(X, codes, k, metric=metric), M.ndcg_at_k(X, codes, k, metric=metric)
    np.testing.assert_allclose(got, want, atol=1e-12)


@quick
@given(seeds, st.integers(12, 60), st.integers(1, 11), metrics)
def test_ndcg_agrees_with_sklearn(seed, n, k, metric):
    X, codes = random_case(seed, n, d=3, k_codes=3)
    truth, score = np.zeros((n, n - 1)), np.zeros((n, n - 1))
    for q in range(n):
        gains, distance = gains_from(X, q, k), code_distances_from(codes, q, metric)
        others = [i for i in range(n) if i != q]
        truth[q], score[q] = [gains.get(i, 0) for i in others], [-distance[i] for i in others]
    assert M.ndcg_at_k(X, codes, k, metric=metric) == pytest.approx(ndcg_score(truth, score, k=k), abs=1e-9)


def test_recall_agrees_with_random_tie_breaking():
    X, codes = random_case(5, 80, d=3, k_codes=3, grid=4)
    rng, k, hits = np.random.default_rng(0), 10, []
    for q in range(80):
        gains, distance = gains_from(X, q, k), np.array(code_distances_from(codes, q, "hierarchical"), float)
        distance[q] = np.inf
        for _ in range(300):
            order = np.lexsort([rng.random(80), distance])[:k]
            hits.append(sum(i in gains for i in order) / k)
    assert M.recall_at_k(X, codes, k) == pytest.approx(np.mean(hits), abs=4 * np.std(hits) / len(hits) ** .5)


def test_without_ties_they_are_the_textbook_formulas():
    rng = np.random.default_rng(2)
    X = rng.normal(size=(40, 5))
    codes = np.ones((40, 60), int)  # prefix distances that are all different, seen from item 0
    for i in range(40): codes[i, 40 - i:] = i
    k, d = 7, distances_from(X, 0)
    true = [i for i in np.argsort(d) if i != 0][:k]
    found = [i for i in M.find_similar(codes, 0, k)[0]]
    near = M.nearest_neighbours(X, k)
    row = list(near.queries).index(0)
    query = np.repeat(near.queries, np.diff(near.offsets))
    distance = M.hierarchical_distance(codes[query], codes[near.items])
    sizes = neighbours._group_sizes(codes, near.queries, "hierarchical")
    hit, gain = neighbours._expected(near, sizes, distance)
    assert hit[row].sum() == len(set(true) & set(found))
    assert list(gain[row]) == [k - true.index(i) if i in true else 0 for i in found]


@quick
@given(seeds, st.integers(2, 8), st.integers(2, 12), dtypes, st.data())
def test_clusters_of_duplicates_with_their_own_code_score_exactly_one(seed, n_clusters, size, dtype, data):
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, size - 1))
    cluster = rng.permutation(np.repeat(np.arange(n_clusters), size))
    X = rng.normal(size=(n_clusters, 5)).astype(dtype)[cluster]
    codes = np.stack([cluster, np.zeros_like(cluster)], 1)
    for metric in ("hierarchical", "hamming"):
        assert M.recall_at_k(X, codes, k, metric=metric) == 1.0
        assert M.ndcg_at_k(X, codes, k, metric=metric) == 1.0


@quick
@given(seeds, st.integers(3, 60), st.data())
def test_codes_that_rank_like_the_vectors_score_exactly_one(seed, n, data):
    "Vectors in a tree: a coordinate for every prefix, heavier at the top, so both distances order alike."
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (n, 3))
    columns = []
    for length, weight in ((1, 4), (2, 2), (3, 1)):
        nodes = np.unique(codes[:, :length], axis=0, return_inverse=True)[1].ravel()
        columns.append(weight * np.eye(nodes.max() + 1)[nodes])
    X, k = np.concatenate(columns, axis=1), data.draw(st.integers(1, n - 1))
    assert M.recall_at_k(X, codes, k) == M.ndcg_at_k(X, codes, k) == 1.0


@quick
@given(seeds, st.integers(12, 60), metrics)
def test_the_order_of_the_items_does_not_matter(seed, n, metric):
    X, codes = random_case(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    for score in (M.recall_at_k, M.ndcg_at_k):
        before, after = score(X, codes, 5, metric=metric), score(X[order], codes[order], 5, metric=metric)
        assert 0 <= before <= 1 and after == pytest.approx(before, abs=1e-12)


@quick
@given(seeds, st.integers(2, 300), st.integers(1, 40), dtypes, kinds, st.data())
def test_neighbours_are_those_of_float64(seed, n, d, dtype, kind, data):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    top = 1e3 if dtype == np.float16 else 1e30
    if kind == "offset": X = X * 1e-3 + 1e3
    elif kind == "huge": X = X * top
    elif kind == "tiny": X = X / top
    elif kind == "outlier": X[0] = top
    elif kind == "spread": X = X * np.logspace(-3, 3, n)[:, None]
    elif kind == "duplicates": X = X[rng.integers(0, max(1, n // 5), n)]
    elif kind == "constant": X = X * 0 + 1
    elif kind == "grid": X = X.round()
    X, k = X.astype(dtype), data.draw(st.integers(1, n - 1))
    near = M.nearest_neighbours(X, k, sample_size=20, seed=seed)
    for row, q in enumerate(near.queries):
        items = near.items[near.offsets[row]:near.offsets[row + 1]]
        # the same float64 sum, term by term, so that equal means equal
        distance = np.zeros(n)
        for column in X.T.astype(np.float64): distance += (column - column[q]) ** 2
        distance[q] = np.inf
        assert set(items) == set(np.flatnonzero(distance <= np.sort(distance)[k - 1]))
        assert (np.diff(distance[items]) >= 0).all() and len(items) >= k


def test_gains_of_ties():
    line = np.array([[0.], [1.], [2.], [2.], [2.], [5.]])
    near = M.nearest_neighbours(line, 3)
    row = list(near.queries).index(0)
    found = slice(near.offsets[row], near.offsets[row + 1])
    assert dict(zip(near.items[found].tolist(), near.gain[found].tolist())) == {1: 3, 2: 1.5, 3: 1.5, 4: 1.5}


@quick
@given(seeds, st.integers(1, 80), st.integers(1, 5), st.sampled_from([1, 2, 9, 2**40]),
       st.sampled_from([np.int16, np.int32, np.int64]))
def test_counts_agree_with_a_dictionary(seed, n, levels, k_codes, dtype):
    k_codes = min(k_codes, np.iinfo(dtype).max)
    codes = (np.random.default_rng(seed).integers(0, k_codes, (n, levels)) - k_codes // 2).astype(dtype)
    codes = codes[np.random.default_rng(seed).integers(0, n, n)]
    for length in range(1, levels + 1):
        buckets = Counter(map(tuple, codes[:, :length].tolist()))
        assert M.collision_rate_per_level(codes)[length - 1] == 1 - len(buckets) / n
        shared = sum(c for c in buckets.values() if c > 1)
        assert M.items_in_collision_per_level(codes)[length - 1] == shared / n
    assert M.largest_bucket(codes) == max(buckets.values())
    sizes = np.array(list(buckets.values()))
    spread = np.abs(sizes[:, None] - sizes).mean() / (2 * sizes.mean())  # half the relative mean difference
    assert M.gini(codes) == pytest.approx(spread, abs=1e-12)


@quick
@given(seeds, st.integers(1, 200), st.integers(1, 4), st.integers(1, 12))
def test_use_of_the_codebooks(seed, n, levels, k_codes):
    codes = np.random.default_rng(seed).integers(0, k_codes, (n, levels))
    counts = [np.bincount(column, minlength=k_codes) for column in codes.T]
    assert M.code_utilization_per_level(codes, k_codes) == [np.count_nonzero(c) / k_codes for c in counts]
    np.testing.assert_allclose(M.code_entropy_per_level(codes), [entropy(c) for c in counts], atol=1e-12)
    np.testing.assert_allclose(M.perplexity_per_level(codes), np.exp([entropy(c) for c in counts]))
    assert all(1 <= p <= k_codes + 1e-9 for p in M.perplexity_per_level(codes))


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 4), metrics)
def test_group_sizes_and_distances(seed, n, levels, metric):
    codes = np.random.default_rng(seed).integers(0, 3, (n, levels))
    sizes = neighbours._group_sizes(codes, np.arange(n), metric)
    for q in range(n):
        distance = code_distances_from(codes, q, metric)
        assert neighbours.code_distance(codes[q], codes, metric).tolist() == distance
        others = [d for i, d in enumerate(distance) if i != q]
        assert sizes[q].tolist() == np.bincount(others, minlength=levels + 1).tolist()


@quick
@given(seeds, st.integers(1, 40), st.integers(0, 50))
def test_find_similar_is_a_stable_sort(seed, n, k):
    codes = np.random.default_rng(seed).integers(0, 2, (n, 3))
    distance = code_distances_from(codes, n - 1, "hierarchical")
    want = sorted(range(n - 1), key=lambda i: (distance[i], i))[:k]
    items, far = M.find_similar(codes, n - 1, k)
    assert items.tolist() == want and far.tolist() == [distance[i] for i in want]
    everything = sorted(range(n), key=lambda i: (distance[i], i))
    assert M.find_similar(codes, codes[n - 1], n)[0].tolist() == everything


@quick
@given(seeds, st.integers(2, 60), st.integers(1, 12))
def test_the_report_is_plain_json_and_repeats_itself(seed, n, k):
    X, codes = random_case(seed, n, d=3)
    report = M.evaluate(X, codes, k=k, seed=3)
    assert json.loads(json.dumps(report, allow_nan=False)) == report == M.evaluate(X, codes, k=k, seed=3)
    assert (f"recall_at_{k}" in report) == (k < n)


class Halves:
    "Codes by the signs of the first coordinates; decodes to plus or minus one."
    def __init__(self, **attributes): self.__dict__ |= attributes
    def encode(self, X): return (np.asarray(X)[:, :2] > 0).astype(np.int32)
    def decode(self, codes): return np.concatenate([2. * codes - 1, codes * 0], axis=1)


def test_errors_of_an_encoder_that_decodes():
    X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    encoder = Halves(n_clusters=[2, 4, 8])
    report = M.evaluate(X, encoder.encode(X), encoder, X_heldout=X[:9] * 2)
    error = (X.astype(float) - encoder.decode(encoder.encode(X))) ** 2
    assert report["quantization_mse"] == pytest.approx(error.mean())
    assert report["relative_mse"] == pytest.approx(error.sum() / (X.astype(float) ** 2).sum())
    assert report["code_utilization_per_level"] == [1.0, 0.5]
    assert report["heldout"]["n_samples"] == 9 and report["heldout"]["taken_by_training"] == 1.0
    unseen = M.evaluate(X[X[:, 0] > 0], encoder.encode(X[X[:, 0] > 0]), encoder, k=3, X_heldout=X)
    assert unseen["heldout"]["taken_by_training"] == (X[:, 0] > 0).mean()


def test_cosine_encoders_are_judged_on_unit_vectors():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(60, 4))
    unit, encoder = X / np.linalg.norm(X, axis=1, keepdims=True), Halves(metric="cosine")
    stretched = M.evaluate(X * rng.uniform(.1, 9, (60, 1)), encoder.encode(X), encoder)
    plain = M.evaluate(unit.astype(np.float32), encoder.encode(X), Halves())
    assert stretched["recall_at_10"] == plain["recall_at_10"]
    assert stretched["relative_mse"] == pytest.approx(plain["relative_mse"], rel=1e-6)


def test_shared_neighbours_change_nothing():
    X, codes = random_case(0, 90, d=4)
    assert M.evaluate(X, codes, neighbours=M.nearest_neighbours(X)) == M.evaluate(X, codes)
    with pytest.raises(ShapeMismatchError, match="need N=89"):
        M.evaluate(X[1:], codes[1:], neighbours=M.nearest_neighbours(X))


@pytest.mark.parametrize("call, error, words", [
    (lambda X, c: M.recall_at_k(X[:5], c[:5], k=10), ValueError, "k=10 must be less than N=5"),
    (lambda X, c: M.ndcg_at_k(X[:5], c[:5], k=10), ValueError, "k=10 must be less than N=5"),
    (lambda X, c: M.recall_at_k(X, c[:5]), ShapeMismatchError, "one code a vector"),
    (lambda X, c: M.evaluate(X[:0], c[:0]), ShapeMismatchError, "N, D >= 1"),
    (lambda X, c: M.collision_rate_per_level(c[:0]), ShapeMismatchError, "N, L >= 1"),
    (lambda X, c: M.collision_rate_per_level(c[0]), ShapeMismatchError, r"\(N, L\)"),
    (lambda X, c: M.recall_at_k(X, c, metric="cosine"), ConfigError, "'hierarchical' or 'hamming'"),
    (lambda X, c: M.recall_at_k(X, c, k=0), ConfigError, "at least 1"),
    (lambda X, c: M.recall_at_k(X * np.nan, c), DataError, "NaN or Inf"),
    (lambda X, c: M.gini(c.astype(float)), DataError, "must be integers"),
    (lambda X, c: M.code_utilization_per_level(c, [4]), ShapeMismatchError, "3 levels"),
    (lambda X, c: M.code_utilization_per_level(c, 1), DataError, "n_clusters=1"),
    (lambda X, c: M.relative_mse(X, X[:1]), ShapeMismatchError, "must match"),
    (lambda X, c: M.evaluate(X, c, X_heldout=X), ConfigError, "needs an encoder"),
    (lambda X, c: M.evaluate(X, c, Halves(), X_heldout=X), ShapeMismatchError, "must match|2 levels"),
])
def test_bad_input_is_refused_with_a_sentence(call, error, words):
    with pytest.raises(error, match=words): call(*random_case(3, 30, d=4))
