"The commands of the clustering room: both spellings, one clear sentence, a run that was killed goes on."
import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import SEMID, semid
from semid import KMeans, KMeansInference, read_features, write_features



@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "Three shards, the last 300 rows near-copies of the first, and the same rows as .npy."
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    X = rng.normal(size=(5700, 24))
    X = np.concatenate([X, X[:300] + rng.normal(size=(300, 24)) * 0.01]).astype(np.float32)
    for i in range(3):
        rows = range(2000 * i, 2000 * i + 2000)
        write_features(folder / f"features_{i}.parquet", [f"item-{j}" for j in rows], X[rows.start:rows.stop])
    np.save(folder / "features.npy", X)
    return folder


def test_the_documented_commands(shards, tmp_path):
    urls = f"{shards}/features_*.parquet"
    semid("kmeans", "train", "--data-urls", urls, "--n-clusters", 12, "--n-workers", 2, "--output-dir",
          "training", "--model-path", "models/kmeans", "--max-iter", 25, "--seed", 42, "-q", cwd=tmp_path)
    semid("kmeans", "train_local", "--features_path", shards / "features.npy", "--n_clusters", 12,
          "--output_path", "models/local", "--max_iter", 25, "--random_state", 42, "-q", cwd=tmp_path)
    shared, local = (KMeansInference(tmp_path / "models" / name) for name in ("kmeans", "local"))
    assert shared.centroids.tobytes() == local.centroids.tobytes()
    semid("kmeans", "assign", "--model-path", "models/kmeans", "--data-urls", urls, "--output-dir", "out",
          "-q", cwd=tmp_path)
    semid("dedup", shards, "-o", "unique", "--kept", "kept.parquet", "--model", "models/kmeans", "-q",
          cwd=tmp_path)
    kept, _ = read_features(tmp_path / "kept.parquet")
    assert len(kept) == 5700
    removed = pq.read_table(tmp_path / "unique" / "removed.parquet")
    assert min(removed["cosine"].to_pylist()) >= 0.95


def test_a_set_against_another(shards, tmp_path):
    semid("dedup", shards / "features_2.parquet", "--against", shards / "features_0.parquet", "--against",
          shards / "features_1.parquet", "-o", "leaks", "-q", cwd=tmp_path)
    removed = pq.read_table(tmp_path / "leaks" / "removed.parquet")
    assert set(removed["id"].to_pylist()) == {f"item-{j}" for j in range(5700, 6000)}
    bad = np.ones((20, 24), np.float32)
    bad[3] = 0
    write_features(tmp_path / "bad.parquet", [f"bad-{i}" for i in range(20)], bad)
    done = semid("dedup", shards / "features_2.parquet", "--against", tmp_path / "bad.parquet", "-o", "more",
                 "--max-bad-fraction", 0.1, "--quarantine", "q.parquet", "-q", cwd=tmp_path)
    assert "2,000 of 2,000 items kept" in done.stdout and ", 0 quarantined" in done.stdout
    assert "of the other set 1 of 20 items quarantined" in done.stdout
    assert pq.read_table(tmp_path / "q.parquet")["id"].to_pylist() == ["bad-3"]


