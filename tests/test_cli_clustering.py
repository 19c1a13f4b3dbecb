"The commands of the clustering room: both spellings, one clear sentence, a run that was killed goes on."
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from semid import KMeans, KMeansInference, read_features, write_features

SEMID = str(Path(sys.executable).with_name("semid"))


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


def semid(*words, cwd, check=True):
    done = subprocess.run([SEMID, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


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


def test_a_killed_training_goes_on(shards, tmp_path):
    words = ["kmeans", "train", "--data-urls", f"{shards}/features_*.parquet", "--n-clusters", "60",
             "--n-workers", "0", "--tol", "0", "--max-iter", "60", "-q"]
    semid(*words, "--output-dir", "whole", "--model-path", "whole/model", cwd=tmp_path)
    words += ["--output-dir", "killed", "--model-path", "killed/model"]
    run = subprocess.Popen([SEMID, *words], cwd=tmp_path, start_new_session=True)
    while run.poll() is None and not [*(tmp_path / "killed").glob("iter_[3-9]")]: time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    semid(*words, "--resume", cwd=tmp_path)
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert models[0].read_bytes() == models[1].read_bytes()


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
