"Codes are what float64 says, however they are computed; bad input and broken folders are refused."
import json, multiprocessing, os, warnings
from functools import partial
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import blobs, real_data, residual_codes, semid
from hypothesis import assume, given, settings, strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from threadpoolctl import ThreadpoolController, threadpool_limits

from semid import KMeans, RQKMeans, write_features
from semid.clustering.sums import ClusterSums
from semid.clustering.nearest import Codebooks, _assign_on_device, assign, nearest, quantise_rows
from semid.config import ConfigError, DataError, ModelFormatError, NotFittedError, ShapeMismatchError



def products(X, C):
    "x·c of every pair in float64: 32 running sums, then their sum, in the order that the kernels keep to."
    X, C = (np.pad(M.astype(np.float64), ((0, 0), (0, -M.shape[1] % 32))) for M in (X, C))
    parts = np.zeros((len(X), len(C), 32))
    for o in range(0, X.shape[1], 32): parts += X[:, None, o:o + 32] * C[None, :, o:o + 32]
    a, b, c, d = (sum(parts[:, :, t] for t in range(first, 32, 4)) for first in range(4))
    return (a + c) + (b + d)


def scored_codes(X, codebooks):
    "Greedy codes by |c|²/2 + Σ c_j·c - x·c in float64: the definition, also where float64 itself rounds."
    codes = np.empty((len(X), len(codebooks)), np.int64)
    for level, book in enumerate(codebooks):
        scores = np.broadcast_to(np.diag(products(book, book)) / 2, (len(X), len(book)))
        for j in range(level): scores = scores + products(codebooks[j], book)[codes[:, j]]
        codes[:, level] = (scores - products(X, book)).argmin(1)
    return codes


def fitted(codebooks, path):
    "A model with these codebooks that was saved and loaded."
    model = RQKMeans(len(codebooks), [len(book) for book in codebooks])
    model.codebooks_, model.D_ = [book.astype(np.float32) for book in codebooks], codebooks[0].shape[1]
    model.save(path)
    return RQKMeans.load(path)


def every_way(model, X):
    "The codes of X by every backend, number of threads, batch size, and through the device path."
    for model.backend in ("numpy", "torch"):
        for model.n_threads in (1, 2):
            for batch_size in (1, 1000, len(X)):
                if batch_size > 1 or len(X) < 100: yield model.encode(X, batch_size=batch_size)
    codes = np.full((len(X), model.n_levels), -1, np.int32)
    books = Codebooks(model.codebooks_)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of arrays that may not be written
        _assign_on_device(quantise_rows(X, shift=books.shift), books, "cpu", codes, block=37)
    yield codes


def check(codebooks, X, path, oracle=scored_codes):
    X, model = X.astype(np.float32), fitted(codebooks, path)
    expected = oracle(X, model.codebooks_)
    for codes in every_way(model, X): assert (codes == expected).all()


seeds, dims = st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4, 7, 31, 32, 33, 70])
sizes = st.lists(st.sampled_from([1, 2, 7, 8, 9, 30]), min_size=1, max_size=3)
shapes = st.tuples(seeds, st.integers(1, 40), dims, sizes)
thorough = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("models")


@thorough
@given(shapes)
def test_random_vectors(folder, shape):
    seed, n, dim, sizes = shape
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, dim))[rng.integers(0, n, n)]  # some rows twice
    books = [rng.normal(size=(k, dim)) for k in sizes]
    check(books, X, folder)
    check(books, X, folder, residual_codes)


@thorough
@given(shapes, st.integers(1, 3))
def test_ties_on_a_grid_go_to_the_lowest_index(folder, shape, width):
    seed, n, dim, sizes = shape
    rng = np.random.default_rng(seed)
    X = rng.integers(-width, width + 1, (n, dim))
    books = [rng.integers(-width, width + 1, (k, dim))[rng.integers(0, k, k)] for k in sizes]  # some twice
    check(books, X, folder)
    check(books, X, folder, residual_codes)  # exact on integers, as the formula is


