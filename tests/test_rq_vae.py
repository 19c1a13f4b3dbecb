"RQVAE: runs repeat and resume, the best weights stay, damage and bad input are refused."
import json, os, pickle, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
from conftest import residual_codes

from semid import RQVAE, RQKMeans, SemanticIdEngine
from semid.config import (
    ConfigError, DataError, ModelFormatError, NotFittedError, SemidError, ShapeMismatchError)
from semid.semantic_ids.metrics import collision_rate_per_level
from semid.semantic_ids import rq_kmeans, rq_vae, rq_vae_training
from semid.semantic_ids.engine import load_encoder
from semid.semantic_ids.rq_vae_training import _follow
from semid.semantic_ids.rq_vae_module import (
    RQVAEModule, VectorQuantizer, apply_rqkmeans_plus_strategy, read_codebooks, rotate_to)
from semid.training import seed_of


def clouds(seed=0, n=400, dim=12, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(20, dim))[rng.integers(0, 20, n)] + rng.normal(0, 0.3, (n, dim))
    return (offset + scale * X).astype(np.float32)


X = clouds()
SHAPE = dict(in_dim=12, num_emb_list=[8, 6], e_dim=5, layers=[16])
SHORT = dict(**SHAPE, lr=3e-3, batch_size=128, epochs=4, kmeans_init=True)


def model(**options): return RQVAE(**{**SHORT, "random_state": 0, **options})


@pytest.fixture(scope="module")
def fitted(): return model().fit(X)


@pytest.fixture(scope="module")
def kmeans(): return RQKMeans(3, [8, 6, 5], random_state=0).fit(X)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Networks this small are slower on several, and much slower where others compute too."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def weights(model): return {k: v.clone() for k, v in model.module.state_dict().items()}


def state(model):
    "Everything that a model is, to the byte."
    tensors = {k: v.numpy().tobytes() for k, v in weights(model).items()}
    rest = {k: v for k, v in vars(model).items() if k not in ("module", "mean_")}
    return tensors, str(rest), model.mean_.tobytes(), model.module.training


# --- repeats

def test_a_seed_gives_the_same_model_to_the_byte_and_another_seed_another(fitted):
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    before = torch.get_rng_state()
    again = model(verbose=True).fit(X)
    assert torch.equal(torch.get_rng_state(), before)
    assert state(again)[0] == state(fitted)[0] and again.history_ == fitted.history_
    assert again.fingerprint() == fitted.fingerprint()
    assert model(random_state=1).fit(X).fingerprint() != fitted.fingerprint()
    assert model(random_state=None).fit(X).fingerprint() != model(random_state=None).fit(X).fingerprint()


@pytest.mark.parametrize("options", [
    {"dropout_prob": 0.2, "bn": True}, {"gradient": "rotation", "loss_type": "l1"},
    {"sk_epsilons": [0.01, 0.05], "sk_iters": 9}, {"kmeans_init": False, "restart_below": None},
    {"metric": "cosine"}])
