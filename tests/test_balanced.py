"Balanced clusters: bounds hold, nothing is cheaper, and the prices prove it, whatever the data."
import hashlib, json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import real_data
from hypothesis import given, settings, strategies as st
from safetensors import numpy as safetensors
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array, vstack
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import semid
from semid import KMeans, KMeansInference, RQKMeans, SemanticDeduplicator, read_features, write_features
from semid.clustering.balanced import (BalancedKMeans, assign_costs_with_bounds, assign_with_bounds,
                                       optimality_gap)
from semid.clustering.mapping import assign_parquet
from semid.clustering.nearest import Codebooks, nearest
from semid.clustering.pairs import nearest_buckets
from semid.config import (ConfigError, DataError, ModelFormatError, NotFittedError, SemidError,
                          ShapeMismatchError)

thorough = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def distances(X, C):
    X, C = np.asarray(X, np.float64), np.asarray(C, np.float64)
    return (X * X).sum(1)[:, None] - 2 * X @ C.T + (C * C).sum(1)


def certify(costs, labels, prices, low, high, tolerance=1e-9):
    "Sizes within bounds, every item where cost + price is least, prices only where sizes are at a bound."
    costs = np.asarray(costs, np.float64)
    sizes, scale = np.bincount(labels, minlength=costs.shape[1]), np.abs(costs).max() or 1
    assert low <= sizes.min() and sizes.max() <= high
    priced = costs + prices
    assert (priced[np.arange(len(costs)), labels] - priced.min(1)).max() <= tolerance * scale
    if low < high:
        assert (sizes[prices > tolerance * scale] == high).all()
        assert (sizes[prices < -tolerance * scale] == low).all()


def least_cost(costs, low, high):
    "The least cost within bounds, by linear programming."
    n, K = costs.shape
    each, of = np.repeat(np.arange(n), K), np.tile(np.arange(K), n)
    one = csr_array((np.ones(n * K), (each, np.arange(n * K))))
    load = csr_array((np.ones(n * K), (of, np.arange(n * K))))
    found = linprog(costs.ravel(), A_ub=vstack([load, -load]), b_ub=np.repeat([high, -low], K), A_eq=one,
                    b_eq=np.ones(n), bounds=(0, 1))
    return found.fun


@thorough
@given(seeds, st.integers(1, 60), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1),
       st.sampled_from(["normal", "grid", "equal", "wide", "duplicates", "columns"]))