@thorough
@given(shapes)
def test_points_on_bisectors_give_or_take_an_ulp(folder, shape):
    seed, n, dim, sizes = shape
    rng = np.random.default_rng(seed)
    books = [rng.normal(size=(k, dim)).astype(np.float32) for k in sizes]
    ends = [book[rng.integers(0, len(book), (2, n))] for book in books]
    X = sum((a + b) / 2 for a, b in ends[:1]) + sum(a for a, _ in ends[1:])
    X[1::3], X[2::3] = np.nextafter(X[1::3], np.float32(9)), np.nextafter(X[2::3], np.float32(-9))
    check(books, X, folder)


SCALES = [0, 1e-38, 1e-30, 1e-20, 1e-6, 1, 1e6, 1e18, 1e20, 1e38]


@settings(max_examples=150, deadline=None)
@given(shapes, st.lists(st.sampled_from(SCALES), min_size=1),
       st.sampled_from(["rows", "centroids", "both", "columns"]))
def test_zero_tiny_huge_and_mixed_norms(folder, shape, scales, where):
    seed, n, dim, sizes = shape
    rng = np.random.default_rng(seed)
    def scaled(count, on):
        by = rng.choice(scales, (1, dim) if where == "columns" else (count, 1)) if on else 1
        return (rng.uniform(-1, 1, (count, dim)) * by).astype(np.float32)
    X = scaled(n, where != "centroids")
    check([scaled(k, where != "rows") for k in sizes], X, folder)


@pytest.mark.parametrize("scale", [1e20, 1.0, 1e-20, 1e-30])
def test_a_fit_at_any_scale(tmp_path, scale):
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(300, 5)) * scale).astype(np.float32)
    model = RQKMeans(3, 9, random_state=0).fit(X)
    check(model.codebooks_, X, tmp_path)
    check(model.codebooks_, X, tmp_path, residual_codes)
    assert model.score(X)["relative_mse"] < 0.2


@pytest.mark.parametrize("exponent", [60, 66, -66, -90])
def test_a_fit_of_scaled_vectors_is_the_scaled_fit(exponent):
    X = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    scaled = KMeans(12, random_state=0).fit(np.ldexp(X, exponent)).cluster_centers_
    assert (scaled == np.ldexp(KMeans(12, random_state=0).fit(X).cluster_centers_, exponent)).all()


def test_real_vectors(tmp_path):
    from semid import read_features
    X = np.asarray(read_features(real_data("flickr8k_captions_minilm.parquet"))[1][:5000], np.float32)
    model = RQKMeans(3, 100, max_iter=10, random_state=0).fit(X)
    expected = residual_codes(X, model.codebooks_)
    for codes in every_way(model, X): assert (codes == expected).all()


blobs = partial(blobs, n=2000, dim=19, k=10, spread=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_lloyd_is_scikit_learns_from_the_same_start(seed):
    X = blobs(seed, spread=0.6)
    start = X[np.random.default_rng(seed).choice(len(X), 10, replace=False)]
    ours = KMeans(10, init=start, tol=0, max_iter=200).fit(X)
    theirs = SklearnKMeans(10, init=start.astype(float), n_init=1, tol=0, max_iter=200, algorithm="lloyd")
    theirs.fit(X.astype(float))
    assert (ours.labels_ == theirs.labels_).all()
    assert np.allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-6)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-6)


def test_kmeans_plus_plus_is_as_good_as_scikit_learns():
    X = blobs(5)
    ours = [KMeans(10, random_state=seed).fit(X).inertia_ for seed in range(8)]
    theirs = [SklearnKMeans(10, n_init=1, random_state=seed).fit(X).inertia_ for seed in range(8)]
    assert np.median(ours) <= np.median(theirs) * 1.02


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_any_number_of_threads_gives_the_same_model(backend):
    X, models = blobs(6, dim=70), []
    for n_threads in (1, 2, 3, 7):
        with threadpool_limits(n_threads):
            models.append(RQKMeans(2, 30, random_state=0, n_threads=n_threads, backend=backend).fit(X))
    assert len({model.fingerprint() for model in models}) == 1