def test_runs_repeat_with_every_option(options):
    one, two = (model(epochs=2, **options).fit(X) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    assert np.isfinite(one.decode(one.encode(X))).all()


@pytest.mark.parametrize("best_by", ["relative_mse", "collision_rate", "loss"])
def test_the_best_epoch_is_kept_whatever_is_shown(best_by, capsys):
    rough = dict(lr=0.05, epochs=8, best_by=best_by, random_state=3)  # so that the last epoch isn't the best
    models = [model(**rough, verbose=verbose).fit(X) for verbose in (False, True, 2)]
    assert len({m.fingerprint() for m in models}) == 1
    m, values = models[0], models[0].history_[best_by]
    assert len(values) == 8 and m.best_epoch_ == 1 + int(np.argmin(values)) and not m.module.training
    assert model(**rough | {"epochs": m.best_epoch_}).fit(X).fingerprint() == m.fingerprint()
    if best_by == "relative_mse": assert m.score(X)["relative_mse"] == pytest.approx(min(values), rel=1e-5)
    if best_by == "collision_rate": assert collision_rate_per_level(m.encode(X))[-1] == min(values)


def test_early_stopping_stops():
    m = model(lr=0.1, epochs=200, patience=3, random_state=3).fit(X)
    done = len(m.history_["loss"])
    assert done < 200 and done - m.best_epoch_ == 3
    assert m.fingerprint() == model(lr=0.1, epochs=done, random_state=3).fit(X).fingerprint()


# --- resumes

SLOWLY = """
import sys, time
import test_rq_vae as t
t.resumable({plus}).fit(t.X, checkpoint=sys.argv[1], log=lambda values, epoch: time.sleep(0.4))
"""


def resumable(plus, **options):
    options = dict(lr=3e-3, batch_size=100, epochs=12, dropout_prob=0.1, lr_scheduler="cosine",
                   warmup_epochs=2, random_state=5) | options
    if plus: return RQVAE.from_rq_kmeans(RQKMeans(2, [8, 6], random_state=0).fit(X), layers=[16], **options)
    return RQVAE(**SHAPE, kmeans_init=True, bn=True, sk_epsilons=[0.0, 0.02], sk_iters=3, **options)


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    checkpoints = {plus: tmp_path / f"{plus}.safetensors" for plus in (False, True)}
    def started(plus):
        command = [sys.executable, "-c", SLOWLY.format(plus=plus), str(checkpoints[plus])]
        return subprocess.Popen(command, env=env)
    runs = {plus: started(plus) for plus in checkpoints}
    for plus, run in runs.items():
        end = time.time() + 60
        while time.time() < end and run.poll() is None and not checkpoints[plus].exists(): time.sleep(0.01)
        time.sleep(0.5)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "it ended before it was killed"
    for plus, checkpoint in checkpoints.items():
        seen = []
        def note(values, epoch, seen=seen): seen.append(epoch)
        resumed = resumable(plus).fit(X, checkpoint=checkpoint, resume=True, log=note)
        whole = resumable(plus).fit(X)
        assert 1 < seen[0] and seen[-1] == 12
        assert resumed.fingerprint() == whole.fingerprint() and resumed.history_ == whole.history_
        assert resumed.best_epoch_ == whole.best_epoch_
    assert len([*tmp_path.iterdir()]) == 2  # the killed runs left nothing half written


def test_a_run_without_a_seed_can_be_resumed(tmp_path):
    checkpoint = tmp_path / "training.safetensors"
    first = model(random_state=None, epochs=2).fit(X, checkpoint=checkpoint)
    assert seed_of(checkpoint) == first._seed
    resumed = model(random_state=None).fit(X, checkpoint=checkpoint, resume=True)
    whole = model(random_state=None)
    whole._seed = first._seed
    whole.module = whole._new_module()
    assert resumed.fingerprint() == whole.fit(X).fingerprint()


def test_more_patience_lets_a_stopped_run_go_on(tmp_path):
    rough, checkpoint = dict(lr=0.1, random_state=3), tmp_path / "training.safetensors"
    stopped = model(**rough, epochs=30, patience=2).fit(X, checkpoint=checkpoint)
    assert len(stopped.history_["loss"]) < 30
    more = model(**rough, epochs=30).fit(X, checkpoint=checkpoint, resume=True)
    assert len(more.history_["loss"]) == 30
    assert more.fingerprint() == model(**rough, epochs=30).fit(X).fingerprint()


def test_checkpoints_of_something_else_are_refused(tmp_path, fitted):
    checkpoint, unfitted = tmp_path / "training.safetensors", model()
    model(epochs=1).fit(X, checkpoint=checkpoint)
    before = state(unfitted)
    for other, data, words in [
            (model(lr=1e-4), X, "lr=0.003, not 0.0001"), (model(random_state=1), X, "random_state=0, not 1"),
            (model(beta=1), X, "beta=0.25, not 1"), (unfitted, X[:-1], "data=")]:
        with pytest.raises(ConfigError, match=words): other.fit(data, checkpoint=checkpoint, resume=True)
    fitted.save(tmp_path / "model")
    whole = checkpoint.read_bytes()
    for broken in (b"", whole[:100], whole[:-1], pickle.dumps({"a": 1}),
                   (tmp_path / "model" / "model.safetensors").read_bytes()):
        checkpoint.write_bytes(broken)
        with pytest.raises(ModelFormatError, match="no checkpoint"):
            unfitted.fit(X, checkpoint=checkpoint, resume=True)
    with pytest.raises(ConfigError, match="resume needs a checkpoint"): unfitted.fit(X, resume=True)
    for place, resume, words in [(tmp_path, False, "is a folder"), (tmp_path, True, "is a folder"),
                                 (checkpoint, False, "resume from it, or name another"),
                                 (checkpoint / "c", False, "is a file")]:
        def never(values, epoch): raise AssertionError("it trains")
        with pytest.raises(ConfigError, match=words):
            model(random_state=None).fit(X, checkpoint=place, resume=resume, log=never)
    assert checkpoint.read_bytes() == broken
    assert state(unfitted) == before


# --- codebooks and gradients

def test_dead_codes_are_restarted():
    far = dict(kmeans_init=False, epochs=3, lr=1e-4, num_emb_list=[32, 32], restart_below=0.1)
    alive, dead = model(**far).fit(X), model(**{**far, "restart_below": None}).fit(X)
    use = [[len(np.unique(column)) for column in m.encode(X).T] for m in (alive, dead)]
    assert min(use[0]) >= 28 and max(use[1]) <= 20 and "restarted" not in dead.history_
    assert alive.history_["restarted"][0] > 0


def test_a_restart_takes_only_the_dead_codes_and_forgets_their_moments():
    torch.manual_seed(0)
    module = RQVAEModule(3, [4], 3, [4], residual=True)
    code, rows = module.rq.vq_layers[0].embedding.weight, torch.randn(200, 3)
    with torch.no_grad():
        code[0], code[1], code[2], code[3] = rows[:100].mean(0), rows[100:].mean(0), 1e4, -1e4
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-9)
    module(rows)[1].backward()
    optimizer.step()
    moments = {k: v for k, v in optimizer.state[code].items() if v.shape == code.shape}
    for v in moments.values(): v[:] = 1.0
    n = _follow(module, rows, 0.1, optimizer, torch.Generator().manual_seed(0))
    assert n >= 2 and len(moments) == 2
    for v in moments.values(): assert v[2:].eq(0).all() and v[:2].eq(1).all()
    chosen = module.get_indices(rows)[:, 0]
    assert torch.bincount(chosen, minlength=4).min() > 0 and code.abs().max() < 10
    for k in range(4): assert (code[k] - rows[chosen == k].mean(0)).norm() < 0.5


