"Relocation: no crowd, no cheaper way, no matter in which order; and resolvers that forget nothing."
import itertools, os, subprocess, sys, threading

import numpy as np
import pytest
from conftest import real_data, residual_codes
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment

from semid import RQKMeans, SemanticIdEngine
from semid.config import ConfigError, DataError, ModelFormatError
from semid.semantic_ids import relocation
from semid.semantic_ids.formatting import codes_to_ids
from semid.semantic_ids.relocation import relocate
from semid.semantic_ids.resolvers import RelocationResolver, SinkhornResolver
from semid.semantic_ids.seating import seat

SHAPES = [(5,), (3, 4), (4, 1), (2, 3, 3), (2, 2, 2, 2), (1, 3, 2)]


@st.composite
def crowds(draw, shapes=SHAPES, kinds=("grid", "same", "gauss"), spare=6):
    "Items with their codes, codebooks, codes already given and a capacity; at times to the last place."
    sizes, capacity = draw(st.sampled_from(shapes)), draw(st.sampled_from([1, 1, 2, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    places = capacity * int(np.prod(sizes))
    m = draw(st.integers(0, places - 1))
    n = draw(st.integers(max(1, places - m - spare) if draw(st.booleans()) else 1, places - m))
    every = np.repeat(np.array(list(itertools.product(*map(range, sizes)))), capacity, axis=0)
    kind = draw(st.sampled_from(kinds))
    def numbers(*shape):
        return rng.normal(size=shape) if kind == "gauss" else rng.integers(-2, 3, shape)  # a grid has ties
    X = numbers(1, 2).repeat(n, 0) if kind == "same" else numbers(n, 2)
    X, books = X.astype(np.float32), [numbers(k, 2).astype(np.float32) / (i + 1) for i, k in enumerate(sizes)]
    return residual_codes(X, books), X, books, rng.permutation(every)[:m], capacity


def cost_of(X, codes, books):
    return ((X - sum(book.astype(float)[c] for book, c in zip(books, codes.T))) ** 2).sum()


def largest(codes): return np.unique(codes, axis=0, return_counts=True)[1].max()


@settings(max_examples=200, deadline=None)
@given(crowds(), st.sampled_from(["min_cost", "nearest", "random"]))
def test_no_code_has_more_than_it_may(crowd, policy):
    codes, X, books, taken, capacity = crowd
    before = codes.copy()
    moved = relocate(codes, X, books, taken, capacity, policy)
    assert (codes == before).all() and moved.dtype == np.int32 and moved.shape == codes.shape
    assert largest(np.concatenate([moved, taken])) <= capacity
    assert (moved >= 0).all() and (moved < [len(book) for book in books]).all()
    assert (relocate(moved, X, books, taken, capacity, policy) == moved).all()


@settings(max_examples=200, deadline=None)
@given(crowds(), st.integers(0, 2**32 - 1), st.sampled_from(["min_cost", "nearest", "random"]))
def test_the_order_of_the_rows_does_not_matter(crowd, seed, policy):
    codes, X, books, taken, capacity = crowd
    rng = np.random.default_rng(seed)
    order, other = rng.permutation(len(X)), rng.permutation(len(taken))
    straight = relocate(codes, X, books, taken, capacity, policy)
    mixed = relocate(codes[order], X[order], books, taken[other], capacity, policy)
    equal = np.unique(np.column_stack([codes, X]), axis=0, return_inverse=True)[1].ravel()
    for item in np.unique(equal):  # items with one vector and code may change places among themselves
        assert sorted(straight[equal == item].tolist()) == sorted(mixed[equal[order] == item].tolist())
    if len(np.unique(equal)) == len(X): assert (mixed == straight[order]).all()


@settings(max_examples=300, deadline=None)
@given(crowds())
def test_never_dearer_than_greedy_or_chance(crowd):
    codes, X, books, taken, capacity = crowd
    costs = [cost_of(X, relocate(codes, X, books, taken, capacity, policy), books)
             for policy in ("min_cost", "nearest", "random")]
    assert costs[0] <= min(costs[1:]) * (1 + 1e-9) + 1e-12


def in_buckets(codes, X, books, taken, capacity):
    "The least cost where each bucket keeps its items, by scipy; None where one is too full."
    total, K = 0.0, len(books[-1])
    for prefix in np.unique(codes[:, :-1], axis=0):
        rows = np.flatnonzero((codes[:, :-1] == prefix).all(1))
        room = capacity - np.bincount(taken[(taken[:, :-1] == prefix).all(1), -1], minlength=K)
        count = np.bincount(codes[rows, -1], minlength=K)
        rest = X[rows] - sum((book.astype(float)[c] for book, c in zip(books, prefix)), np.zeros(2))
        costs = ((rest[:, None] - books[-1].astype(float)) ** 2).sum(2)
        if (count <= room).all():
            total += costs[np.arange(len(rows)), codes[rows, -1]].sum()
            continue
        if len(rows) > room.sum(): return None
        places = np.repeat(np.arange(K), room)
        at = linear_sum_assignment(costs[:, places])
        total += costs[:, places][at].sum()
    return total


@settings(max_examples=300, deadline=None)
@given(crowds())
def test_the_least_cost_within_buckets(crowd):
    codes, X, books, taken, capacity = crowd
    least = in_buckets(codes, X, books, taken, capacity)
    if least is None: return
    moved = relocate(codes, X, books, taken, capacity)
    assert (moved[:, :-1] == codes[:, :-1]).all()  # nobody leaves a bucket that has room
    assert cost_of(X, moved, books) == pytest.approx(least, rel=1e-9, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(crowds(spare=30))
def test_codes_of_other_buckets_change_nothing(crowd):
    codes, X, books, taken, capacity = crowd
    sizes = [len(book) for book in books]
    every = np.concatenate([codes, taken])
    full = [(every[:, :-1] == row[:-1]).all(1).sum() > capacity * sizes[-1] for row in codes]
    if any(full): return
    mine = [(codes[:, :-1] == row[:-1]).all(1).any() for row in taken]
    near = taken[np.array(mine, bool)]
    few = [relocate(codes, X, books, given, capacity) for given in (taken, near)]
    with pytest.MonkeyPatch.context() as patch:  # it leaves out itself what can't matter
        patch.setattr(relocation, "_that_matter", lambda codes, given, sizes, capacity: given)
        every = relocate(codes, X, books, taken, capacity)
    for moved in few: assert np.array_equal(every, moved)


@settings(max_examples=200, deadline=None)
@given(crowds(shapes=[(3, 4), (4, 4), (2, 3, 3)]))
def test_as_few_as_possible_leave_and_fine_buckets_are_left_alone(crowd):
    codes, X, books, taken, capacity = crowd
    moved = relocate(codes, X, books, taken, capacity)
    every, K = np.concatenate([codes, taken]), len(books[-1])
    if len(books) == 2:
        for prefix in range(len(books[0])):
            own = codes[:, 0] == prefix
            room = capacity * K - (taken[:, 0] == prefix).sum()
            assert (moved[own, 0] != prefix).sum() == max(0, own.sum() - room)
    for prefix in np.unique(codes[:, :-1], axis=0):
        rows = (codes[:, :-1] == prefix).all(1)
        inside = every[(every[:, :-1] == prefix).all(1)]
        if np.bincount(inside[:, -1]).max() <= capacity: assert (moved[rows] == codes[rows]).all()


def by_hand(X, codes, books):
    "Greedy, item by item: the farthest of a crowd go to the nearest free code, level by level upwards."
    sizes, codes, X = [len(book) for book in books], codes.copy(), X.astype(float)
    used, movers = np.zeros(sizes, bool), []
    errors = ((X - sum(book[c] for book, c in zip(books, codes.T))) ** 2).sum(1)
    for i in np.argsort(errors, kind="stable"):
        if used[tuple(codes[i])]: movers.append(i)
        used[tuple(codes[i])] = True
    for i in movers[::-1]:
        level = next(l for l in range(len(sizes) - 1, -1, -1) if not used[tuple(codes[i, :l])].all())
        for l in range(level, len(sizes)):
            rest = X[i] - sum((book[c] for book, c in zip(books[:l], codes[i])), np.zeros(X.shape[1]))
            free = ~used[tuple(codes[i, :l])].reshape(sizes[l], -1).all(1)
            codes[i, l] = np.where(free, ((rest - books[l]) ** 2).sum(1), np.inf).argmin()
        used[tuple(codes[i])] = True
    return codes


@pytest.mark.parametrize("sizes", [(8, 16), (4, 4, 8), (3, 3, 3, 3)])
@pytest.mark.parametrize("kind", ["gauss", "clump", "same"])
def test_buckets_that_overflow_cost_no_more_than_by_a_greedy_hand(sizes, kind):
    rng = np.random.default_rng(sum(sizes))
    for share in (0.6, 0.9, 1):
        n = int(np.prod(sizes) * share)
        books = [rng.normal(size=(k, 8)).astype(np.float32) / 2**i for i, k in enumerate(sizes)]
        X = rng.normal(size=(n, 8)).astype(np.float32)
        if kind != "gauss": X = (X[:1] + (kind == "clump") * 0.05 * X).astype(np.float32)
        codes = residual_codes(X, books)
        ours, hand = relocate(codes, X, books), by_hand(X, codes, books)
        assert largest(ours) == largest(hand) == 1
        assert cost_of(X, ours, books) <= cost_of(X, hand, books) * (1 + 1e-6)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3, 1000]))
def test_seats_cost_what_scipy_finds(n, k, seed, grid):
    rng = np.random.default_rng(seed)
    costs = rng.integers(-grid, grid + 1, (n, k)).astype(float) if grid else rng.normal(size=(n, k))
    costs[n // 2:] = costs[n // 2]  # half of them equal
    room = rng.integers(0, 6, k)
    while room.sum() < n: room[rng.integers(k)] += rng.integers(1, 5)
    labels, places = seat(costs, room), np.repeat(np.arange(k), room)
    assert (np.bincount(labels, minlength=k) <= room).all()
    least = costs[:, places][linear_sum_assignment(costs[:, places])].sum()
    assert costs[np.arange(n), labels].sum() == pytest.approx(least, rel=1e-9, abs=1e-9)


def test_prices_are_part_of_the_cost():
    X = np.zeros((2, 1), np.float32)
    books = [np.array([[0], [1], [2]], np.float32)]
    assert sorted(relocate([[0], [0]], X, books)[:, 0]) == [0, 1]
    assert sorted(relocate([[0], [0]], X, books, prices=[[0, 5, 0]])[:, 0]) == [0, 2]


def test_many_items_and_many_levels():
    rng = np.random.default_rng(0)
    books = [rng.normal(size=(64, 8)).astype(np.float32) / 2**i for i in range(12)]  # 2⁷² codes
    X = np.concatenate([rng.normal(size=(4000, 8)), np.zeros((1000, 8))]).astype(np.float32)
    codes = residual_codes(X, books)
    assert largest(relocate(codes, X, books)) == 1


MODEL = RQKMeans(2, 8, random_state=0).fit(np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32))
FORMATS = [{}, {"sep": "/"}, {"fmt": "token"}, {"formatter": lambda row: "|".join(map(str, row))}]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.booleans())
def test_batches_share_no_id_and_items_keep_theirs(seed, lengths, known):
    rng = np.random.default_rng(seed)
    for resolver in (RelocationResolver(), SinkhornResolver()):
        engine, form = SemanticIdEngine(MODEL, resolver), FORMATS[seed % len(FORMATS)]
        given_out, left = {}, 64
        for length in lengths:
            X = rng.integers(-1, 2, (length, 4)).astype(np.float32)
            first = len(given_out)
            names = rng.integers(0, 30, length).tolist() if known else list(range(first, first + length))
            new = {*names} - {*given_out}
            if len(new) > left: break
            ids = engine.unique_ids(X, item_ids=names if known else None, **form)
            for name, text in zip(names, ids): assert given_out.setdefault(name, text) == text
            left -= len(new)
        assert len({*given_out.values()}) == len(given_out)