def test_backends_fit_the_same_model():
    X = blobs(7)
    fits = [RQKMeans(3, 20, random_state=1, backend=backend).fit(X) for backend in ("numpy", "torch", "auto")]
    assert len({model.fingerprint() for model in fits}) == 1


@thorough
@given(seeds, st.integers(1, 200), st.integers(1, 40), st.sampled_from([1e-30, 1, 1e20, 1e38]))
def test_sums_know_no_order(seed, n, dim, scale):
    rng = np.random.default_rng(seed)
    X = (rng.uniform(-1, 1, (n, dim)) * scale).astype(np.float32)
    (first, last), order = rng.integers(0, 5, (2, n)).astype(np.int32), rng.permutation(n)
    straight = ClusterSums(X, 5, 1).follow(last)
    moved = ClusterSums(X[order], 5, 2).follow(first[order]).follow(last[order])
    assert (straight.sums == moved.sums).all()
    counts = np.bincount(last, minlength=5)
    sums = np.array([X[last == k].astype(np.float64).sum(0) for k in range(5)])
    exact = sums / np.maximum(counts, 1)[:, None]
    assert np.allclose(straight.means(counts), exact, rtol=0, atol=scale * 1e-12)


def test_the_order_of_rows_changes_no_centroid():
    X, order = blobs(8), np.random.default_rng(0).permutation(2000)
    start = X[:10].copy()
    straight, mixed = (KMeans(10, init=start).fit(rows) for rows in (X, X[order]))
    assert (straight.cluster_centers_ == mixed.cluster_centers_).all()
    assert (straight.labels_[order] == mixed.labels_).all()


def test_empty_clusters_get_far_points_as_in_scikit_learn():
    X = blobs(9)
    far = np.full((10, X.shape[1]), 1e3) + np.arange(10)[:, None]  # all rows are nearest to the first
    ours = KMeans(10, init=far, tol=0).fit(X)
    theirs = SklearnKMeans(10, init=far, n_init=1, tol=0).fit(X.astype(float))
    assert (ours.labels_ == theirs.labels_).all()
    assert (np.bincount(ours.labels_, minlength=10) > 0).all()


def test_fewer_distinct_rows_than_clusters():
    X = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    model = RQKMeans(2, 6, random_state=0).fit(X)
    assert np.isfinite(model.codebooks_).all()
    assert np.allclose(model.decode(model.encode(X)), X)


@pytest.mark.parametrize("n, dim, k", [(1, 1, 1), (9, 1, 3), (20, 5, 1), (50, 7, 11), (3, 4, 3)])
def test_small_and_odd_shapes(tmp_path, n, dim, k):
    X = np.random.default_rng(n).normal(size=(n, dim))
    check(RQKMeans(2, k, random_state=0).fit(X).codebooks_, X, tmp_path, residual_codes)


X, MODEL = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32), RQKMeans(2, 8, random_state=0)


def with_value(value):
    bad = X.copy()
    bad[7, 3] = value
    return bad