def test_sinkhorn_balances_the_choices_of_training_and_no_others():
    rng = np.random.default_rng(0)
    crowd = np.concatenate([rng.normal(0, 0.1, (450, 12)), rng.normal(0, 3, (62, 12))]).astype(np.float32)
    m = model(num_emb_list=[8, 8], sk_epsilons=[0.02, 0.02], restart_below=None, epochs=1, lr=1e-6).fit(crowd)
    rows = torch.from_numpy((crowd - m.mean_) / np.float32(m.scale_))
    balanced, nearest = ([np.bincount(column).max() for column in m.module(rows, use_sk)[2].numpy().T]
                         for use_sk in (True, False))
    assert max(balanced) < 2 * 64 and nearest[0] > 3 * 64  # 64 would be an equal share
    assert (m.module.get_indices(rows).numpy() == m.encode(crowd)).mean() > 0.99  # IDs are the nearest codes
    one = VectorQuantizer(8, 12, sk_epsilon=0.0)
    assert torch.equal(one(rows, True)[2], one(rows, False)[2])


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 64])
def test_the_gradient_of_the_rotation_is_that_of_the_formula(dim):
    rng = np.random.default_rng(dim)
    for e, q, g in rng.normal(size=(20, 3, dim)):
        x = torch.tensor(e, requires_grad=True)
        out = rotate_to(x[None], torch.tensor(q)[None])[0]
        out.backward(torch.tensor(g))
        assert np.allclose(out.detach(), q, atol=1e-12)
        e_hat, q_hat = e / np.linalg.norm(e), q / np.linalg.norm(q)
        if dim == 1 and e * q < 0: continue  # opposite
        r = (e_hat + q_hat) / np.linalg.norm(e_hat + q_hat)
        R = np.eye(dim) - 2 * np.outer(r, r) + 2 * np.outer(q_hat, e_hat)
        assert np.allclose(R @ R.T, np.eye(dim)) and np.allclose(R @ e_hat, q_hat)
        assert np.allclose(x.grad, np.linalg.norm(q) / np.linalg.norm(e) * R.T @ g)


@pytest.mark.parametrize("kind", ["zero latent", "zero code", "both zero", "opposite"])
def test_where_there_is_no_rotation_the_gradient_goes_straight_through(kind):
    g = torch.Generator().manual_seed(0)
    x, q = torch.randn(2000, 7, generator=g), torch.randn(2000, 7, generator=g)
    if "latent" in kind or "both" in kind: x[:] = 0
    if "code" in kind or "both" in kind: q[:] = 0
    if kind == "opposite": q = -x * torch.rand(2000, 1, generator=g)
    x.requires_grad_(True)
    out = rotate_to(x, q)
    out.backward(torch.ones_like(out))
    assert torch.allclose(out, q, atol=1e-5) and torch.equal(x.grad, torch.ones_like(x))


def test_the_rotation_trains_also_where_vectors_are_zero(kmeans):
    some = X.copy()
    some[::10] = 0
    m = RQVAE.from_rq_kmeans(kmeans, layers=[16], gradient="rotation", lr=1e-3, batch_size=64, epochs=3)
    start = m.score(some)["relative_mse"]
    assert m.fit(some).score(some)["relative_mse"] <= start and m.best_epoch_ > 0


# --- RQ-KMeans+

@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("offset, scale", [(0, 1), (3, 1), (0, 1e-6), (0, 1e6)])
def test_rq_kmeans_plus_starts_as_rq_kmeans_to_the_digit(metric, offset, scale):
    X = clouds(1, offset=offset * scale, scale=scale)
    start = RQKMeans(3, [8, 6, 5], metric=metric, random_state=0).fit(X)
    plus = RQVAE.from_rq_kmeans(start, layers=[16, 8], random_state=0)
    codes = start.encode(X)
    assert (plus.encode(X) == codes).all() and (plus.decode(codes) == start.decode(codes)).all()
    assert (plus.decode(codes[:, :1]) == start.decode(codes[:, :1])).all()
    ours, costs = plus.encode(X, beam_size=4, return_alternatives=3)
    theirs, wanted = start.encode(X, beam_size=4, return_alternatives=3)
    assert (ours == theirs).all() and np.allclose(costs * plus.scale_**2, wanted, rtol=1e-6)


