"Labels are float64's, whatever the data, the blocks, the threads, the backend."
import numpy as np
import pytest
from conftest import real_data
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.clustering.nearest import Codebooks, LazyRows, assign, nearest, quantise_rows
from semid.config import DataError
from semid.features import open_features


def in_float64(X, C, prices=0.0):
    "The plain formula, a block at a time."
    X, C = np.asarray(X, np.float64), np.asarray(C, np.float64)
    known = (C * C).sum(1) / 2 + np.asarray(prices) / 2
    return np.concatenate([(known - X[i:i + 2048] @ C.T).argmin(1) for i in range(0, len(X), 2048)])


def in_long_double(X, C):
    "The plain formula in extended precision."
    X, C = X.astype(np.longdouble), C.astype(np.longdouble)
    return ((C * C).sum(1) / 2 - X @ C.T).argmin(1)


def every_label(X, C, prices=None):
    "Labels by each backend, prepared or not, on one thread and on two."
    shift = X.mean(0)
    books = Codebooks([C], shift, None if prices is None else [prices])
    for rows in (LazyRows(X, shift), quantise_rows(X, shift=shift)):
        for backend, n_threads in (("numpy", 1), ("torch", 2), ("auto", None)):
            yield assign(rows, books, backend, n_threads=n_threads)[:, 0]


@pytest.mark.parametrize("name", ["flickr8k_captions_minilm", "sasrec_beauty", "sasrec_instruments",
                                  "sasrec_yelp"])
def test_real_vectors(name):
    _, X = open_features(real_data(f"{name}.parquet")).read()
    C = X[np.random.default_rng(0).choice(len(X), 256, replace=False)] * np.float32(0.9)
    want = in_float64(X, C)
    assert all(np.array_equal(got, want) for got in every_label(X, C))


KINDS = {"random": lambda X, C, r: (X, C),
         "blobs": lambda X, C, r: (C[r.integers(0, len(C), len(X))] + X / 8, C),
         "zeros": lambda X, C, r: (X * (r.random((len(X), 1)) < 0.5), C * (r.random((len(C), 1)) < 0.8)),
         "huge": lambda X, C, r: (X * 1e18, C * 1e18), "tiny": lambda X, C, r: (X * 1e-20, C * 1e-20),
         "huge and tiny rows": lambda X, C, r: (X * 10.0 ** r.integers(-15, 15, (len(X), 1)), C),
         "one loud column": lambda X, C, r: (X * np.r_[1e4, np.ones(X.shape[1] - 1)], C)}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 300), k=st.integers(1, 70), d=st.integers(1, 70))
def test_any_data(kind, seed, n, k, d):
    rng = np.random.default_rng(seed)
    X, C = KINDS[kind](rng.normal(size=(n, d)), rng.normal(size=(k, d)), rng)
    X, C = X.astype(np.float32), C.astype(np.float32)
    if k > 3: C[2] = C[0]  # a duplicate never wins
    want = in_long_double(X, C)
    assert all(np.array_equal(got, want) for got in every_label(X, C))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), d=st.integers(1, 40), scale=st.sampled_from([1.0, 2.0**40, 2.0**-40]))
def test_ties_go_to_the_lowest_index(seed, d, scale):
    "On whole numbers float64 is exact, and ties are everywhere."
    rng = np.random.default_rng(seed)
    X = (rng.integers(-2, 3, (200, d)) * scale).astype(np.float32)
    C = (rng.integers(-2, 3, (30, d)) * scale).astype(np.float32)
    prices = rng.integers(0, 3, 30) * scale**2
    for p in (None, prices):
        want = in_float64(X, C, 0.0 if p is None else p)
        assert all(np.array_equal(got, want) for got in every_label(X, C, p))


def test_near_ties():
    "Centroids one unit in the last place apart."
    rng = np.random.default_rng(0)
    X, C = rng.normal(size=(4000, 48)).astype(np.float32), rng.normal(size=(20, 48)).astype(np.float32)
    C = np.concatenate([C, np.nextafter(C, np.float32(np.inf)), C])
    want = in_float64(X, C)
    assert all(np.array_equal(got, want) for got in every_label(X, C))


def test_bad_rows_are_named_though_they_are_read_late():
    X = np.zeros((5000, 8), np.float32)
    X[4321, 3] = np.nan
    with pytest.raises(DataError, match="first in row 4321"): nearest(X, X[:4])


def test_more_columns_than_int8_products_can_have():
    C = np.stack([np.ones(140_000), -np.ones(140_000)]).astype(np.float32)
    for backend in ("numpy", "torch", "auto"): assert not nearest(np.ones((300, 140_000)), C, backend).any()


def test_prices_decide_between_equal_centroids_for_a_huge_row():
    books = Codebooks([np.zeros((3, 4), np.float32)], prices=[[5, 0, 1]])
    X = np.float32([[1e25] * 4, [1.0] * 4])
    for backend in ("numpy", "torch"):
        assert assign(LazyRows(X, books.shift), books, backend).tolist() == [[1], [1]]