@pytest.mark.parametrize("bad, error, words", [
    (with_value(np.nan), DataError, "NaN.*row 7"),
    (with_value(np.inf), DataError, "Inf.*row 7"),
    (X[:0], ShapeMismatchError, "at least one sample"),
    (X[:, :0], ShapeMismatchError, "no columns"),
    (X[0], ShapeMismatchError, "2-D"),
    (X[None], ShapeMismatchError, "2-D"),
    ([["a"]], ShapeMismatchError, "no .* matrix of numbers"),
    ([[1, 2], [3]], ShapeMismatchError, "no .* matrix of numbers"),
    (1e39 * X.astype(np.float64), DataError, "NaN or Inf"),
])
@pytest.mark.parametrize("use", ["fit", "encode", "kmeans", "nearest"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_vectors(bad, error, words, use):
    model = MODEL if MODEL.codebooks_ else MODEL.fit(X)
    call = {"fit": RQKMeans(2, 8).fit, "encode": model.encode, "kmeans": KMeans(8).fit,
            "nearest": lambda X: nearest(X, model.codebooks_[0])}[use]
    if use in ("encode", "nearest") and getattr(bad, "shape", (0, 6))[1:] == (0,): words = "D=6"
    with pytest.raises(error, match=words): call(bad)


@pytest.mark.parametrize("call, error, words", [
    (lambda: RQKMeans(2, 8).encode(X), NotFittedError, "not fitted"),
    (lambda: RQKMeans(2, 8).decode([[0, 0]]), NotFittedError, "not fitted"),
    (lambda: RQKMeans(2, 8).save("nowhere"), NotFittedError, "not fitted"),
    (lambda: RQKMeans(2, 8).score(X), NotFittedError, "not fitted"),
    (lambda: KMeans(2).predict(X), NotFittedError, "not fitted"),
    (lambda: RQKMeans(2, [8, 41]).fit(X), ShapeMismatchError, "n_samples=40.*n_clusters=41"),
    (lambda: KMeans(41).fit(X), ShapeMismatchError, "n_samples=40.*n_clusters=41"),
    (lambda: RQKMeans(3, [8, 8]), ShapeMismatchError, "must match n_levels"),
    (lambda: RQKMeans(0, 8), ConfigError, "whole number from 1"),
    (lambda: RQKMeans(2, 0), ConfigError, "whole number from 1"),
    (lambda: RQKMeans(2, 8, metric="dot"), ConfigError, "l2 or cosine"),
    (lambda: RQKMeans(2, 8, implementation="elkan"), ConfigError, "kmeans or constrained"),
    (lambda: RQKMeans(2, 8, backend="jax").fit(X), ConfigError, "auto, numpy or torch"),
    (lambda: RQKMeans(2, 8).fit(X, device="gpu"), ConfigError, "auto, cpu, cuda"),
    (lambda: RQKMeans(2, 8, metric="cosine").fit(np.zeros((40, 6))), DataError, "zero"),
    (lambda: RQKMeans(2, 8).fit(X).encode(X[:, :4]), ShapeMismatchError, "D=6, got D=4"),
    (lambda: RQKMeans(2, 8).fit(X).encode(X, batch_size=-1), ConfigError, "batch_size"),
    (lambda: RQKMeans(2, 8).fit(X).encode(X, batch_size="a"), ConfigError, "batch_size"),
    (lambda: RQKMeans(2, 8).fit(X).encode(X, beam_size=1.5), ConfigError, "beam_size"),
    (lambda: RQKMeans(2, 8).fit(X).encode(X, beam_size=2, return_alternatives=3), ConfigError, "beam_size"),
    (lambda: RQKMeans(2, 8).fit(X).encode(X, device=3), ConfigError, "Unknown device"),
    (lambda: RQKMeans(2, 8).fit(X).decode([[0, 8]]), DataError, r"0\.\.7"),
    (lambda: RQKMeans(2, 8).fit(X).decode([[-1, 0]]), DataError, r"0\.\.7"),
    (lambda: RQKMeans(2, 8).fit(X).decode([[0, 0, 0]]), ShapeMismatchError, "1 to 2"),
    (lambda: KMeans(2, init=X[:3]).fit(X), ShapeMismatchError, "init has 3"),
    (lambda: KMeans(2, init="forgy").fit(X), ConfigError, "k-means\\+\\+"),
])
def test_bad_use(call, error, words):
    with pytest.raises(error, match=words): call()


def saved(path, **changes):
    "A model folder as semantic-id writes it, with changes to its metadata (None: left out)."
    model = RQKMeans(2, 8, random_state=0).fit(X)
    meta = {"type": "RQKMeans", "n_levels": 2, "n_clusters": [8, 8], "metric": "l2", "D": 6, **changes}
    path.mkdir()
    np.savez(path / "codebooks.npz", codebook_0=model.codebooks_[0], codebook_1=model.codebooks_[1])
    (path / "metadata.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
    return path


def rewrite(name, change):
    def break_it(path): (path / name).write_bytes(change((path / name).read_bytes()))
    return break_it


def replace_arrays(**arrays): return lambda path: np.savez(path / "codebooks.npz", **arrays)
def remove(name): return lambda path: (path / name).unlink()


@pytest.mark.parametrize("break_it", [
    *[rewrite("codebooks.npz", lambda b, cut=cut: b[:int(len(b) * cut)]) for cut in (0, 0.1, 0.5, 0.99)],
    rewrite("codebooks.npz", lambda b: b[:300] + bytes(50) + b[350:]),
    rewrite("codebooks.npz", lambda b: b"\x80\x04N."),
    rewrite("metadata.json", lambda b: b[:20]),
    rewrite("metadata.json", lambda b: b"[]"),
    rewrite("metadata.json", lambda b: b"null"),
    rewrite("metadata.json", lambda b: b"\xff\xfe"),
    remove("codebooks.npz"), remove("metadata.json"),
    replace_arrays(codebook_0=X[:8]),
    replace_arrays(codebook_0=X[:8], codebook_1=X[:7]),
    replace_arrays(codebook_0=X[:8], codebook_1=X[:8, :5]),
    replace_arrays(codebook_0=X[:8], codebook_1=X[0]),
    replace_arrays(codebook_0=X[:8], codebook_1=np.array([{}, None])),
    replace_arrays(codebook_0=X[:8], codebook_1=np.array(["a"])),
    replace_arrays(codebook_0=X[:8], codebook_1=np.full((8, 6), np.nan, np.float32)),
])
def test_a_broken_folder_is_refused(tmp_path, break_it):
    path = saved(tmp_path / "model")
    assert RQKMeans.load(path).n_clusters == [8, 8]
    break_it(path)
    with pytest.raises(ModelFormatError, match="model"): RQKMeans.load(path)


@pytest.mark.parametrize("changes, words", [
    ({"type": "RQVAE"}, "Invalid model type: RQVAE"), ({"type": None}, "Invalid model type"),
    ({"n_levels": 3}, "codebook_2"), ({"n_levels": None}, "n_levels"), ({"D": 5}, "don't fit"),
    ({"n_clusters": [8, 9]}, "don't fit"), ({"n_clusters": 9}, "don't fit"),
    ({"n_clusters": None}, "n_clusters"),
    ({"n_levels": "two"}, "model"), ({"n_clusters": "many"}, "model"), ({"n_levels": 0}, "model"),
    ({"n_clusters": [8]}, "model"), ({"metric": "dot"}, "model"), ({"n_levels": 1}, "model"),
])
def test_metadata_that_does_not_fit_is_refused(tmp_path, changes, words):
    with pytest.raises(ModelFormatError, match=words): RQKMeans.load(saved(tmp_path / "model", **changes))


@pytest.mark.parametrize("name", ["model.pkl", "model.pickle", "model.joblib", "model.pt", "model.bin"])
def test_pickles_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelFormatError, match="pickle.*never opened"): RQKMeans.load(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(ModelFormatError, match="no RQKMeans model"): RQKMeans.load(tmp_path / "nothing")


def test_our_own_folder_needs_only_its_codebooks(tmp_path):
    model = RQKMeans(2, 8, random_state=0).fit(X)
    model.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["codebooks.npz", "metadata.json"]
    (tmp_path / "metadata.json").unlink()  # for people: what counts is inside the one atomic file
    assert RQKMeans.load(tmp_path).fingerprint() == model.fingerprint()


def test_equal_models_are_equal_files(tmp_path):
    for name in "ab": RQKMeans(2, 8, random_state=0).fit(X).save(tmp_path / name)
    for file in ("codebooks.npz", "metadata.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_model_of_another_kind_is_not_overwritten(tmp_path):
    KMeans(3, random_state=0).fit(X).save(tmp_path / "kmeans")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kmeans").iterdir()}
    with pytest.raises(ConfigError, match="holds a model of KMeans, which is no RQKMeans or RQVAE"):
        RQKMeans(2, 4, random_state=0).fit(X).save(tmp_path / "kmeans")
    write_features(tmp_path / "X.parquet", [f"{i}" for i in range(len(X))], X)
    done = semid("fit", "X.parquet", "-o", "kmeans", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "which is no RQKMeans" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "kmeans").iterdir()} == before


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, there):
    first, second = (RQKMeans(2, 8, random_state=seed).fit(X) for seed in (0, 1))
    if there: first.save(tmp_path / "model")
    def full(*args, **kwargs): raise OSError("No space left on device")
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"): second.save(tmp_path / "model")
    left = sorted(os.listdir(tmp_path / "model"))
    assert left == (["codebooks.npz", "metadata.json"] if there else [])
    if there: assert RQKMeans.load(tmp_path / "model").fingerprint() == first.fingerprint()


@thorough
@given(st.binary(max_size=40), st.integers(0, 3000))
def test_no_damage_is_loaded_as_another_model(folder, noise, at):
    model = RQKMeans(2, 8, random_state=0).fit(X)
    model.save(folder / "damaged")
    file = folder / "damaged" / "codebooks.npz"
    whole = file.read_bytes()
    damaged = whole[:at] + noise + whole[at + len(noise):]
    assume(damaged != whole)
    file.write_bytes(damaged)
    try: loaded = RQKMeans.load(folder / "damaged")
    except ModelFormatError: return
    assert (loaded.encode(X) == model.encode(X)).all()


def test_assign_wants_the_dimension_of_its_codebooks():
    with pytest.raises(ShapeMismatchError, match="D=6, got D=4"):
        assign(quantise_rows(X[:, :4]), Codebooks([X[:8]]))


def encode_in_child(model, X, codes):
    codes[:] = model.encode(np.frombuffer(X, np.float32).reshape(-1, 8)).ravel().tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_has_threads_of_its_own():
    X = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)
    model = RQKMeans(2, 8, random_state=0, max_iter=3, n_threads=2, backend="numpy").fit(X)
    expected = model.encode(X)
    fork = multiprocessing.get_context("fork")
    codes = fork.Array("i", expected.size)
    child = fork.Process(target=encode_in_child, args=(model, X.tobytes(), codes))
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive and child.exitcode == 0
    assert np.array_equal(np.array(codes[:]).reshape(expected.shape), expected)


def test_encoding_from_many_threads_gives_blas_its_threads_back():
    X = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float32)
    model = RQKMeans(2, 16, random_state=0, max_iter=3, n_threads=2, backend="numpy").fit(X)
    blas = ThreadpoolController().select(user_api="blas")
    before, expected = [lib.num_threads for lib in blas.lib_controllers], model.encode(X)
    with ThreadPoolExecutor(4) as pool: codes = list(pool.map(model.encode, [X] * 12))
    assert all(np.array_equal(c, expected) for c in codes)
    assert [lib.num_threads for lib in blas.lib_controllers] == before