@pytest.mark.parametrize("best_by", ["relative_mse", "collision_rate"])
@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_rq_kmeans_plus_never_ends_worse_than_it_starts(kmeans, best_by, lr):
    plus = RQVAE.from_rq_kmeans(kmeans, layers=[16], lr=lr, batch_size=128, epochs=4, best_by=best_by,
                                random_state=0).fit(X)
    of = {"relative_mse": lambda m: m.score(X)["relative_mse"],
          "collision_rate": lambda m: collision_rate_per_level(m.encode(X))[-1]}[best_by]
    assert of(plus) <= of(kmeans) * (1 + 1e-6)
    if plus.best_epoch_ == 0: assert (plus.encode(X) == kmeans.encode(X)).all()
    if lr == 1e-3 and best_by == "relative_mse": assert of(plus) < of(kmeans)


def test_best_by_both_is_worse_in_neither(tmp_path):
    start = RQKMeans(3, 8, random_state=0).fit(X)
    collisions = lambda m: collision_rate_per_level(m.encode(X))[-1]
    def plus(best_by, epochs=6, **options):
        return RQVAE.from_rq_kmeans(start, layers=[16], lr=1e-2, batch_size=128, epochs=epochs,
                                    random_state=0, best_by=best_by).fit(X, **options)
    both = plus("both")
    assert collisions(both) <= collisions(start) < collisions(plus("relative_mse"))
    assert both.score(X)["relative_mse"] < start.score(X)["relative_mse"]
    rates, errors = both.history_["collision_rate"], both.history_["relative_mse"]
    allowed = [error for rate, error in zip(rates, errors) if rate <= collisions(start)]
    assert errors[both.best_epoch_ - 1] == min(allowed) > min(errors)
    plus("both", 2, checkpoint=tmp_path / "c")
    resumed = plus("both", checkpoint=tmp_path / "c", resume=True)
    assert resumed.fingerprint() == both.fingerprint() and resumed.history_ == both.history_
    fresh = model(best_by="both").fit(X)  # with no start that counts it is the error
    assert fresh.history_["both"] == fresh.history_["relative_mse"]


@pytest.mark.parametrize("best_by", ["relative_mse", "collision_rate"])
def test_that_holds_for_more_vectors_than_the_codes_follow(best_by, monkeypatch):
    "The codes follow some of the vectors; all of them judge."
    many = np.random.default_rng(0).normal(size=(6000, 8)).astype(np.float32)
    start = RQKMeans(2, 200, random_state=0).fit(many)
    monkeypatch.setattr(rq_vae_training, "FOLLOWED", 1000)
    options = dict(layers=[8], lr=1e-7, epochs=2, best_by=best_by, random_state=0)
    plus = RQVAE.from_rq_kmeans(start, **options).fit(many)
    of = {"relative_mse": lambda m: m.score(many)["relative_mse"],
          "collision_rate": lambda m: collision_rate_per_level(m.encode(many))[-1]}[best_by]
    assert of(plus) <= of(start) * (1 + 1e-6)
    noted = [of(start), *plus.history_[best_by]][plus.best_epoch_]
    assert noted == pytest.approx(of(plus), rel=1e-3)


def test_a_checkpoint_of_another_start_is_refused(tmp_path, kmeans):
    options = dict(layers=[16], epochs=2, random_state=0)
    RQVAE.from_rq_kmeans(kmeans, **options).fit(X, checkpoint=tmp_path / "c")
    other = RQKMeans(3, [8, 6, 5], random_state=9).fit(X[::-1][:300])
    with pytest.raises((ConfigError, DataError)):
        RQVAE.from_rq_kmeans(other, **options).fit(X, checkpoint=tmp_path / "c", resume=True)
    RQVAE.from_rq_kmeans(kmeans, **options).fit(X, checkpoint=tmp_path / "c", resume=True)


@pytest.mark.parametrize("wrong", [
    dict(epochs=-1), dict(warmup_epochs=-1), dict(lr=-1), dict(weight_decay="a"), dict(dropout_prob=2),
    dict(random_state=-1), dict(patience=0), dict(sk_epsilons=[np.nan]), dict(kmeans_iters=-5),
    dict(batch_size=2.5), dict(batch_size="a"), dict(layers=5), dict(layers=[1.5]), dict(sk_epsilons=0.01),
    dict(lr_gamma="x"), dict(lr_gamma=-3), dict(restart_below="a"), dict(restart_below=np.nan),
    dict(e_dim=0)])
def test_settings_that_make_no_sense_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))): RQVAE(12, [8, 6], **wrong)


def test_rq_kmeans_plus_can_be_chosen_by_the_loss_of_training(kmeans):
    plus = RQVAE.from_rq_kmeans(kmeans, layers=[16], epochs=3, best_by="loss", random_state=0).fit(X)
    assert plus.best_epoch_ == 1 + int(np.argmin(plus.history_["loss"]))