def test_any_costs(seed, n, K, slack_down, slack_up, kind):
    rng = np.random.default_rng(seed)
    costs = rng.normal(size=(n, K))
    if kind == "grid": costs = rng.integers(0, 3, (n, K))
    if kind == "equal": costs = np.zeros((n, K))
    if kind == "wide": costs = costs * 10.0 ** rng.integers(-12, 12, (n, 1))
    if kind == "duplicates": costs = costs[rng.integers(0, max(1, n // 10), n)]
    if kind == "columns": costs = costs[:, rng.integers(0, K, K)]
    low, high = int(n // K * slack_down), -(-n // K) + int(n * slack_up)
    labels, prices = assign_costs_with_bounds(costs, low, high)
    certify(costs, labels, prices, low, min(high, n))
    assert labels.dtype == np.int32 and len(labels) == n and np.isfinite(prices).all()
    cost, least = costs[np.arange(n), labels].sum(), least_cost(costs, low, min(high, n))
    assert cost <= least + 1e-6 * np.abs(costs).sum() * (1e-3 if kind == "wide" else 1)


@thorough
@given(seeds, st.integers(1, 20), st.integers(1, 6))
def test_equal_sizes_cost_what_the_hungarian_method_says(seed, K, size):
    costs = np.random.default_rng(seed).normal(size=(K * size, K))
    labels, prices = assign_costs_with_bounds(costs, size, size)
    wide = np.repeat(costs, size, axis=1)
    least = wide[linear_sum_assignment(wide)].sum()
    assert costs[np.arange(len(costs)), labels].sum() == pytest.approx(least, rel=1e-9, abs=1e-9)
    assert abs(optimality_gap(costs, labels, prices, size, size)) < 1e-9


def blobs(seed, n=3000, dim=8, k=40, spread=0.4):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(k, dim))[rng.choice(k, n, p=rng.dirichlet(np.full(k, 0.7)))]
    return (X + rng.normal(0, spread, (n, dim))).astype(np.float32)


@pytest.mark.parametrize("bounds", [(None, None), (50, 200), (0, 110), (90, None), (99, 101), (60, 100)])
@pytest.mark.parametrize("K", [30, 7])
def test_points(bounds, K):
    X = blobs(K)
    C = KMeans(K, random_state=0, max_iter=4).fit(X).cluster_centers_
    if K == 7: bounds = tuple(b and round(b * 30 / 7 + 0.5) for b in bounds)
    labels, prices = assign_with_bounds(X, C, *bounds)
    low, high = (len(X) // K, -(-len(X) // K)) if bounds == (None, None) else bounds
    low, high = low or 0, high or len(X)
    certify(distances(X, C), labels, prices, low, high)
    assert abs(optimality_gap(distances(X, C), labels, prices, low, high)) < 1e-6
    from_costs, _ = assign_costs_with_bounds(distances(X, C), low, high)
    assert (labels == from_costs).all()
    for n_threads in (1, 2, 5):
        again = assign_with_bounds(X, C, *bounds, n_threads=n_threads)
        assert (again[0] == labels).all() and (again[1] == prices).all()


@pytest.mark.parametrize("scale", [1e-3, 1e-18, 1e15, 2.0**-60])
def test_scale_changes_nothing(scale):
    X = blobs(1)
    C = X[:50]
    labels, prices = assign_with_bounds(X, C)
    scaled, others = assign_with_bounds(X * np.float32(scale), C * np.float32(scale))
    assert (scaled == labels).all()
    assert np.allclose(others / scale**2, prices, rtol=1e-3, atol=1e-3 * np.abs(prices).max())


def test_shift_changes_nothing():
    X = np.round(blobs(2) * 256) / 256
    moved, costs = X + np.float32(512), distances(X, X[:50])
    assert (assign_with_bounds(moved, moved[:50])[0] == assign_with_bounds(X, X[:50])[0]).all()
    shifts = np.random.default_rng(0).normal(size=(len(X), 1))
    assert (assign_costs_with_bounds(costs + shifts)[0] == assign_costs_with_bounds(costs)[0]).all()


def test_loose_bounds_are_the_nearest_centroids_at_no_price():
    X = blobs(3)
    labels, prices = assign_with_bounds(X, X[:50], 0, len(X))
    assert (labels == nearest(X, X[:50])).all() and (prices == 0).all()


@pytest.mark.parametrize("distinct", [1, 2, 40, 300])
@pytest.mark.parametrize("bounds", [(None, None), (0, 120), (80, 2000)])
def test_heavy_duplicates(distinct, bounds):
    rng = np.random.default_rng(distinct)
    X = blobs(4, n=distinct)[rng.integers(0, distinct, 4000)]
    C = blobs(5, n=50)
    labels, prices = assign_with_bounds(X, C, *bounds)
    low, high = (80, 80) if bounds == (None, None) else bounds
    certify(distances(X, C), labels, prices, low, high)


def test_hardly_different_points():
    X = (1 + 1e-6 * np.random.default_rng(0).normal(size=(3000, 5))).astype(np.float32)
    C = blobs(5, dim=5, n=30)
    labels, prices = assign_with_bounds(X, C)
    certify(distances(X, C), labels, prices, 100, 100, 1e-8)


def test_far_too_large_clusters_and_empty_ones():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(5000, 4)).astype(np.float32)
    C = np.concatenate([rng.normal(size=(1, 4)), rng.normal(size=(63, 4)) + 40]).astype(np.float32)
    for low, high in ((78, 79), (0, 400), (50, 5000)):
        labels, prices = assign_with_bounds(X, C, low, high)
        certify(distances(X, C), labels, prices, low, high)


@pytest.mark.parametrize("bounds, words", [
    ((11, 20), "100 items don't fit into 10 clusters of 11 to 20"), ((0, 9), "these hold 0 to 90"),
    ((12, 9), "size_min <= size_max"), ((-1, 20), "0 <= size_min"), ((9.5, 20), "whole numbers"),
])
def test_impossible_bounds(bounds, words):
    X = blobs(0, n=100)
    calls = [lambda: assign_with_bounds(X, X[:10], *bounds), lambda: BalancedKMeans(10, *bounds).fit(X),
             lambda: assign_costs_with_bounds(distances(X, X[:10]), *bounds)]
    for call in calls:
        with pytest.raises(ConfigError, match=words): call()


X = blobs(9, n=200)


@pytest.mark.parametrize("call, error, words", [
    (lambda: assign_with_bounds(X, X[:5, :3]), ShapeMismatchError, "D=3"),
    (lambda: assign_with_bounds(np.where(X > 1, np.nan, X), X[:5]), DataError, "NaN"),
    (lambda: assign_with_bounds(X, np.full((5, 8), np.inf)), DataError, "Inf"),
    (lambda: assign_costs_with_bounds(X[0]), ShapeMismatchError, "matrix"),
    (lambda: assign_costs_with_bounds([["a"]]), ShapeMismatchError, "matrix"),
    (lambda: assign_costs_with_bounds(np.full((4, 2), np.nan)), DataError, "NaN"),
    (lambda: BalancedKMeans(3).predict(X), NotFittedError, "not fitted"),
    (lambda: BalancedKMeans(3, metric="dot"), ConfigError, "l2 or cosine"),
    (lambda: BalancedKMeans(201).fit(X), ShapeMismatchError, "n_samples=200"),
    (lambda: RQKMeans(2, 4, slack=-1), ConfigError, "slack"),
    (lambda: RQKMeans(2, 4, solver="simplex"), ConfigError, "exact or k-means-constrained"),
])
def test_bad_use(call, error, words):
    with pytest.raises(error, match=words) as e: call()
    assert isinstance(e.value, SemidError)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("bounds", [(None, None), (30, 150)])
def test_a_fit_belongs_to_its_centroids(metric, bounds):
    X = blobs(10)
    model = BalancedKMeans(40, *bounds, metric=metric, random_state=0).fit(X)
    rows = X / np.linalg.norm(X, axis=1, keepdims=True) if metric == "cosine" else X
    costs = distances(rows, model.cluster_centers_)
    certify(costs, model.labels_, model.prices_, *((75, 75) if bounds == (None, None) else bounds), 1e-6)
    assert model.inertia_ == pytest.approx(costs[np.arange(len(X)), model.labels_].sum(), rel=1e-5)
    assert (model.predict(X) == model.labels_).mean() > 0.999
    assert (model.predict(X, prices=False) == nearest(rows, model.cluster_centers_)).mean() > 0.999
    assert model.transform(X).shape == (3000, 40)
    for n_threads in (1, 3):
        again = BalancedKMeans(40, *bounds, metric=metric, random_state=0, n_threads=n_threads).fit(X)
        for name in ("cluster_centers_", "labels_", "prices_"):
            assert (getattr(again, name) == getattr(model, name)).all()


def test_lloyd_improves_and_starts_are_compared():
    X = blobs(11)
    one, many = (BalancedKMeans(20, random_state=0, max_iter=n).fit(X).inertia_ for n in (1, 50))
    assert many < one
    assert BalancedKMeans(20, random_state=0, n_init=4).fit(X).inertia_ <= many
    given = BalancedKMeans(20, init=X[:20], random_state=0).fit(X)
    assert (np.bincount(given.labels_) == 150).all()
    assert (BalancedKMeans(20, init="random", random_state=0, verbose=True).fit_predict(X) < 20).all()


def test_prices_keep_the_balance_of_new_items():
    X, rng = blobs(12, n=12_000), np.random.default_rng(0)
    seen, new = X[::2], X[1::2]
    model = BalancedKMeans(30, random_state=0).fit(seen)
    sizes = [np.bincount(model.predict(new, prices=p), minlength=30) for p in (True, False)]
    off = [np.abs(s - 200).mean() for s in sizes]
    assert off[0] < 30 and off[0] < off[1] / 2
    order = rng.permutation(len(new))
    assert (model.predict(new)[order] == model.predict(new[order])).all()


@pytest.mark.parametrize("seed", range(20))
def test_never_costlier_than_k_means_constrained(seed):
    library = pytest.importorskip("k_means_constrained.k_means_constrained_")
    rng = np.random.default_rng(seed)
    n, K = int(rng.integers(50, 400)), int(rng.integers(2, 25))
    X = blobs(seed, n=n)
    C, slack = X[rng.choice(n, K, replace=False)], rng.choice([0, 0.3, 0.8])
    low, high = int(n // K * (1 - slack)), int(-(-n // K) * (1 + slack))
    theirs, _ = library._labels_constrained(X.astype(float), C.astype(float), low, high, np.empty(n))
    for costs in (distances(X, C), np.sqrt(np.maximum(distances(X, C), 0))):  # it minimises the latter
        ours, _ = assign_costs_with_bounds(costs, low, high)
        assert costs[np.arange(n), ours].sum() <= costs[np.arange(n), theirs].sum() * (1 + 1e-9)


@pytest.mark.parametrize("name", ["beauty", "instruments", "yelp"])
def test_real_items(name):
    X = np.asarray(read_features(real_data(f"sasrec_{name}.parquet"))[1], np.float32)
    C = KMeans(256, random_state=0, max_iter=5).fit(X).cluster_centers_
    costs, n = distances(X, C), len(X)
    for low, high in ((n // 256, -(-n // 256)), (n // 512, n * 3 // 512)):
        labels, prices = assign_with_bounds(X, C, low, high)
        certify(costs, labels, prices, low, high)
        assert abs(optimality_gap(costs, labels, prices, low, high)) < 1e-6
        assert (assign_with_bounds(X * np.float32(1e-3), C * np.float32(1e-3), low, high)[0] == labels).all()


def test_balanced_codes(tmp_path):
    X = blobs(13, n=2050)
    train, new = X[:2000], X[2000:]
    model = RQKMeans(3, [16, 10, 7], implementation="constrained", random_state=0).fit(train)
    for level, K in enumerate([16, 10, 7]):
        sizes = np.bincount(model.codes_[:, level], minlength=K)
        assert sizes.min() == 2000 // K and sizes.max() == -(-2000 // K)
    assert (model.encode(train) == model.codes_).all(1).mean() > 0.999
    codes = model.encode(new)
    for model.n_threads, model.backend, batch in ((1, "numpy", 7), (2, "torch", None), (2, "auto", 1)):
        assert (model.encode(new, batch_size=batch) == codes).all()
    model.save(tmp_path / "model")
    loaded = RQKMeans.load(tmp_path / "model")
    assert (loaded.encode(new) == codes).all() and loaded.fingerprint() == model.fingerprint()
    assert (loaded.slack, loaded.solver, loaded.implementation) == (0, "exact", "constrained")
    assert (loaded.prefix(2).encode(new) == codes[:, :2]).all()
    assert (model.prefix(2).codes_ == model.codes_[:, :2]).all()
    assert np.allclose(model.decode(codes), sum(c[k] for c, k in zip(model.codebooks_, codes.T, strict=True)))
    model.prices_ = [p + 1e-3 * np.arange(len(p)) for p in model.prices_]
    assert model.fingerprint() != loaded.fingerprint()


def test_slack_and_solvers_of_codes():
    X = blobs(14, n=600)
    half = RQKMeans(2, 12, implementation="constrained", slack=0.5, random_state=0).fit(X)
    tight = RQKMeans(2, 12, implementation="constrained", random_state=0).fit(X)
    for level in half.codes_.T: assert 25 <= np.bincount(level).min() <= np.bincount(level).max() <= 75
    assert half.score(X)["mse"] < tight.score(X)["mse"]
    pytest.importorskip("k_means_constrained")
    other = RQKMeans(2, 12, implementation="constrained", solver="k-means-constrained", random_state=0).fit(X)
    assert all((np.bincount(level) == 50).all() for level in other.codes_.T)


def test_more_prices_than_levels_are_refused(tmp_path):
    RQKMeans(2, 4, implementation="constrained", random_state=0).fit(X).save(tmp_path)
    with np.load(tmp_path / "codebooks.npz") as z: arrays = dict(z)
    for change in ({"prices_1": np.zeros(3)}, {"prices_1": np.full(4, np.nan)}, {"prices_1": np.ones(4)}):
        np.savez(tmp_path / "codebooks.npz", **arrays | change)
        with pytest.raises(ModelFormatError, match="model|sha256|don't fit"): RQKMeans.load(tmp_path)


def test_scikit_learn_copies_searches_and_chains():
    X = blobs(0, n=300)
    model = BalancedKMeans(6, 10, 90, init=X[:6], tol=0)
    copy = clone(model)
    assert all(np.array_equal(copy.get_params()[name], value) for name, value in model.get_params().items())
    assert repr(copy) == "BalancedKMeans(n_clusters=6, size_min=10, size_max=90, init=<array (6, 8)>, tol=0)"
    with pytest.raises(ConfigError, match="no setting 'sizes'"): copy.set_params(sizes=3)
    plain = make_pipeline(StandardScaler(), KMeans(6, random_state=0)).set_params(kmeans__n_clusters=4)
    assert (plain.fit_predict(X) == plain.fit(X).predict(X)).all() and plain.transform(X).shape == (300, 4)
    chain = make_pipeline(StandardScaler(), BalancedKMeans(6, random_state=0))
    for K in 3, 6, 10:
        labels = clone(chain).set_params(balancedkmeans__n_clusters=K).fit(X).predict(X)
        sizes = np.bincount(chain.set_params(balancedkmeans__n_clusters=K).fit_predict(X))
        assert len(sizes) == K and np.ptp(sizes) <= 1 and labels.max() < K
    assert chain.transform(X).shape == (300, 10)


@pytest.mark.parametrize("settings, says", [
    (dict(n_clusters=3.0), "n_clusters must be a whole number from 1, not 3.0"),
    (dict(n_init="2"), "n_init must be a whole number from 1, not '2'"),
    (dict(random_state=-1), "random_state must be a whole number from 0, not -1"),
    (dict(tol=float("nan")), "tol must be a number from 0, not nan")])
def test_settings_of_the_wrong_type(settings, says):
    with pytest.raises(ConfigError) as refused: BalancedKMeans(**settings)
    assert says in str(refused.value)
    with pytest.raises(ConfigError, match="not '3' and 40"): BalancedKMeans(10, "3", 40).fit(blobs(0, n=100))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_saved_model_has_its_prices(tmp_path, metric):
    X = blobs(21, n=4000)
    seen, new = X[:1000], X[1000:]
    model = BalancedKMeans(30, np.int64(20), 60.0, metric=metric, random_state=np.int64(4)).fit(seen)
    want = model.predict(new)
    assert (want != model.predict(new, prices=False)).any()
    model.save(tmp_path / "m")
    again = BalancedKMeans.load(tmp_path / "m")
    assert (again.predict(new) == want).all() and again.prices_.tobytes() == model.prices_.tobytes()
    assert (again.size_min, again.size_max, again.metric, again.random_state) == (20, 60, metric, 4)
    assert (again.n_iter_, again.inertia_, again.n_samples_) == (model.n_iter_, model.inertia_, 1000)
    for source in dict(model=model), dict(model=again), dict(model_path=tmp_path / "m"):
        for backend in "numpy", "torch", "auto":
            inference = KMeansInference(**source, backend=backend)
            assert (inference.predict(new) == want).all()
        assert [inference.predict_cluster(x) for x in new[:40]] == want[:40].tolist()
    content = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    model.save(tmp_path / "m")
    assert content == {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    with pytest.raises(NotFittedError): BalancedKMeans(3).save(tmp_path / "n")


def test_who_knows_no_prices_takes_no_balanced_model(tmp_path):
    X = blobs(22, n=500)
    BalancedKMeans(7, random_state=0).fit(X).save(tmp_path / "balanced")
    plain = KMeans(7, random_state=0).fit(X)
    plain.save(tmp_path / "plain")
    for cls, name, expected in (KMeans, "balanced", "KMeans"), (BalancedKMeans, "plain", "BalancedKMeans"):
        with pytest.raises(ModelFormatError, match=f"expected {expected}"): cls.load(tmp_path / name)
    with pytest.raises(ConfigError, match="of BalancedKMeans, which is no KMeans model"):
        plain.save(tmp_path / "balanced")
    with pytest.raises(ConfigError, match="of KMeans, which is no BalancedKMeans model"):
        BalancedKMeans(7, random_state=0).fit(X).save(tmp_path / "plain")


def test_a_plain_model_is_written_as_ever(tmp_path):
    model = KMeans(3, random_state=0).fit(blobs(23, n=50))
    model.save(tmp_path)
    C = model.cluster_centers_
    about = {"type": "KMeans", "metric": "l2", "n_clusters": 3, "D": 8, "n_iter": model.n_iter_,
             "inertia": model.inertia_, "n_samples": 50, "seed": 0, "semid_version": semid.__version__,
             "sha256": hashlib.sha256(b"l2 (3, 8)" + C.astype("<f4").tobytes()).hexdigest()}
    text = json.dumps(about, indent=2)
    assert (tmp_path / "metadata.json").read_text() == text + "\n"
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == safetensors.save({"centroids": C}, {"semid": text})


@pytest.mark.parametrize("prices, words", [
    (None, "prices"), (np.zeros(3), "don't fit"), (np.zeros(4, np.float32), "don't fit"),
    (np.full(4, np.nan), "NaN"), (np.zeros(4), "sha256")])
def test_prices_that_do_not_fit_are_refused(tmp_path, prices, words):
    BalancedKMeans(4, random_state=0).fit(blobs(24, n=90)).save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.load(path.read_bytes()) | {"prices": prices}
    if prices is None: del tensors["prices"]
    path.write_bytes(safetensors.save(tensors, {"semid": (tmp_path / "metadata.json").read_text()}))
    for load in BalancedKMeans.load, KMeansInference:
        with pytest.raises(ModelFormatError, match=words): load(tmp_path)


def test_files_and_buckets_are_of_the_priced_clusters(tmp_path):
    X = blobs(25, n=900)
    ids = [f"i{n:04d}" for n in range(900)]
    model = BalancedKMeans(12, random_state=0).fit(X[:300])
    model.save(tmp_path / "m")
    write_features(tmp_path / "f.parquet", ids, X)
    want = model.predict(X)
    assert (want != model.predict(X, prices=False)).any()
    assert assign_parquet(tmp_path / "m", tmp_path / "f.parquet", tmp_path / "out") == 900
    written = pq.read_table(tmp_path / "out" / "assignments")
    assert (written["cluster"].to_numpy() == want).all()
    gaps = np.linalg.norm(X.astype(float) - model.cluster_centers_[want], axis=1)
    assert np.allclose(written["distance"].to_numpy(), gaps, rtol=1e-5)
    for source in model, tmp_path / "m", KMeansInference(tmp_path / "m"):
        for probes in 1, 3:
            found = SemanticDeduplicator(0.99, model=source, probes=probes).deduplicate(X, ids)
            assert (found.items["cluster"].to_numpy() == want).all()
    priced = Codebooks([model.cluster_centers_], prices=[model.prices_])
    order = (distances(X, model.cluster_centers_) + model.prices_).argsort(1)[:, :3]
    assert (nearest_buckets(X, priced, 3) == order).mean() > 0.97  # the others are by int8 forms
