"Sweeps: a kill loses only the point in work, the bytes are the same however it ran, and what fails is named."
import json
import os
import signal
import subprocess
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SEMID, semid
from semid import RQKMeans, SemidError, evaluate, write_features
from semid.semantic_ids.grid import code_fingerprint, grid_points, run_grid
from semid.semantic_ids.lengths import evaluate_lengths
from semid.semantic_ids.pareto import over_seeds, pareto_front, recommend
from semid.semantic_ids.sweep import sweep

semid = partial(semid, check=False)
GRID = ["--implementation", "kmeans,constrained", "--n_clusters", "4", "--n-clusters", "8",
        "--slack", "0,0.5", "--seeds", "0,1", "--n-levels", "3", "--max_iter", "8", "--device", "cpu", "-q"]
N_POINTS = 2 * 2 * (1 + 2)


def contents(folder):
    "Every file's bytes; the empty lock aside."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}


def rows_of(*vectors): return np.array([f"item-{i}" for i in range(len(vectors[0]))]), *vectors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Vectors, held-out vectors, and the folder of a sweep that nobody disturbed."
    folder = tmp_path_factory.mktemp("sweep")
    X = np.random.default_rng(0).normal(size=(2500, 12)).astype(np.float32)
    write_features(folder / "vectors.parquet", *rows_of(X[:2200]))
    write_features(folder / "unseen.parquet", *rows_of(X[2200:]))
    words = ["sweep", folder / "vectors.parquet", "--heldout", folder / "unseen.parquet", *GRID]
    run = semid(*words, "-o", folder / "whole", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert f"{N_POINTS} points fitted" in run.stdout and "Recommended: " in run.stdout
    return words, folder / "whole"


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_a_killed_sweep_goes_on_where_it_was(made, tmp_path):
    words, whole = made
    running = subprocess.Popen([SEMID, *map(str, words), "-o", str(tmp_path / "out")], cwd=tmp_path)
    points, deadline = tmp_path / "out" / "points", time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
        running.send_signal(signal.SIGSTOP)  # it can't run away while we look
        if len(list(points.glob("*.json"))) >= 4: break
        running.send_signal(signal.SIGCONT)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it ended before it could be killed"
    before = {path: path.stat().st_mtime_ns for path in points.glob("*.json")}
    assert 4 <= len(before) < N_POINTS and not (tmp_path / "out" / "sweep.csv").exists()

    run = semid(*words, "-o", tmp_path / "out", cwd=tmp_path)
    assert run.returncode == 0 and f"{len(before)} were there" in run.stdout, run.stderr + run.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "out") == contents(whole)


def test_two_workers_write_the_same_bytes_and_go_on_when_points_fail(made, tmp_path):
    words, whole = made
    run = semid(*words, "--n-clusters", "5000", "-o", tmp_path / "out", "--n_workers", 2, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith(f"semid: 6 of {N_POINTS + 6} points failed"), run.stderr
    assert contents(tmp_path / "out") == contents(whole)


@pytest.fixture(scope="module")
def X(): return np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32)


def grid(X, folder, *sizes, n_levels=2, **options):
    points = grid_points(n_clusters=sizes)
    return run_grid(points, X, folder, n_levels=n_levels, max_iter=5, device="cpu", **options)


def test_a_grid_that_changes_keeps_what_it_still_holds(X, tmp_path):
    grid(X, tmp_path, 4, 8)
    (tmp_path / "notes.txt").write_text("mine")
    assert not grid(X, tmp_path, 8).removed and (tmp_path / "kmeans-K4-seed0.json").exists()
    changed = grid(X, tmp_path, 8, 16, prune=True)
    assert (changed.made, changed.found, changed.removed) == (["kmeans-K16-seed0"], ["kmeans-K8-seed0"],
                                                              ["kmeans-K4-seed0"])
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock", "notes.txt", *(f"kmeans-K{k}-seed0{end}" for k in (8, 16) for end in ("", ".json"))}
    assert not changed.notes
    other = X.copy()
    other[0, 0] += 1e-3
    assert grid(other, tmp_path, 8, 16).notes[0].endswith("made from other data: made again")
    assert len(grid(other, tmp_path, 8, 16, n_levels=3).made) == 2


@pytest.mark.parametrize("harm", ["cut", "number", "model", "no model", "list"])
def test_what_is_corrupt_is_made_again_with_a_word(harm, X, tmp_path):
    grid(X, tmp_path, 4, 8)
    whole, file = contents(tmp_path), tmp_path / "kmeans-K4-seed0.json"
    model = tmp_path / "kmeans-K4-seed0" / "codebooks.npz"
    if harm == "cut": file.write_bytes(file.read_bytes()[:-30])
    if harm == "number": file.write_text(file.read_text().replace('"n_samples": 400', '"n_samples": 401', 1))
    if harm == "list": file.write_text("[]")
    if harm == "model": model.write_bytes(model.read_bytes()[:200])
    if harm == "no model": model.unlink()
    healed = grid(X, tmp_path, 4, 8)
    assert len(healed.notes) == 1 and "K4" in healed.notes[0] and "corrupt" in healed.notes[0]
    assert (healed.made, healed.found) == (["kmeans-K4-seed0"], ["kmeans-K8-seed0"])
    assert contents(tmp_path) == whole