def test_the_three_ways_to_rq_kmeans_plus(tmp_path, kmeans):
    kmeans.save(tmp_path / "kmeans")
    path, options = tmp_path / "kmeans" / "codebooks.npz", dict(layers=[16], epochs=2, random_state=0)
    shape = dict(in_dim=12, num_emb_list=[8, 6, 5], e_dim=12)
    one = RQVAE.from_rq_kmeans(kmeans, **options).fit(X)
    two = RQVAE(**shape, **options).fit(X, pretrained_codebook_path=str(path))
    assert one.fingerprint() == two.fingerprint() and two.residual
    three = RQVAE(**shape, **options)
    apply_rqkmeans_plus_strategy(three.module, path)
    three.fit(X).save(tmp_path / "three")
    assert three.residual and three.score(X)["relative_mse"] <= kmeans.score(X)["relative_mse"] * (1 + 1e-6)
    assert (RQVAE.load(tmp_path / "three").encode(X) == three.encode(X)).all()


def test_codebooks_of_another_metric_are_refused(tmp_path):
    cosine = RQKMeans(2, [8, 6], metric="cosine", random_state=0).fit(X)
    cosine.save(tmp_path)
    shape = dict(in_dim=12, num_emb_list=[8, 6], e_dim=12, layers=[16], epochs=1, random_state=0)
    with pytest.raises(ConfigError, match="cosine"):
        RQVAE(**shape).fit(X, pretrained_codebook_path=tmp_path / "codebooks.npz")
    same = RQVAE(**shape, metric="cosine").fit(X, pretrained_codebook_path=tmp_path / "codebooks.npz")
    assert same.score(X)["relative_mse"] <= cosine.score(X)["relative_mse"] * (1 + 1e-6)


@pytest.mark.parametrize("best_by", ["relative_mse", "collision_rate"])
def test_a_second_fit_is_never_worse_than_the_first(best_by):
    m = model(epochs=3, best_by=best_by).fit(X)
    of = {"relative_mse": lambda: m.score(X)["relative_mse"],
          "collision_rate": lambda: collision_rate_per_level(m.encode(X))[-1]}[best_by]
    before, m.lr = of(), 0.5
    assert m.fit(X) is m and of() <= before * (1 + 1e-6)


def test_codebook_files_that_are_none(tmp_path, kmeans):
    kmeans.save(tmp_path)
    good, bad = (tmp_path / "codebooks.npz").read_bytes(), tmp_path / "bad.npz"
    books = dict(enumerate(kmeans.codebooks_))
    def arrays(**named): np.savez(bad, **named)
    broken = [*[lambda raw=raw: bad.write_bytes(raw) for raw in (b"", good[:200], b"\x80N.")],
              lambda: arrays(a=books[0]), lambda: arrays(codebook_0=books[0], codebook_2=books[1]),
              lambda: arrays(codebook_0=np.array([{}])), lambda: arrays(codebook_0=books[0] * np.nan),
              lambda: bad.write_bytes(pickle.dumps(books))]
    for break_it in broken:
        break_it()
        with pytest.raises(ModelFormatError, match="can't be read as codebooks") as e: read_codebooks(bad)
        assert "\n" not in str(e.value)
    fresh = model(e_dim=12, num_emb_list=[8, 6, 7])
    before = state(fresh)
    for path, error in ((bad, ModelFormatError), (tmp_path / "codebooks.npz", ConfigError),
                        (tmp_path / "none.npz", FileNotFoundError)):
        with pytest.raises(error): fresh.fit(X, pretrained_codebook_path=path)
    assert state(fresh) == before
    with pytest.raises(NotFittedError): RQVAE.from_rq_kmeans(RQKMeans(2, 4))


def test_a_prefix_shares_nothing_with_the_model(kmeans):
    plus = model(e_dim=12, num_emb_list=[8, 6, 5], epochs=1).fit(X + 5)
    mark, part = plus.fingerprint(), plus.prefix(2)
    part._start_from(kmeans.codebooks_[:2])
    assert plus.fingerprint() == mark and plus.mean_.any()


# --- codes

@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"bn": True}])
def test_codes_are_those_of_latents_and_codebooks(options):
    m = model(epochs=2, **options).fit(X)
    latents, books = m.latents(X), m.codebooks_
    assert latents.shape == (400, 5) and latents.dtype == np.float32
    codes = m.encode(X)
    assert codes.shape == (400, 2) and codes.dtype == np.int32
    assert (codes == residual_codes(latents, books)).all()
    ranked, costs = m.encode(X, beam_size=48, return_alternatives=48)  # all codes there are
    sums = (books[0][:, None].astype(np.float64) + books[1]).reshape(48, -1)
    gaps = ((latents[:, None].astype(np.float64) - sums) ** 2).sum(-1)
    assert np.allclose(costs, np.sort(gaps, axis=1), rtol=1e-9, atol=1e-12)
    assert np.allclose(np.take_along_axis(gaps, ranked[..., 0] * 6 + ranked[..., 1], 1), costs, atol=1e-12)
    assert (np.sort(ranked[..., 0] * 6 + ranked[..., 1], axis=1) == np.arange(48)).all()
    assert (m.encode(X, beam_size=48) == ranked[:, 0]).all()
    assert (m.encode(X, beam_size=1, return_alternatives=1)[0][:, 0] == codes).all()
    few = m.encode(X[::-1][:37], beam_size=5, return_alternatives=3, batch_size=7)
    for a, b in zip(few, m.encode(X, beam_size=5, return_alternatives=3)): assert (a == b[::-1][:37]).all()
    assert (m.prefix(1).encode(X)[:, 0] == codes[:, 0]).all()
    for bad in ({"beam_size": 0}, {"return_alternatives": 2}, {"beam_size": 50, "return_alternatives": 49},
                {"batch_size": 0}):
        with pytest.raises(ConfigError): m.encode(X, **bad)