def test_a_model_of_another_kind_and_balanced_clusters():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(200, 6)).astype(np.float32)
    kinds = {"metric": "cosine"}, {"implementation": "constrained"}, {"n_clusters": [4, 8, 16], "n_levels": 3}
    for options in kinds:
        model = RQKMeans(**{"n_levels": 2, "n_clusters": 16, "random_state": 0} | options).fit(X)
        for resolver in (RelocationResolver(), SinkhornResolver()):
            assert len({*SemanticIdEngine(model, resolver).unique_ids(X)}) == 200


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(range(4)), min_size=2, max_size=4))
def test_no_format_makes_two_items_alike(seed, forms):
    rng = np.random.default_rng(seed)
    for make in (RelocationResolver, SinkhornResolver):
        engine, texts = SemanticIdEngine(MODEL, make()), []
        for form in forms:
            X = rng.integers(-1, 2, (5, 4)).astype(np.float32)
            try: texts += engine.unique_ids(X, **FORMATS[form])
            except DataError as e: assert form != forms[0] and "keep to one sep" in str(e)
            else: assert form == forms[0]
        assert len({*texts}) == len(texts)


def test_another_formatter_is_noticed_after_a_restart(tmp_path):
    X = np.random.default_rng(5).normal(size=(12, 4)).astype(np.float32)
    for n, make in enumerate((RelocationResolver, SinkhornResolver)):
        engine = SemanticIdEngine(MODEL, make())
        engine.unique_ids(X, formatter=lambda row: ".".join(map(str, row)))
        engine.save(tmp_path / str(n))
        again = SemanticIdEngine.load(tmp_path / str(n))
        with pytest.raises(DataError, match="keep to one sep"): again.unique_ids(-X)
        assert len(again.unique_ids(-X, sep=".")) == 12  # the same texts, by other means