def test_a_point_that_fails_is_named_and_the_others_go_on(X, tmp_path):
    write_features(tmp_path / "vectors.parquet", *rows_of(X))
    words = ["sweep", "vectors.parquet", "-o", "out", "--n-clusters", "4,500,8", "--levels", 2, "-q"]
    run = semid(*words, cwd=tmp_path)
    assert run.returncode == 1
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("semid: 1 of 3 points failed"), run.stderr
    assert "kmeans-K500-seed0" in lines[0] and "n_samples=400 should be >= n_clusters=500" in lines[0]
    assert "Recommended: " in run.stdout and (tmp_path / "out" / "pareto.png").exists()
    table = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 2

    points, folder = grid_points(n_clusters=[4, 500, 8]), tmp_path / "out" / "points"
    options = dict(n_levels=2, max_iter=100, n_init=1)
    again = run_grid(points, X, folder, **options)
    assert (again.made, len(again.found), [*again.failed]) == ([], 2, ["kmeans-K500-seed0"])
    fresh = run_grid(points, X, folder, fresh=True, **options)
    assert (len(fresh.made), fresh.found, fresh.rows) == (2, [], again.rows)


def test_the_other_points_of_a_failed_sweep_are_at_hand(X):
    with pytest.raises(SemidError, match="1 of 2 points failed") as caught:
        sweep(X, 2, [4, 500], max_iter=5)
    assert caught.value.rows["n_clusters"].tolist() == [4, 4]


def test_two_sweeps_do_not_share_a_folder(X, tmp_path):
    import fcntl
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another run is at work"): grid(X, tmp_path, 4)


def test_comments_make_no_point_again_and_code_does(tmp_path, monkeypatch):
    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("# one\nfrom .b import x\n")
    (package / "b.py").write_text("x = 1\n")
    (package / "c.py").write_text("y = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = code_fingerprint("toy_package.a")
    (package / "a.py").write_text("# two\n\nfrom .b import x\n")
    (package / "c.py").write_text("y = 2\n")
    assert code_fingerprint("toy_package.a") == first
    (package / "b.py").write_text("x = 2\n")
    assert code_fingerprint("toy_package.a") != first


def check_same(a, b):
    assert set(a) == set(b)
    for name in a:
        if isinstance(a[name], dict): check_same(a[name], b[name])
        elif a[name] is None: assert b[name] is None
        else: np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-12, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(6, 60),
       st.integers(1, 12), st.sampled_from(["l2", "cosine"]))
def test_every_length_is_what_evaluate_says_of_it(seed, sizes, n, k, metric):
    rng = np.random.default_rng(seed)
    X = rng.integers(-2, 3, size=(n, 3)).astype(np.float32) + [0, 0, 3]  # with rows that are there twice
    model = RQKMeans(len(sizes), sizes, metric=metric, random_state=0, max_iter=3).fit(X)
    codes, unseen = model.encode(X), rng.normal(size=(5, 3)).astype(np.float32)
    for length, report in enumerate(evaluate_lengths(X, codes, model, k=k, X_heldout=unseen), 1):
        check_same(report, evaluate(X, codes[:, :length], model.prefix(length), k=k, X_heldout=unseen))


numbers = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.5])
row = st.fixed_dictionaries({
    "implementation": st.sampled_from(["kmeans", "constrained"]), "n_clusters": st.sampled_from([16, 64]),
    "slack": st.just(None), "seed": st.integers(0, 2), "n_levels": st.integers(1, 4),
    "bits": st.integers(4, 9), "collision_rate": numbers, "relative_mse": numbers})


@settings(max_examples=200, deadline=None)
@given(st.lists(row, min_size=1, max_size=12, unique_by=lambda r: json.dumps([r[n] for n in (
    "implementation", "n_clusters", "seed", "n_levels")])), numbers)
def test_nothing_beats_what_is_recommended(rows, limit):
    merged, front, found = over_seeds(rows), pareto_front(rows), recommend(rows, limit)
    goals = "bits", "collision_rate", "relative_mse"
    beats = lambda a, b: all(a[g] <= b[g] for g in goals) and any(a[g] < b[g] for g in goals)
    assert all(any(a == b for a in front) != any(beats(a, b) for a in merged) for b in merged)
    for r in merged: assert r["relative_mse_worst"] >= r["relative_mse"] - 1e-12
    near = recommend(rows, 1.0, max_relative_mse=limit)
    assert near.keeps == any(r["relative_mse_worst"] <= limit for r in merged)
    keeping = [r for r in merged if r["collision_rate_worst"] <= limit]
    assert found.keeps == bool(keeping)
    if not keeping: assert found.point["collision_rate"] == min(r["collision_rate"] for r in merged)
    else:
        assert found.point["bits"] == min(r["bits"] for r in keeping)
        assert not any(beats(r, found.point) for r in keeping)
    assert all(isinstance(s, str) and s.endswith(".") for s in found.reasons) and len(found.reasons) >= 4