def test_threads_change_no_code_and_runs_repeat_on_several(fitted):
    codes, latents = fitted.encode(X), fitted.latents(X)
    assert (fitted.encode(X.astype(np.float64).tolist(), batch_size=3) == codes).all()
    try:
        torch.set_num_threads(2)
        assert (fitted.encode(X) == codes).all()
        assert np.allclose(fitted.latents(X), latents, rtol=1e-6, atol=1e-7)
        assert model(epochs=1).fit(X).fingerprint() == model(epochs=1).fit(X).fingerprint()
    finally: torch.set_num_threads(1)


# --- files

def test_what_is_saved_comes_back(tmp_path):
    options = dict(dropout_prob=0.1, bn=True, loss_type="l1", quant_loss_weight=0.5, beta=0.5, kmeans_iters=7,
                   sk_epsilons=[0.0, 0.01], sk_iters=9, lr=2e-3, weight_decay=0.01, lr_scheduler="step",
                   warmup_epochs=1, lr_step_size=2, lr_gamma=0.9, metric="cosine", gradient="rotation",
                   best_by="collision_rate", patience=9, restart_below=0.2)
    m = model(**options).fit(X)
    m.save(tmp_path / "model")
    again = RQVAE.load(str(tmp_path / "model"))
    settings = {**SHORT, **options, "random_state": 0}
    assert {name: getattr(again, name) for name in settings} == settings
    assert again.history_ == m.history_ and again.best_epoch_ == m.best_epoch_
    assert again.fingerprint() == m.fingerprint() and (again.encode(X) == m.encode(X)).all()
    assert (again.decode(m.encode(X)) == m.decode(m.encode(X))).all()
    assert state(again.fit(X))[0] == state(m.fit(X))[0]  # and training goes on in the same way
    again.save(tmp_path / "model")
    assert RQVAE.load(tmp_path / "model").fingerprint() == m.fingerprint()
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["metadata.json", "model.safetensors"]


def test_numbers_of_numpy_are_numbers(tmp_path):
    i, f = np.int64, np.float32
    m = RQVAE(i(12), np.array([8, 6]), i(5), (i(16),), f(0), np.bool_(False), "mse", f(1), f(0.25),
              np.bool_(True), i(5), np.array([0, 0.01]), i(5), f(1e-3), f(0), i(128), i(2), None, i(0), i(50),
              f(0.5), random_state=i(0), patience=i(4), restart_below=f(0.1))
    m.fit(X)
    m.save(tmp_path / "model")
    m.fit(X, checkpoint=tmp_path / "training.safetensors")
    assert RQVAE.load(tmp_path / "model").epochs == 2


def two_models(first, fitted):
    "An RQVAE and an RQKMeans, and their fingerprints; the one of the kind `first` comes first."
    models = [fitted, RQKMeans(2, 8, random_state=0).fit(X)]
    if first == "RQKMeans": models.reverse()
    return models, [model.fingerprint() for model in models]


@pytest.mark.parametrize("first", ["RQVAE", "RQKMeans"])
def test_a_model_replaces_one_of_the_other_kind(tmp_path, fitted, first):
    (old, new), (_, mark) = two_models(first, fitted)
    for model in (old, new): model.save(tmp_path)
    weights = "codebooks.npz" if first == "RQVAE" else "model.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["metadata.json", weights])
    assert load_encoder(tmp_path).fingerprint() == type(new).load(tmp_path).fingerprint() == mark
    with pytest.raises(ModelFormatError): type(old).load(tmp_path)


@pytest.mark.parametrize("first", ["RQVAE", "RQKMeans"])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_killed_save_leaves_one_model_or_the_other(tmp_path, monkeypatch, fitted, first, done):
    (old, new), marks = two_models(first, fitted)
    old.save(tmp_path)
    left = iter([True] * done)
    def replace(*paths, replace=os.replace):
        if not next(left, False): raise KeyboardInterrupt
        replace(*paths)
    def remove(*args): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", replace)
    for module in (rq_kmeans, rq_vae): monkeypatch.setattr(module, "remove_other", remove)
    with pytest.raises(KeyboardInterrupt): new.save(tmp_path)
    monkeypatch.undo()
    assert load_encoder(tmp_path).fingerprint() == marks[done == 2]
    for model in (old, new):
        if model is (old, new)[done == 2]: type(model).load(tmp_path)
        else:
            with pytest.raises(ModelFormatError): type(model).load(tmp_path)
    new.save(tmp_path)
    assert load_encoder(tmp_path).fingerprint() == marks[1] and len([*tmp_path.iterdir()]) == 2


