"k-means: oracles, cuts that change nothing, cosine, sampling, early stop, empty clusters, models on disk."
import inspect, json, subprocess, sys

import numpy as np
import pytest
from conftest import blobs
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone, is_clusterer
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.model_selection import GridSearchCV

from semid.clustering.inference import KMeansInference, check_model_room, read_model, train_local
from semid.clustering.kmeans import KMeans, normalise_rows
from semid.clustering.lloyd import Clustered, InMemory, lloyd, sample_rows
from semid.clustering.rows import quantise_rows
from semid.clustering.sums import Survey, exact_sum, gap_steps, ClusterSums, squared_distances
from semid.config import ConfigError, DataError, ModelFormatError, NotFittedError, ShapeMismatchError
from semid.feature_files import write_features

thorough = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@thorough
@given(seeds, st.integers(1, 300), st.integers(1, 70), st.sampled_from([1e-30, 1e-3, 1, 1e18]), st.data())
def test_sums_and_distances_do_not_know_how_rows_are_cut(seed, n, dim, scale, data):
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(n, dim)) * scale).astype(np.float32)
    centroids, labels = X[rng.integers(0, n, 4)], rng.integers(0, 4, n).astype(np.int32)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    order = rng.permutation(n)
    parts = [order[a:b] for a, b in zip(cuts[:-1], cuts[1:])]
    survey, joined = Survey.of(X), Survey.of(X[parts[0]])
    for part in parts[1:]: joined |= Survey.of(X[part])
    assert joined.n == survey.n and (joined.low == survey.low).all() and (joined.high == survey.high).all()
    power = survey.power
    X, centroids, survey = np.ldexp(X, -power), np.ldexp(centroids, -power), survey.scaled(power)
    steps = gap_steps(survey, centroids)
    gaps = squared_distances(X, centroids, labels)
    assert np.allclose(gaps, ((X.astype(float) - centroids[labels])**2).sum(1), rtol=1e-12)
    split = sum(exact_sum(squared_distances(X[p], centroids, labels[p]), steps) for p in parts)
    assert (split == exact_sum(gaps, steps)).all()
    assert (split[0] / steps[0] + split[1] / steps[1]) == pytest.approx(gaps.sum(), rel=1e-9)
    whole = ClusterSums(X, 4).follow(labels).sums
    assert (sum(ClusterSums(X[p], 4, survey=survey).follow(labels[p]).sums for p in parts) == whole).all()


@pytest.mark.parametrize("dim", [1, 7, 32, 33, 100])
def test_a_row_normalised_alone_is_the_row_normalised_among_others(dim):
    X = np.random.default_rng(0).normal(size=(5000, dim)).astype(np.float32)
    whole = normalise_rows(X)
    assert all((normalise_rows(X[i:i + 3]) == whole[i:i + 3]).all() for i in (0, 1, 4097, 4997))
    assert np.allclose(np.linalg.norm(whole.astype(float), axis=1), 1, atol=1e-6)


@thorough
@given(seeds, st.integers(1, 10**6), st.integers(1, 500))
def test_a_sample_is_of_numbers_alone(seed, n, most):
    picks = sample_rows(n, most, np.random.default_rng(seed))
    assert len(picks) == min(n, most) and (np.diff(picks) > 0).all() and 0 <= picks[0] and picks[-1] < n
    evenly = sample_rows(n, most)
    assert len(evenly) == min(n, most) and (np.diff(evenly) > 0).all() and evenly[-1] < n


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("seed", range(4))
def test_lloyd_is_scikit_learns_from_the_same_start(seed, metric):
    X = blobs(seed)
    start = X[np.random.default_rng(seed).choice(len(X), 12, replace=False)] * 3
    ours = KMeans(12, init=start, tol=0, max_iter=300, metric=metric).fit(X)
    if metric == "cosine":  # plain Lloyd, with means scaled to length 1
        U, C = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (X.astype(float), start.astype(float)))
        for _ in range(ours.n_iter_):
            labels = (U @ C.T).argmax(1)
            means = np.stack([U[labels == k].mean(0) for k in range(12)])
            C = means / np.linalg.norm(means, axis=1, keepdims=True)
        labels, centroids = (U @ C.T).argmax(1), C
        inertia = ((U - C[labels])**2).sum()
    else:
        theirs = SklearnKMeans(12, init=start.astype(float), n_init=1, tol=0, max_iter=300, algorithm="lloyd")
        theirs.fit(X.astype(float))
        labels, centroids, inertia = theirs.labels_, theirs.cluster_centers_, theirs.inertia_
    assert (ours.labels_ == labels).all()
    assert np.allclose(ours.cluster_centers_, centroids, atol=1e-5)
    assert ours.inertia_ == pytest.approx(inertia, rel=1e-6)
    assert (ours.predict(X) == ours.labels_).all()