def networks():
    from semid import RQVAE
    X = np.random.default_rng(6).normal(size=(120, 6)).astype(np.float32)
    start = RQKMeans(2, 12, random_state=0).fit(X)
    options = dict(epochs=2, batch_size=64, random_state=0)
    return X, [RQVAE(6, [12, 12], 4, layers=[8], **options).fit(X),
               RQVAE.from_rq_kmeans(start, layers=[8], **options).fit(X)]


@pytest.mark.parametrize("make", [RelocationResolver, SinkhornResolver])
def test_networks_give_unique_ids_too(make, tmp_path):
    X, models = networks()
    for n, model in enumerate(models):
        engine = SemanticIdEngine(model, make())
        first = engine.unique_ids(X[:70], item_ids=range(70))
        engine.save(tmp_path / str(n))
        engine = SemanticIdEngine.load(tmp_path / str(n))
        every = engine.unique_ids(X, item_ids=range(120), device="cpu")
        assert every[:70] == first and len({*every}) == 120
        if make is RelocationResolver: assert {text.count("-") for text in every} == {1}


def test_networks_relocate_as_their_latents_say():
    X, models = networks()
    for model in models:
        codes, books, Z = model.encode(X), model.codebooks_, model.latents(X)
        moved, greedy = (relocate(codes, Z, books, policy=policy) for policy in ("min_cost", "nearest"))
        assert largest(moved) == 1 and cost_of(Z, moved, books) <= cost_of(Z, greedy, books) * (1 + 1e-12)