def test_weights_of_others_stay_where_an_rqkmeans_is_saved(tmp_path):
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    before, model = (tmp_path / "model.safetensors").read_bytes(), RQKMeans(2, 8, random_state=0).fit(X)
    model.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert load_encoder(tmp_path).fingerprint() == model.fingerprint()
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(ModelFormatError, match="two models"): load_encoder(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ModelFormatError, match="can't be read"): load_encoder(tmp_path)


def test_codebooks_of_others_stay_where_an_rqvae_is_saved(tmp_path, fitted):
    np.savez(tmp_path / "codebooks.npz", codebook_0=np.zeros((2, 2), np.float32))
    before = (tmp_path / "codebooks.npz").read_bytes()
    fitted.save(tmp_path)
    assert (tmp_path / "codebooks.npz").read_bytes() == before
    assert load_encoder(tmp_path).fingerprint() == fitted.fingerprint()


def test_an_engine_keeps_an_rqvae(tmp_path, fitted):
    engine = SemanticIdEngine(fitted)
    first = engine.unique_ids(X)
    engine.save(tmp_path / "engine")
    loaded = SemanticIdEngine.load(tmp_path / "engine")
    assert loaded.encoder.fingerprint() == fitted.fingerprint()
    assert len({*first, *loaded.unique_ids(X)}) == 800


class Evil:
    def __reduce__(self): return os.mkdir, ("/tmp/semid_was_here",)


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def retyped(path):
    from safetensors.torch import load_file, save_file
    file = path / "model.safetensors"
    save_file(load_file(file), file, {"semid": json.dumps({"type": "RQKMeans"})})


def reshaped(path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    file = path / "model.safetensors"
    with safe_open(file, framework="pt") as f: meta = json.loads(f.metadata()["semid"])
    save_file(load_file(file), file, {"semid": json.dumps({**meta, "e_dim": 6})})


def foreign(meta, weights=None):
    from safetensors.torch import save_file
    def write(path):
        (path / "model.safetensors").unlink()
        (path / "metadata.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
        if isinstance(weights, dict): save_file(weights, path / "model.safetensors")
        elif isinstance(weights, bytes): (path / "model.pt").write_bytes(weights)
        elif weights is not None: torch.save(weights, path / "model.pt")
    return write


def bare(path):
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(2)}, path / "model.safetensors")


@pytest.mark.parametrize("break_it", [
    *[lambda p, cut=cut: (f := p / "model.safetensors").write_bytes(f.read_bytes()[:cut])
      for cut in (0, 7, 300, -1)],
    lambda p: flip(p / "model.safetensors", -5), lambda p: flip(p / "model.safetensors", -400),
    lambda p: (p / "model.safetensors").write_bytes(pickle.dumps(Evil())),
    lambda p: np.savez(open(p / "model.safetensors", "wb"), a=np.zeros(3)),
    retyped, reshaped, bare,
    lambda p: [f.unlink() for f in p.iterdir()],
    foreign("[]", {}), foreign("null", {}), foreign("{", {}), foreign({"type": "RQKMeans"}), foreign({}),
    foreign({"type": "RQVAE"}), foreign({"type": "RQVAE", **SHAPE}, {"a": torch.zeros(2)}),
    foreign({"type": "RQVAE", **SHAPE}, Evil()), foreign({"type": "RQVAE", **SHAPE}, pickle.dumps(Evil())),
    foreign({"type": "RQVAE", **SHAPE}, torch.zeros(3)), foreign({"type": "RQVAE", **SHAPE}, ["mean"]),
    foreign({"type": "RQVAE", **SHAPE}, b""), foreign({"type": "RQVAE", **SHAPE, "layers": 5}, {}),
    foreign({"type": "RQVAE", **SHAPE, "num_emb_list": ["a"]}, {}),
    foreign({"type": "RQVAE", "metric": "dot"}, {}),
])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickled_and_foreign_folders_are_refused(tmp_path, fitted, break_it):
    fitted.save(tmp_path / "model")
    break_it(tmp_path / "model")
    with pytest.raises(ModelFormatError) as e: RQVAE.load(tmp_path / "model")
    said = str(e.value)
    assert str(tmp_path / "model") in said and "\n" not in said and len(said) < 500
    assert "weights_only" not in said  # no advice to unpickle it after all
    assert not os.path.exists("/tmp/semid_was_here")


def test_other_kinds_of_models(tmp_path, fitted, kmeans):
    kmeans.save(tmp_path / "kmeans")
    with pytest.raises(ModelFormatError, match="RQKMeans.*expected RQVAE"): RQVAE.load(tmp_path / "kmeans")
    fitted.save(tmp_path / "vae")
    with pytest.raises(ModelFormatError): RQKMeans.load(tmp_path / "vae")
    with pytest.raises(ModelFormatError): RQVAE.load(tmp_path / "nothing")


# --- input