@pytest.mark.parametrize("words, says", [
    (["kmeans", "train", "--model-path", "m"], "--data-urls"),
    (["kmeans", "train", "--model-path", "m", "--data-urls", "nothing/*.parquet"], "no Parquet file"),
    (["kmeans", "train-local", "--features-path", "x.pkl", "--output-path", "m"], "pickle"),
    (["kmeans", "assign", "--model-path", "none", "--data-urls", "{}", "--output-dir", "o"], "no KMeans"),
    (["dedup", "{}", "-o", "o", "--threshold", "1.5"], "threshold"),
    (["dedup", "{}", "-o", "o", "--clusters", "many"], "whole numbers"),
])
def test_what_cannot_be_done_is_said_in_one_sentence(words, says, shards, tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04N.")
    before = set(tmp_path.iterdir())
    done = semid(*(w.format(shards / "features_0.parquet") for w in words), cwd=tmp_path, check=False)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 2
    left = {p for new in set(tmp_path.iterdir()) - before for p in [new, *new.rglob("*")] if p.is_file()}
    assert {p.name for p in left} <= {".lock"}


def test_dedup_overwrites_nothing_that_is_not_its_own(tmp_path):
    X = np.eye(8, dtype=np.float32)
    write_features(tmp_path / "items.parquet", [f"i{i}" for i in range(8)], X)
    before = (tmp_path / "items.parquet").read_bytes()
    for words, says in ((["-o", "."], "not ours"), (["-o", "u", "--kept", "u/kept.parquet"], "another file")):
        done = semid("dedup", "items.parquet", *words, cwd=tmp_path, check=False)
        assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "items.parquet").read_bytes() == before and not (tmp_path / "u").exists()
    words = "kmeans train --data-urls-file items.parquet --output-dir o --model-path m".split()
    done = semid(*words, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "can't be read" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words, says", [
    (["--kept", "old.parquet"], "old.parquet is what is read"),
    (["--kept", "new.parquet"], "new.parquet is what is read"),
    (["--quarantine", "old.parquet"], "old.parquet is what is read"),
    (["--kept", "folder"], "folder is a folder"),
    (["--n-workers", 1, "--address", "10.255.0.1:6379"], "give staging")])
def test_dedup_refuses_before_the_search_to_overwrite_what_it_reads(words, says, tmp_path):
    (tmp_path / "folder").mkdir()
    X = np.eye(8, dtype=np.float32)
    paths = [write_features(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(8)], X)
             for name in ("new", "old")]
    before = [path.read_bytes() for path in paths]
    done = semid("dedup", paths[0].name, "--against", paths[1].name, "-o", "u", *words, cwd=tmp_path,
                 check=False)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert before == [path.read_bytes() for path in paths] and not (tmp_path / "u").exists()


def test_dedup_says_what_the_miss_rate_rests_on(shards, tmp_path):
    done = semid("dedup", shards, "-o", "u", "--clusters", 60, "--probes", 1, "-q", cwd=tmp_path)
    assert re.search(r"; \d+\.\d% \(\d+\.\d% to \d+\.\d%\) of the pairs are missed, by \d+ sampled pairs$",
                     done.stdout.strip()), done.stdout
    done = semid("dedup", shards, "-o", "v", "--clusters", 60, "--threshold", 1, "-q", cwd=tmp_path)
    assert done.stdout.strip().endswith("is unknown, no sampled item is in one")