@pytest.mark.parametrize("scales", [(1, 1e-22), (1, 1e-9), (1e-12, 1), (1e8, 1, 1e-8), (1e20, 1e-20)])
def test_levels_of_very_different_scale(scales, folder):
    rng = np.random.default_rng(0)
    books = [rng.normal(size=(16, 8)) * s for s in scales]
    X = np.concatenate([rng.normal(size=(60, 8)) * s for s in (*scales, scales[-1] / 10, 0)])
    check(books, X, folder)


def test_the_device_path_ignores_autocast():
    torch = pytest.importorskip("torch")
    X = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    model = RQKMeans(2, 32, random_state=0, max_iter=3).fit(X)
    books, codes = Codebooks(model.codebooks_), np.empty((len(X), 2), np.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _assign_on_device(quantise_rows(X, shift=books.shift), books, "cpu", codes)
    assert np.array_equal(codes, model.encode(X))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_codes_on_an_accelerator_are_those_of_the_cpu(device):
    torch = pytest.importorskip("torch")
    present = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    if not present: pytest.skip(f"there is no {device} here")
    X = np.random.default_rng(0).normal(size=(50_000, 64)).astype(np.float32)
    model = RQKMeans(3, 64, random_state=0, max_iter=5).fit(X, device=device)
    assert np.array_equal(model.encode(X, device=device), model.encode(X))


@pytest.mark.parametrize("offset", [1000, [1000] + [0] * 31])
def test_where_the_data_lie_does_not_spoil_a_fit(offset):
    rng = np.random.default_rng(0)
    blobs = rng.normal(size=(32, 32)) * 3
    X = (blobs[rng.integers(0, 32, 5000)] + rng.normal(size=(5000, 32))).astype(np.float32)
    there = X + np.asarray(offset, np.float32)
    assert KMeans(32, random_state=0).fit(there).inertia_ < 1.1 * KMeans(32, random_state=0).fit(X).inertia_


def test_relocation_never_hurts_and_depends_on_no_thread():
    X = np.random.default_rng(1).normal(size=(4000, 6)).astype(np.float32)
    plain = KMeans(40, random_state=0, max_iter=100).fit(X)
    one, two = (KMeans(40, random_state=0, relocate=6, n_threads=n).fit(X) for n in (1, 2))
    assert np.array_equal(one.cluster_centers_, two.cluster_centers_)
    assert one.inertia_ < 1.01 * plain.inertia_
    assert np.array_equal(one.labels_, one.predict(X))


def test_errors_name_the_row_of_the_whole_input():
    X = np.zeros((100, 4), np.float32)
    X[70, 2] = np.nan
    model = RQKMeans(1, 2, random_state=0).fit(np.eye(4))
    with pytest.raises(DataError, match="row 70"): model.encode(X, batch_size=16)


def test_numbers_of_numpy_are_numbers(tmp_path):
    model = RQKMeans(np.int64(2), np.int64(3), max_iter=np.int64(5), tol=np.float32(1e-4), n_init=np.int64(1),
                     random_state=np.int64(0)).fit(np.eye(6))
    model.save(tmp_path / "model")
    assert RQKMeans.load(tmp_path / "model").fingerprint() == model.fingerprint()
    RQKMeans(1, 2, random_state=np.random.default_rng(0)).fit(np.eye(6))
    RQKMeans(1, 2, random_state=np.random.RandomState(0)).fit(np.eye(6))


def test_codebooks_that_were_changed_are_noticed(tmp_path):
    RQKMeans(1, 2, random_state=0).fit(np.eye(4)).save(tmp_path / "model")
    with np.load(tmp_path / "model" / "codebooks.npz") as z: arrays = dict(z)
    arrays["codebook_0"] = arrays["codebook_0"] + 1
    np.savez(tmp_path / "model" / "codebooks.npz", **arrays)
    with pytest.raises(ModelFormatError, match="sha256"): RQKMeans.load(tmp_path / "model")


def test_progress_bars_change_nothing():
    X = np.random.default_rng(1).normal(size=(4000, 6)).astype(np.float32)
    for max_iter in (1, 9, 30):
        models = [KMeans(40, random_state=0, relocate=6, max_iter=max_iter, verbose=v) for v in (True, False)]
        loud, quiet = (model.fit(X) for model in models)
        assert np.array_equal(loud.cluster_centers_, quiet.cluster_centers_)
        assert loud.n_iter_ == quiet.n_iter_ and 1 <= quiet.n_iter_ <= max_iter


@pytest.mark.parametrize("offset", [2.0**16, 2.0**22, 2.0**23])
def test_codes_agree_however_far_the_data_lie(offset, folder):
    rng = np.random.default_rng(0)
    X = (offset + 3 * rng.normal(size=(1500, 64))).astype(np.float32)
    model = fitted([X[:64], rng.normal(size=(16, 64))], folder)
    codes = list(every_way(model, X))
    assert all(np.array_equal(c, codes[0]) for c in codes)


def test_one_balanced_cluster():
    X = np.random.default_rng(0).normal(size=(20, 4))
    assert (RQKMeans(2, 1, implementation="constrained", random_state=0).fit(X).encode(X) == 0).all()