def with_value(value):
    bad = X.copy()
    bad[7, 3] = value
    return bad


BAD = [(with_value(np.nan), DataError, "row 7"), (with_value(np.inf), DataError, "row 7"),
       (X[:0], ShapeMismatchError, "at least one sample"), (X[:, :5], ShapeMismatchError, "D=12, got D=5"),
       (X[0], ShapeMismatchError, "2-D"), ([["a"]], ShapeMismatchError, "numbers")]


@pytest.mark.parametrize("bad, error, words", BAD)
def test_bad_vectors_leave_the_model_as_it_was(tmp_path, bad, error, words):
    for m in (model(), model(epochs=1).fit(X), model(metric="cosine")):
        before = state(m)
        with pytest.raises(error, match=words) as e: m.fit(bad, checkpoint=tmp_path / "c")
        assert state(m) == before and "\n" not in str(e.value) and not (tmp_path / "c").exists()
        if not m._is_fitted: continue
        for use in (m.encode, m.latents, m.score, lambda bad, m=m: m.encode(bad, batch_size=2, beam_size=2)):
            with pytest.raises(error, match=words): use(bad)


def test_a_training_that_fails_leaves_the_model_as_it_was(fitted, kmeans):
    def interrupt(values, epoch): raise KeyboardInterrupt
    for m in (model(), model(kmeans_init=False), fitted, RQVAE.from_rq_kmeans(kmeans, layers=[16])):
        before = state(m)
        with pytest.raises(KeyboardInterrupt): m.fit(X + 1, log=interrupt)
        assert state(m) == before
        m.lr, lr = 1e30, m.lr
        with pytest.raises(SemidError, match="learning rate"): m.fit(X + 1)
        m.lr = lr
        assert state(m) == before


@pytest.mark.parametrize("best_by", ["relative_mse", "collision_rate", "loss"])
def test_weights_that_are_no_numbers_are_never_kept(best_by):
    m = model(lr=1e30, epochs=1, best_by=best_by, batch_size=400)
    with pytest.raises(SemidError, match="learning rate"): m.fit(X)


@pytest.mark.parametrize("options", [
    {"loss_type": "l3"}, {"lr_scheduler": "linear"}, {"gradient": "none"}, {"metric": "dot"},
    {"best_by": "loos"}, {"num_emb_list": []}, {"num_emb_list": [8, 0]}, {"layers": [0]}, {"batch_size": 0},
    {"sk_epsilons": [0.1]}, {"lr_step_size": 0}, {"residual": True}])
def test_settings_that_make_no_sense(options):
    with pytest.raises(ConfigError): model(**options)


def test_batch_normalisation_with_a_single_row_left_over():
    m = model(bn=True, batch_size=57).fit(X)  # 400 = 7 * 57 + 1
    assert len(m.history_["loss"]) == 4
    with pytest.raises(SemidError, match="nothing to train on"): model(bn=True).fit(X[:1])


@pytest.mark.parametrize("offset, scale", [(0, 1e-6), (1e3, 1), (0, 1e6)])
def test_size_and_place_of_vectors_hardly_matter(offset, scale, fitted):
    there = clouds(offset=offset, scale=scale)
    m = model().fit(there)
    spread = ((there - there.mean(0)).astype(np.float64) ** 2).mean()
    here = ((X - X.mean(0)).astype(np.float64) ** 2).mean()
    assert m.score(there)["mse"] / spread == pytest.approx(fitted.score(X)["mse"] / here, rel=0.25)


def test_few_and_equal_vectors():
    for some in (X[:1], X[:3], np.zeros((5, 12)), np.repeat(X[:2], 30, 0)):
        m = model(epochs=2).fit(some)
        assert np.isfinite(m.decode(m.encode(some))).all()


def test_unfitted():
    m = model()
    assert m.codebooks_ == [] and "not fitted" in repr(m)
    for use in (lambda: m.encode(X), lambda: m.decode([[0, 0]]), lambda: m.save("nowhere"), m.fingerprint,
                lambda: m.score(X), lambda: m.latents(X), lambda: m.prefix(1)):
        with pytest.raises(NotFittedError): use()
    with pytest.raises(DataError): model(epochs=1).fit(X).decode([[8, 0]])


def test_epochs_go_to_mlflow(tmp_path, monkeypatch):
    import mlflow

    from semid.tracking import start_run
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path / 'mlflow.db'}")
    model = RQVAE(6, [8, 8], 4, layers=[8], epochs=3, random_state=0)
    with start_run("train_rq_vae") as run:
        model.fit(np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32), log=run.log)
    client = mlflow.MlflowClient(tracking_uri=uri)
    metrics = {name: client.get_metric_history(run.run_id, name) for name in ("relative_mse", "perplexity.0")}
    logged = {name: [m.value for m in sorted(each, key=lambda m: m.step)] for name, each in metrics.items()}
    assert logged["relative_mse"] == pytest.approx(model.history_["relative_mse"])
    assert logged["perplexity.0"] == pytest.approx([levels[0] for levels in model.history_["perplexity"]])