RESOLVERS = RelocationResolver, SinkhornResolver, lambda: RelocationResolver("random", 2, 7)


@pytest.mark.parametrize("make", RESOLVERS)
def test_a_loaded_engine_goes_on(make, tmp_path):
    X = np.random.default_rng(2).normal(size=(60, 4)).astype(np.float32)
    one = SemanticIdEngine(MODEL, make())
    before = one.unique_ids(X[:30], item_ids=range(30))
    one.save(tmp_path / "engine")
    two = SemanticIdEngine.load(tmp_path / "engine")
    assert repr(two.unique_resolver) == repr(one.unique_resolver)
    assert two.unique_ids(-X[:30], item_ids=range(30)) == before
    assert two.unique_ids(X[30:]) == one.unique_ids(X[30:])
    two.save(tmp_path / "engine")  # onto itself
    assert SemanticIdEngine.load(tmp_path / "engine").unique_ids(X[:30], item_ids=range(30)) == before
    file = tmp_path / "engine" / "resolver" / "resolver.npz"
    whole = file.read_bytes()
    for broken in (b"", whole[:100], whole[:-30], b"PK" + whole[50:]):
        file.write_bytes(broken)
        with pytest.raises(ModelFormatError, match="resolver.npz"): SemanticIdEngine.load(tmp_path / "engine")
    file.unlink()
    with pytest.raises(ModelFormatError, match="resolver.npz"): SemanticIdEngine.load(tmp_path / "engine")


def test_a_batch_that_fails_takes_nothing():
    X = np.random.default_rng(3).normal(size=(60, 4)).astype(np.float32)
    engine = SemanticIdEngine(MODEL, RelocationResolver())
    with pytest.raises(ZeroDivisionError): engine.unique_ids(X, formatter=lambda row: 1 / 0)
    with pytest.raises(DataError, match="two codes"): engine.unique_ids(X, formatter=lambda row: "same")
    with pytest.raises(DataError, match="64 places"): engine.unique_ids(np.tile(X, (2, 1)))
    engine.unique_ids(X, item_ids=range(60))
    with pytest.raises(DataError, match="64 places"): engine.unique_ids(X[:5], item_ids=range(100, 105))
    assert len(engine.unique_resolver._codes) == len(engine.unique_resolver._rows) == 60
    assert len({*engine.unique_ids(X[:4], item_ids=range(100, 104))}) == 4