@pytest.mark.parametrize("settings", [{}, dict(metric="cosine"), dict(relocate=4), dict(early_stop=1e-3),
                                      dict(sample_per_cluster=20), dict(init_sample=10), dict(init="random")],
                         ids=lambda s: next(iter(s), "plain"))
def test_threads_and_backends_change_nothing(settings):
    X = blobs(1, n=6000, dim=40, k=40)
    fits = [KMeans(40, random_state=0, **settings, **how).fit(X) for how in
            (dict(n_threads=1), dict(n_threads=3), dict(backend="numpy"), dict(backend="torch"))]
    for fit in fits[1:]:
        assert (fit.cluster_centers_ == fits[0].cluster_centers_).all() and fit.inertia_ == fits[0].inertia_
        assert (fit.labels_ == fits[0].labels_).all() and fit.n_iter_ == fits[0].n_iter_
    assert (fits[0].predict(X) == fits[0].labels_).all()
    exact = squared_distances(normalise_rows(X) if "metric" in settings else X, fits[0].cluster_centers_,
                              fits[0].labels_).sum()
    assert fits[0].inertia_ == pytest.approx(exact, rel=1e-9)


def test_the_loop_asks_only_for_sums():
    "Data that are two halves, each with sums of its own, give what one array gives."
    X = blobs(2)
    start, survey = X[:12].copy(), Survey.of(X)
    whole = KMeans(12, init=start, early_stop=1e-4).fit(X)

    class Halves(Clustered):
        gap_sums = farthest = members = take = __len__ = None
        def __init__(self):
            shift = X[:7].mean(0)
            rows = [quantise_rows(part, shift=shift) for part in (X[:400], X[400:])]
            self.parts = [InMemory(part, survey, 12) for part in rows]
            self.steps, self.shift = self.parts[0].steps, shift[None]
            self.around = sum(part.around for part in self.parts)
        def assign(self, centroids):
            for part in self.parts: part.assign(centroids)
        def totals(self): return (sum(v) for v in zip(*(part.totals() for part in self.parts)))
    *_, (centroids, _, _) = lloyd(Halves(), start, early_stop=1e-4)
    assert (centroids == whole.cluster_centers_).all()


def test_relocation_with_the_cosine_helps_as_it_does_without():
    rng = np.random.default_rng(3)
    places = rng.normal(size=(15, 6))
    X = (places[rng.integers(0, 15, 3000)] * rng.uniform(0.5, 9, (3000, 1))).astype(np.float32)
    X += rng.normal(0, 0.02, X.shape).astype(np.float32)
    crowded = X[:15] * 0 + X[0] + rng.normal(0, 0.01, (15, 6)).astype(np.float32)
    stuck = KMeans(15, metric="cosine", init=crowded).fit(X)
    moved = KMeans(15, metric="cosine", init=crowded, relocate=10).fit(X)
    assert moved.inertia_ < stuck.inertia_
    assert np.allclose(np.linalg.norm(moved.cluster_centers_, axis=1), 1, atol=1e-6)
    assert (moved.predict(X) == moved.labels_).all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_relocation_survives_clusters_that_stay_empty(metric):
    X = np.repeat(np.eye(3, 5, dtype=np.float32), 40, axis=0)
    with np.errstate(all="raise"):
        model = KMeans(8, metric=metric, relocate=5, random_state=0, max_iter=60).fit(X)
    assert model.inertia_ == 0 and np.isfinite(model.cluster_centers_).all()


@thorough
@given(seeds, st.integers(2, 12), st.booleans())
def test_no_cluster_stays_empty_where_rows_are_enough(seed, k, cosine):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(60, 4)).astype(np.float32)
    start = np.repeat(rng.normal(size=(1, 4)) * 50, k, axis=0).astype(np.float32)  # all in one place
    model = KMeans(k, init=start, metric="cosine" if cosine else "l2", max_iter=200).fit(X)
    assert (np.bincount(model.labels_, minlength=k) > 0).all()