def killed_in_an_iteration(words, cwd, progress):
    "Start a run of its own process group, and kill them all once three iterations are noted."
    run = subprocess.Popen([SEMID, *words], cwd=cwd, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < until:
        if progress.exists() and json.loads(progress.read_text())["iteration"] >= 3: break
        time.sleep(0.01)
    with suppress(ProcessLookupError): os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    return json.loads(progress.read_text())


@pytest.mark.parametrize("n_workers", ["0", "2"])
def test_a_killed_training_goes_on(tmp_path, n_workers):
    if n_workers != "0": pytest.importorskip("ray")
    X = np.random.default_rng(0).random((20_000, 2), np.float32)
    write_features(tmp_path / "plane.parquet", [f"item-{i}" for i in range(len(X))], X)
    whole = KMeans(30, tol=0, max_iter=80, random_state=42).fit(X)
    whole.save(tmp_path / "whole")
    words = ("kmeans train --data-urls plane.parquet --n-clusters 30 --tol 0 --max-iter 80 --output-dir run "
             f"--rows-per-shard 9000 --n-workers {n_workers} --model-path model -q").split()
    path = tmp_path / "run" / "progress.json"
    progress = killed_in_an_iteration(words, tmp_path, path)
    assert progress["status"] == "running" and 3 <= progress["iteration"] < whole.n_iter_ - 10
    assert not (tmp_path / "model").exists()
    if n_workers == "0": assert "unfinished run" in semid(*words, cwd=tmp_path, check=False).stderr
    progress["history"][0]["mark"] = "noted before the kill"
    path.write_text(json.dumps(progress))
    semid(*words, "--resume", cwd=tmp_path)
    progress = json.loads(path.read_text())
    assert progress["status"] == "finished" and "mark" in progress["history"][0]  # it did not start anew
    models = [tmp_path / name / "model.safetensors" for name in ("whole", "model")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_training_starts_with_what_the_documentation_names(shards, tmp_path):
    files = [shards / f"features_{n}.parquet" for n in range(3)]
    semid("kmeans", "train", "--data_urls", files[0], files[1], files[2], "--n_clusters", 4, "--n_workers", 0,
          "--max_iter", 2, "--output_dir", "./kmeans_training", "-q", cwd=tmp_path)
    about = json.loads((tmp_path / "models" / "kmeans" / "metadata.json").read_text())
    assert about["n_samples"] == 6000 and about["n_clusters"] == 4


def test_columns_and_tolerance_of_local_training(shards, tmp_path):
    X = np.load(shards / "features.npy")
    write_features(tmp_path / "x.parquet", range(len(X)), X, id_column="sku", feature_column="embedding")
    semid("kmeans", "train-local", "--features-path", "x.parquet", "--id-column", "sku", "--feature-column",
          "embedding", "--n-clusters", 12, "--tol", 0.01, "--output-path", "model", "-q", cwd=tmp_path)
    few, many = (KMeans(12, random_state=42, tol=tol).fit(X) for tol in (0.01, 1e-4))
    about = json.loads((tmp_path / "model" / "metadata.json").read_text())
    assert about["n_iter"] == few.n_iter_ < many.n_iter_
    assert KMeansInference(tmp_path / "model").centroids.tobytes() == few.cluster_centers_.tobytes()


def test_a_model_without_room_is_refused_before_the_fit(shards, tmp_path):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    for place, says in ("taken", "taken is a file"), ("checkpoint", "no KMeans model"):
        for words in (["train", "--data-urls", shards, "--output-dir", "run", "--model-path"],
                      ["train-local", "--features-path", shards / "features.npy", "--output-path"]):
            done = semid("kmeans", *words, place, "-q", cwd=tmp_path, check=False)
            assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists() and (tmp_path / "taken").read_text() == "mine"
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == b"weights"


def test_slips_and_damage_are_one_sentence_too(shards, tmp_path):
    urls, out = f"{shards}/features_0.parquet", tmp_path / "run"
    train = ["kmeans", "train", "--data-urls", urls, "--n-clusters", 3, "--n-workers", 0, "--max-iter", 2,
             "--output-dir", out, "--model-path", tmp_path / "model", "-q"]
    semid(*train, cwd=tmp_path)
    whole = (out / "progress.json").read_text()
    KMeans(2, random_state=0).fit(np.eye(4)).save(tmp_path / "other")
    dedup = ["dedup", urls, "-o", tmp_path / "unique", "-q"]
    for words, progress, says in [
            ([*train, "--resume"], whole[:-9], "progress.json is damaged"),
            ([*train, "--resume"], "[]", "not that of a k-means run"),
            ([*train, "--resume"], whole.replace("marks", "mars"), "no whole 'marks'"),
            ([*train, "--tol", "nan"], whole, "tol must be a number from 0, not nan"),
            ([*dedup, "--threshold", "nan"], whole, "threshold must be a number above 0"),
            ([*dedup, "--model", tmp_path / "other"], whole, "D=24 and the model's centroids have D=4"),
            ([*dedup, "--max-pairs", 1, "--threshold", 0.3], whole, "raise max_pairs"),
            ([*dedup, "--max-pairs", 1, "--threshold", 0.3, "--n-workers", 2], whole, "raise max_pairs")]:
        (out / "progress.json").write_text(progress)
        done = semid(*words, cwd=tmp_path, check=False)
        assert done.returncode == 1 and done.stderr.startswith("semid: ") and says in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