@pytest.mark.parametrize("make", RESOLVERS)
def test_a_resolver_serves_one_model(make, tmp_path):
    X = np.random.default_rng(4).normal(size=(60, 4)).astype(np.float32)
    engine, other = SemanticIdEngine(MODEL, make()), RQKMeans(2, 8, random_state=1).fit(X)
    engine.unique_ids(X[:20])
    engine.save(tmp_path / "engine")
    for resolver in (engine.unique_resolver, SemanticIdEngine.load(tmp_path / "engine").unique_resolver):
        with pytest.raises(DataError, match="of another model"):
            SemanticIdEngine(other, resolver).unique_ids(X[20:])
        assert len({*SemanticIdEngine(MODEL, resolver).unique_ids(X[20:25])}) > 1


@pytest.mark.parametrize("make", [
    lambda: RelocationResolver(capacity=None), lambda: RelocationResolver(capacity=np.nan),
    lambda: RelocationResolver(capacity=0), lambda: RelocationResolver(random_state=-1),
    lambda: RelocationResolver(random_state="a"), lambda: RelocationResolver("best"),
    lambda: SinkhornResolver(max_iterations=None), lambda: SinkhornResolver(sk_epsilon="a"),
    lambda: SinkhornResolver(sk_epsilon=0)])
def test_settings_that_make_no_sense(make):
    with pytest.raises(ConfigError): make()


def test_a_seed_of_numpy_is_saved_too(tmp_path):
    engine = SemanticIdEngine(MODEL, RelocationResolver("random", random_state=np.int64(3)))
    engine.unique_ids(np.zeros((4, 4), np.float32))
    engine.save(tmp_path / "engine")
    assert SemanticIdEngine.load(tmp_path / "engine").unique_resolver.random_state == 3


@pytest.mark.parametrize("resolver", [RelocationResolver(), SinkhornResolver()])
def test_threads_share_a_resolver(resolver):
    engine, ids, X = SemanticIdEngine(MODEL, resolver), [], np.zeros((4, 4), np.float32)
    threads = [threading.Thread(target=lambda: ids.extend(engine.unique_ids(X))) for _ in range(12)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(ids) == len({*ids}) == 48


def test_sinkhorn_touches_no_id_that_was_unique_and_no_model():
    X = np.random.default_rng(4).normal(size=(50, 4)).astype(np.float32)
    before = MODEL.fingerprint()
    plain = codes_to_ids(MODEL.encode(X), fmt="token")
    ids = SemanticIdEngine(MODEL, SinkhornResolver()).unique_ids(X, fmt="token")
    assert MODEL.fingerprint() == before and len({*ids}) == 50
    assert all(new == old for old, new in zip(plain, ids) if plain.count(old) == 1)
    shared = SemanticIdEngine(MODEL, SinkhornResolver(max_iterations=0, fallback_suffix=False)).unique_ids(X)
    assert shared == MODEL.semantic_id(MODEL.encode(X))


CODE = """
import hashlib, numpy as np
from semid.semantic_ids.relocation import relocate
rng = np.random.default_rng(0)
books = [rng.normal(size=(16, 8)).astype(np.float32) for _ in range(2)]
X = rng.normal(size=(250, 8)).astype(np.float32)
print(hashlib.sha256(relocate(rng.integers(0, 16, (250, 2)), X, books).tobytes()).hexdigest())
"""


def test_threads_do_not_decide():
    runs = [subprocess.run([sys.executable, "-c", CODE], env={**os.environ, "OMP_NUM_THREADS": n}, text=True,
                           capture_output=True, check=True).stdout for n in ("1", "2")]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name, most", [("beauty", 0.003), ("instruments", 0.0015), ("yelp", 0.001)])
def test_real_items(name, most):
    from semid import read_features
    from semid.clustering.kmeans import normalise_rows
    stored = np.asarray(read_features(real_data(f"sasrec_{name}.parquet"))[1], np.float32)
    for seed, X in itertools.product(range(3), (stored, normalise_rows(stored))):
        model = RQKMeans(3, 256, random_state=seed).fit(X)
        codes = model.encode(X)
        moved, greedy = (relocate(codes, X, model.codebooks_, policy=p) for p in ("min_cost", "nearest"))
        before, after, other = (cost_of(X, c, model.codebooks_) for c in (codes, moved, greedy))
        assert largest(moved) == 1 and after <= other
        assert X is not stored or after <= before * (1 + most)