def test_early_stop_ends_where_the_curve_flattens():
    X = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float32)
    fits = {share: KMeans(100, init=X[:100], tol=0, early_stop=share).fit(X) for share in (0.0, 1e-3, 1e-2)}
    assert fits[0.0].n_iter_ > fits[1e-3].n_iter_ > fits[1e-2].n_iter_ >= 2
    assert fits[1e-2].inertia_ < 1.05 * fits[0.0].inertia_
    n = fits[1e-3].n_iter_
    curve = [KMeans(100, init=X[:100], tol=0, max_iter=m).fit(X).inertia_ for m in (n - 2, n - 1, n)]
    assert (curve[0] - curve[1]) / curve[0] >= 1e-3 > (curve[1] - curve[2]) / curve[1]


def test_a_sample_trains_and_everything_is_labelled():
    X = blobs(4, n=20_000, spread=0.2)
    full, part = (KMeans(12, random_state=0, sample_per_cluster=s).fit(X) for s in (None, 50))
    assert len(part.labels_) == 20_000 and part.n_samples_ == 20_000
    assert part.inertia_ < 1.1 * full.inertia_
    trained = KMeans(12, random_state=0, sample_per_cluster=10**6).fit(X)
    assert (trained.cluster_centers_ == full.cluster_centers_).all()


def test_starts_that_are_given():
    X = blobs(5)
    ours = KMeans(12, init=X[:12], n_init=7).fit(X)  # an array is one start
    assert (ours.cluster_centers_ == KMeans(12, init=X[:12]).fit(X).cluster_centers_).all()
    cosine = [KMeans(12, init=start, metric="cosine").fit(X) for start in (X[:12], normalise_rows(X[:12]))]
    assert (cosine[0].cluster_centers_ == cosine[1].cluster_centers_).all()
    for seed in range(6):
        best = KMeans(12, n_init=6, random_state=seed, init="random").fit(X)
        assert best.inertia_ <= KMeans(12, random_state=seed, init="random").fit(X).inertia_
        assert (best.labels_ == best.predict(X)).all()


@pytest.mark.parametrize("settings, error, words", [
    (dict(metric="dot"), ConfigError, "metric"), (dict(init="best"), ConfigError, "init"),
    (dict(n_init=0), ConfigError, "n_init"), (dict(early_stop=1.0), ConfigError, "early_stop"),
    (dict(tol=-1), ConfigError, "tol"), (dict(sample_per_cluster=0), ConfigError, "sample_per_cluster"),
    (dict(init=np.eye(3)), ShapeMismatchError, "D=9"),
    (dict(init=np.ones((3, 9))), ShapeMismatchError, "init has 3"),
    (dict(init=np.full((12, 9), np.nan)), DataError, "NaN"),
    (dict(init=np.zeros((12, 9)), metric="cosine"), DataError, "zero vectors")])
def test_settings_that_make_no_sense(settings, error, words):
    with pytest.raises(error, match=words): KMeans(12, **settings).fit(blobs(6))


def saved(path, **changes):
    "A model folder, with changes to its metadata."
    KMeans(3, random_state=0).fit(np.random.default_rng(0).normal(size=(50, 4))).save(path)
    if changes:
        from safetensors.numpy import load, save
        whole = (path / "model.safetensors").read_bytes()
        about = json.loads((path / "metadata.json").read_text()) | changes
        (path / "model.safetensors").write_bytes(save(load(whole), {"semid": json.dumps(about)}))
    return path


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_model_comes_back_whole(tmp_path, metric):
    X = blobs(7)
    model = KMeans(12, metric=metric, random_state=5).fit(X)
    for name in "ab": model.save(tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"}) == 1
    again, inference = KMeans.load(tmp_path / "a"), KMeansInference(tmp_path / "a")
    assert (again.predict(X) == model.labels_).all() and (inference.predict(X) == model.labels_).all()
    assert again.random_state == 5 and again.inertia_ == model.inertia_ and inference.metric == metric
    assert [inference.predict_cluster(x) for x in X[:20].tolist()] == model.labels_[:20].tolist()
    with pytest.raises(NotFittedError): KMeans(3).save(tmp_path / "c")


def test_metadata_for_people_are_enough_where_the_tensors_have_none(tmp_path):
    from safetensors.numpy import load, save
    path = saved(tmp_path / "m")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(save(load(whole)))
    assert read_model(path)[1]["type"] == "KMeans"


@pytest.mark.parametrize("changes, words", [
    (dict(type="RQKMeans"), "Invalid model type: RQKMeans"), (dict(metric="dot"), "metric"),
    (dict(n_clusters=4), "don't fit"), (dict(D=2), "don't fit"), (dict(sha256="0"), "sha256")])
def test_metadata_that_do_not_fit_are_refused(tmp_path, changes, words):
    with pytest.raises(ModelFormatError, match=words): KMeansInference(saved(tmp_path / "m", **changes))


@thorough
@given(at=st.integers(0, 800), noise=st.binary(min_size=1, max_size=20))
def test_no_damage_is_loaded_as_another_model(tmp_path_factory, at, noise):
    path = tmp_path_factory.mktemp("m") / "model"
    good = saved(path)
    centroids = read_model(good)[0]
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:at] + noise + whole[at + len(noise):])
    try: damaged = read_model(path)[0]
    except ModelFormatError: return
    assert np.array_equal(damaged, centroids)


