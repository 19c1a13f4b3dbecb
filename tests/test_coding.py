"Beam search ranks as float64 would, whatever the data, the blocks, the threads, the backend."
import itertools, warnings
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid import RQKMeans
from semid.clustering.nearest import Codebooks, assign
from semid.clustering.rows import LazyRows, exact_dot
from semid.config import ConfigError
from semid.semantic_ids import coding
from semid.semantic_ids.coding import search


def slowly(X, books, beam_size):
    "The same search with every score exact and a plain sort: (codes, scores) of every row."
    part, o = np.empty(32), books.offsets
    for i in range(len(X)):
        beams = [(0.0, ())]
        for level in range(len(books.levels)):
            longer = []
            for score, codes in beams:
                for k in range(o[level], o[level + 1]):
                    known = books.half_norms[k]
                    for j, c in enumerate(codes): known += books.tables[o[j] + c, k]
                    known -= exact_dot(X, i, books.centroids, k, part)
                    longer.append((score + known, (*codes, k - o[level])))
            beams = sorted(longer)[:beam_size]
        yield np.array([codes for _, codes in beams]), np.array([score for score, _ in beams])


def greedily(X, books):
    "The residual code of every row, every score exact."
    part, o = np.empty(32), books.offsets
    for i in range(len(X)):
        codes: list[int] = []
        for level in range(len(books.levels)):
            known = books.half_norms[o[level]:o[level + 1]].copy()
            for j, c in enumerate(codes): known += books.tables[o[j] + c, o[level]:o[level + 1]]
            dots = [exact_dot(X, i, books.centroids, k, part) for k in range(o[level], o[level + 1])]
            codes.append(int((known - dots).argmin()))
        yield codes


def made_up(kind, rng, n, dim, sizes):
    X = rng.normal(size=(n, dim))
    levels = [rng.normal(size=(K, dim)) / (level + 1) for level, K in enumerate(sizes)]
    if kind == "grid": X, levels = np.rint(X), [np.rint(C) for C in levels]  # ties everywhere
    if kind == "midway": X = (levels[0][rng.integers(0, sizes[0], n)] + levels[0][0]) / 2
    if kind == "huge and tiny": X *= 10.0 ** rng.integers(-12, 12, (n, 1))
    if kind == "offset": X, levels[0] = X + 1e4, levels[0] + 1e4
    if kind == "orthogonal":  # what the first level leaves tells nothing about the next ones
        far = levels[0] - levels[0].mean(0)
        levels[0] = 1e3 * np.where(np.arange(dim) < dim // 2, far, 0)
        levels[1:] = [np.where(np.arange(dim) < dim // 2, 0, C) for C in levels[1:]]
        X = X * 1e-3
    for C in levels: C[-1] = C[0]  # the same twice
    return X.astype(np.float32), [C.astype(np.float32) for C in levels]


@pytest.mark.parametrize("kind", ["random", "grid", "midway", "huge and tiny", "offset", "orthogonal"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 20), dim=st.integers(1, 40),
       sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), beam=st.integers(1, 12),
       priced=st.booleans())
def test_ranks_as_an_exact_search(kind, seed, n, dim, sizes, beam, priced):
    rng = np.random.default_rng(seed)
    X, levels = made_up(kind, rng, n, dim, sizes)
    books = Codebooks(levels, prices=[rng.random(K) for K in sizes] if priced else None)
    best = min(beam, int(np.prod(sizes)))
    every = [(where, search(LazyRows(X, books.shift), books, beam, best, **where)) for where in (
        dict(backend="numpy", n_threads=1), dict(backend="torch", n_threads=2), dict())]
    with mock.patch.object(coding, "pick_device", lambda device: device):  # what a GPU would do, on the CPU
        every.append(("device", search(LazyRows(X, books.shift), books, beam, best, device="cpu:0")))
    for i, (codes, scores) in enumerate(slowly(X, books, beam)):
        for _, (got, costs) in every:
            assert np.array_equal(got[i], codes[:best])
            assert np.array_equal(costs[i], exact_dot(X, i, X, i, np.empty(32)) + 2 * scores[:best])
    for backend in ("numpy", "torch"):
        assert assign(LazyRows(X, books.shift), books, backend).tolist() == [*greedily(X, books)]


def test_widest_beam_finds_the_nearest_code_of_all():
    rng = np.random.default_rng(0)
    X, levels = made_up("random", rng, 200, 8, [6, 5, 4])
    books = Codebooks(levels)
    codes, costs = search(LazyRows(X, books.shift), books, beam_size=120, n_best=1)
    every = np.array(list(itertools.product(range(6), range(5), range(4))))
    sums = sum(levels[level][every[:, level]].astype(np.float64) for level in range(3))
    gaps = ((X[:, None].astype(np.float64) - sums)**2).sum(-1)
    assert np.allclose(costs[:, 0], gaps.min(1)) and np.array_equal(codes[:, 0], every[gaps.argmin(1)])


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_first_level_too_long_for_float32_and_a_zero_centroid_after_it(backend):
    first, second = np.zeros((4, 40), np.float32), np.zeros((3, 40), np.float32)
    first[:2], first[2, 0], second[1:, 0] = 3e38, 1, [2, 5]
    X = np.zeros((10, 40), np.float32)
    X[:, 0] = np.arange(10) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        books = Codebooks([first, second])
    codes = assign(LazyRows(X, books.shift), books, backend)
    assert codes.tolist() == [[3, 0]] + [[2, 0]] * 4 + [[2, 1]] * 5


def test_rows_at_the_shift_where_levels_are_orthogonal():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        v, W = np.zeros(16), rng.normal(size=(64, 16))
        v[:8] = rng.normal(size=8) * 3e3
        W[:, :8] -= np.outer(W[:, :8] @ v[:8], v[:8]) / (v @ v)
        first = rng.normal(size=16) * 30 + np.stack([v, -v])
        levels = [first, W / np.linalg.norm(W, axis=1, keepdims=True)]
        books = Codebooks([C.astype(np.float32) for C in levels])
        X = books.levels[0].astype(np.float64).mean(0, keepdims=True).astype(np.float32)
        for backend in ("numpy", "torch"):
            assert assign(LazyRows(X, books.shift), books, backend).tolist() == [*greedily(X, books)]


def test_a_model_encodes_the_same_however_it_is_asked(tmp_path):
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(150, 24)), 2, 0).astype(np.float32)
    for options in ({}, {"implementation": "constrained"}, {"metric": "cosine"}):
        model = RQKMeans(3, [7, 16, 5], random_state=0, **options).fit(X)
        codes, costs = model.encode(X, beam_size=6, return_alternatives=4)
        model.save(tmp_path / "model")
        again = RQKMeans.load(tmp_path / "model")
        again.n_threads, again.backend = 1, "numpy"
        one = [again.encode(X[i:i + 1], beam_size=6, return_alternatives=4) for i in range(0, 300, 7)]
        assert np.array_equal(np.concatenate([c for c, _ in one]), codes[::7])
        assert np.array_equal(np.concatenate([c for _, c in one]), costs[::7])
        assert np.array_equal(codes[::2], codes[1::2])
        assert len({tuple(c) for c in codes[0]}) == 4


def test_beams_that_make_no_sense():
    X = np.random.default_rng(0).normal(size=(50, 4))
    model = RQKMeans(2, 3, random_state=0).fit(X)
    for options in ({"beam_size": 0}, {"return_alternatives": 2}, {"return_alternatives": 0},
                    {"beam_size": 20, "return_alternatives": 10}):
        with pytest.raises(ConfigError): model.encode(X, **options)