@pytest.mark.parametrize("name", ["m.pkl", "m.joblib", "m.pt", "m.bin", "kmeans.npy"])
def test_pickles_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelFormatError, match="never opened"): KMeansInference(tmp_path / name)
    with pytest.raises((DataError, ModelFormatError)): train_local(tmp_path / name, 2)


@pytest.mark.parametrize("name", ["kmeans_model.pkl", "m.pt", "m.npy"])
def test_a_folder_may_have_any_name(tmp_path, name):
    model = KMeans(12, random_state=5).fit(blobs(7))
    model.save(tmp_path / name)
    assert (KMeans.load(tmp_path / name).cluster_centers_ == model.cluster_centers_).all()
    assert (KMeansInference(tmp_path / name).predict(blobs(7)) == model.labels_).all()


def foreign(kind, folder):
    "A folder with a model of somebody else."
    from safetensors.numpy import save
    folder.mkdir()
    tensors, name = {"centroids": np.eye(3, dtype=np.float32)}, "model.safetensors"
    if kind == "plain": (folder / name).write_bytes(save(tensors))
    if kind == "framework": (folder / name).write_bytes(save(tensors, {"format": "pt"}))
    if kind == "RQKMeans": (folder / name).write_bytes(save(tensors, {"semid": json.dumps({"type": kind})}))
    if kind == "no safetensors": (folder / name).write_bytes(b"x" * 100)
    if kind == "metadata": (folder / "metadata.json").write_text('{"type": "Report"}')
    if kind == "list": (folder / "metadata.json").write_text("[1]")
    if kind == "broken metadata":
        saved(folder)
        (folder / "metadata.json").write_text("{")
    if kind == "folder": (folder / name).mkdir()
    return folder


@pytest.mark.parametrize("kind", ["plain", "framework", "RQKMeans", "no safetensors", "metadata", "list",
                                  "broken metadata", "folder"])
def test_no_model_of_others_is_overwritten(tmp_path, kind):
    path = foreign(kind, tmp_path / "m")
    content = lambda: {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
    before = content()
    with pytest.raises(ConfigError, match="no KMeans model: name another folder"): check_model_room(path)
    model = KMeans(3, random_state=0).fit(blobs(1))
    with pytest.raises(ConfigError, match="no KMeans model"): model.save(path)
    assert content() == before


def test_a_model_of_its_own_kind_is_overwritten_even_if_damaged(tmp_path):
    model = KMeans(3, random_state=0).fit(blobs(1))
    for damage in None, "metadata.json", "model.safetensors", "cut":
        path = saved(tmp_path / str(damage))
        if damage == "cut": (path / "model.safetensors").write_bytes(b"")
        elif damage: (path / damage).unlink()
        model.save(path)
        assert (KMeans.load(path).cluster_centers_ == model.cluster_centers_).all()


def test_local_training_asks_for_room_before_it_reads(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in tmp_path / "file", tmp_path / "file" / "model":
        with pytest.raises(ConfigError, match="file is a file"): train_local(tmp_path / "none.npy", 3, place)


def test_training_from_files(tmp_path):
    X = blobs(8)
    np.save(tmp_path / "x.npy", X)
    write_features(tmp_path / "x.parquet", np.arange(len(X)), X)
    models = [train_local(tmp_path / name, 12, tmp_path / "model") for name in ("x.npy", "x.parquet")]
    assert (models[0].cluster_centers_ == models[1].cluster_centers_).all()
    assert (KMeansInference(tmp_path / "model").predict(X) == models[0].labels_).all()


@pytest.mark.parametrize("settings, says", [
    (dict(n_clusters=3.0), "n_clusters must be a whole number from 1, not 3.0"),
    (dict(n_clusters="3"), "n_clusters must be a whole number from 1, not '3'"),
    (dict(n_clusters=0), "n_clusters must be a whole number from 1, not 0"),
    (dict(max_iter="10"), "max_iter must be a whole number from 1, not '10'"),
    (dict(max_iter=None), "max_iter must be a whole number from 1, not None"),
    (dict(init_sample=0), "init_sample must be a whole number from 1, not 0"),
    (dict(n_init=1.5), "n_init must be a whole number from 1, not 1.5"),
    (dict(sample_per_cluster=2.5), "sample_per_cluster must be a whole number from 1, not 2.5"),
    (dict(relocate=-1), "relocate must be a whole number from 0, not -1"),
    (dict(n_threads=1.5), "n_threads must be a whole number from 0, not 1.5"),
    (dict(tol=float("nan")), "tol must be a number from 0, not nan"),
    (dict(tol="1e-4"), "tol must be a number from 0, not '1e-4'"),
    (dict(early_stop=None), "early_stop must be a share from 0 to below 1, not None"),
    (dict(random_state=1.5), "random_state must be a whole number from 0, not 1.5"),
    (dict(random_state="3"), "random_state must be a whole number from 0, not '3'"),
    (dict(random_state=-1), "random_state must be a whole number from 0, not -1")])
def test_a_setting_of_the_wrong_type_is_named_with_its_value(settings, says):
    with pytest.raises(ConfigError) as refused: KMeans(**settings)
    assert says in str(refused.value)
    model = KMeans(5, tol=0)
    with pytest.raises(ConfigError): model.set_params(**settings)
    assert repr(model) == "KMeans(n_clusters=5, tol=0)"  # and nothing has changed


def test_numbers_of_numpy_are_settings():
    X = blobs(0)
    plain = KMeans(4, max_iter=7, tol=1e-3, random_state=3).fit(X)
    numbers = KMeans(np.int64(4), max_iter=np.int8(7), tol=np.float64(1e-3), random_state=np.uint32(3))
    assert np.array_equal(plain.cluster_centers_, numbers.fit(X).cluster_centers_)
    for K in np.uint8(200), np.int16(200):
        small = KMeans(K, max_iter=np.int8(127), n_init=np.uint8(2), random_state=3).fit(X)
        same = KMeans(200, max_iter=127, n_init=2, random_state=3).fit(X)
        assert np.array_equal(small.cluster_centers_, same.cluster_centers_)
    with pytest.raises(DataError, match="NaN"): plain.transform(np.full((2, 9), np.nan))
    for seed in None, np.random.default_rng(0), np.random.SeedSequence(1): KMeans(4, random_state=seed)


def test_settings_are_copied_and_changed_as_scikit_learn_does():
    X, start = blobs(0), blobs(0)[:6]
    model = KMeans(6, init=start, metric="cosine", n_threads=1).fit(X)
    copy = clone(model)
    assert not hasattr(copy, "cluster_centers_") and clone(KMeans(6, random_state=np.random.default_rng(0)))
    for name, value in model.get_params().items(): assert np.array_equal(copy.get_params()[name], value), name
    assert set(model.get_params()) == set(inspect.signature(KMeans).parameters)
    assert model.set_params(max_iter=3, tol=0.5) is model and (model.max_iter, model.tol) == (3, 0.5)
    assert hasattr(model, "cluster_centers_")  # what was fitted stays
    with pytest.raises(ConfigError, match="KMeans has no setting 'clusters'"): model.set_params(clusters=3)
    assert repr(copy) == "KMeans(n_clusters=6, metric='cosine', init=<array (6, 9)>, n_threads=1)"


def test_scikit_learn_searches_over_settings():
    grid = dict(n_clusters=[2, 12], init=["random", "k-means++"])
    search = GridSearchCV(KMeans(random_state=0), grid, cv=3, refit=False,
                          scoring=lambda model, X, y=None: -model.transform(X).min(1).mean())
    search.fit(blobs(1, spread=0.1))
    assert search.best_params_["n_clusters"] == 12 and is_clusterer(KMeans())


def test_semid_does_not_import_scikit_learn():
    code = "import sys, semid, semid.clustering.balanced; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
