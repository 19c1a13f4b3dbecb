"The command line: one sentence for what can't be done, nothing half-written, and a kill that loses nothing."
import errno
import os
import pickle
import signal
import sqlite3
import subprocess
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from conftest import SEMID, semid
from semid import RQVAE, RQKMeans, write_features
from semid.cli import main, options  # noqa: F401, with main all commands are known
from semid.semantic_ids.encoding import codes_of, read_ids

semid = partial(semid, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A model, and 60,000 vectors of which many share a code."
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60_000, 8)).astype(np.float32)
    write_features(folder / "vectors.parquet", np.array([f"item-{i}" for i in range(len(X))]), X)
    RQKMeans(3, 24, random_state=0, max_iter=5).fit(X[:5000]).save(folder / "model")
    return folder


def table(path, ids, feature, kind=None):
    pq.write_table(pa.table({"id": ids, "feature": pa.array(feature, kind or pa.list_(pa.float32()))}), path)


ROWS = [[1.0, 2.0, 3.0, 4.0]] * 6


def nan(folder): table(folder / "in.parquet", list("abcdef"), [*ROWS[:5], [1.0, float("nan"), 3.0, 4.0]])
def wrong_dimension(folder): table(folder / "in.parquet", list("abcdef"), [*ROWS[:5], [1.0]])
def empty(folder): table(folder / "in.parquet", pa.array([], pa.string()), [])
def twice(folder): table(folder / "in.parquet", list("abcdea"), ROWS)
def few(folder): table(folder / "in.parquet", list("abcdef"), ROWS)


def truncated(folder):
    few(folder)
    whole = (folder / "in.parquet").read_bytes()
    (folder / "in.parquet").write_bytes(whole[:-20])


def no_file(folder): pass


def test_held_out_vectors_are_read_before_anything_is_written(made, tmp_path):
    holes = [*ROWS[:4], [1.0, float("nan"), 3.0, 4.0], ROWS[0]]
    for name, ids in (("seen", "abcdef"), ("unseen", "ghijkl")):
        table(tmp_path / f"{name}.parquet", list(ids), np.add(holes, np.arange(6)[:, None]).tolist())
    before = (tmp_path / "unseen.parquet").read_bytes()
    words = ["sweep", "seen.parquet", "--heldout", "unseen.parquet", "-o", "out", "--levels", 1, "--clusters",
             2, "--k", 2, "--max-bad-fraction", 0.5, "-q", "--quarantine"]
    refused = semid(*words, "unseen.parquet", cwd=tmp_path)
    assert refused.returncode == 1 and "what is read" in refused.stderr
    assert (tmp_path / "unseen.parquet").read_bytes() == before and not (tmp_path / "out").exists()
    done = semid(*words, "bad.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "bad.parquet")["id"].to_pylist() == ["e", "k"]


def check_refused(run, word, folder, before):
    assert run.returncode == 1, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("semid: ") and word in lines[0], run.stderr
    assert {p.name for p in folder.rglob("*")} == before


def test_a_fit_on_disk_is_the_fit_in_memory(made, tmp_path):
    words = "--levels 2 --clusters 16 --max-iter 20 --quiet".split()
    for name, more in (("memory", []), ("disk", ["--work-dir", "work"])):
        run = semid("fit", made / "vectors.parquet", "-o", name, *words, *more, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    one, two = (RQKMeans.load(tmp_path / name).fingerprint() for name in ("memory", "disk"))
    assert one == two


def test_an_rq_vae_encodes_and_is_evaluated(made, tmp_path):
    X = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    write_features(tmp_path / "some.parquet", [f"item-{i}" for i in range(300)], X)
    model = RQVAE(8, [8, 8], e_dim=4, layers=[16], epochs=2, random_state=0).fit(X)
    model.save(tmp_path / "vae")
    run = semid("encode", "vae", "some.parquet", "-o", "ids/ids.parquet", "--quiet", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert codes_of(read_ids(tmp_path / "ids" / "ids.parquet")).tolist() == model.encode(X).tolist()
    run = semid("evaluate", "vae", "some.parquet", "--quiet", cwd=tmp_path)
    assert run.returncode == 0 and "perplexity_per_level" in run.stdout, run.stderr


@pytest.mark.parametrize("make, word", [
    (nan, "NaN"), (wrong_dimension, "dimension"), (empty, "at least one sample"), (twice, "duplicate"),
    (truncated, "unreadable"), (no_file, "in.parquet"), (few, "n_samples=6 should be >= n_clusters=8")])
def test_fit_refuses(make, word, tmp_path):
    make(tmp_path)
    before = {p.name for p in tmp_path.rglob("*")}
    run = semid("fit", "in.parquet", "-o", "model", "--clusters", 8, "--levels", 2, "-q", cwd=tmp_path)
    check_refused(run, word, tmp_path, before)


def other_vectors(folder): return folder / "model"


def cut_model(folder):
    path = folder / "model" / "codebooks.npz"
    path.write_bytes(path.read_bytes()[:100])
    return folder / "model"


def pickled(folder):
    (folder / "model.pkl").write_bytes(pickle.dumps({"codebooks": 1}))
    return folder / "model.pkl"


def no_model(folder): return folder / "nothing"


@pytest.mark.parametrize("make, word", [
    (other_vectors, "Expected D=8, got D=4"), (cut_model, "can't be read"), (pickled, "never opened"),
    (no_model, "codebooks.npz")])
def test_encode_refuses(make, word, made, tmp_path):
    few(tmp_path)
    RQKMeans.load(made / "model").save(tmp_path / "model")
    model = make(tmp_path)
    before = {p.name for p in tmp_path.rglob("*")}
    run = semid("encode", model, "in.parquet", "-o", "ids.parquet", "--device", "cpu", "-q", cwd=tmp_path)
    check_refused(run, word, tmp_path, before)


@pytest.mark.parametrize("command", ["encode", "evaluate"])
@pytest.mark.parametrize("source", [".", "in.parquet", "link"])
def test_what_is_read_is_never_replaced(command, source, tmp_path):
    few(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    RQKMeans(1, 2, random_state=0).fit(np.eye(4)).save(tmp_path / "model")
    content, before = (tmp_path / "in.parquet").read_bytes(), {p.name for p in tmp_path.rglob("*")}
    run = semid(command, "model", source, "-o", "in.parquet", "--device", "cpu", "-q", cwd=tmp_path)
    check_refused(run, "write to another file", tmp_path, before)
    assert (tmp_path / "in.parquet").read_bytes() == content


def test_bad_rows_are_set_aside_where_that_is_allowed(tmp_path):
    nan(tmp_path)
    run = semid("fit", "in.parquet", "-o", "model", "--clusters", 2, "--levels", 1, "-q",
                "--max-bad-fraction", 0.5, "--quarantine", "bad.parquet", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert pq.read_table(tmp_path / "bad.parquet").to_pylist()[0]["id"] == "f"


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    "An encode that nobody killed: its folder and its words."
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ["encode", str(made / "model"), str(made / "vectors.parquet"), "--batch-size", "500",
             "--device", "cpu", "-q", "--store", "ids.db", "-o", "ids.parquet"]
    assert semid(*words, cwd=folder).returncode == 0
    return folder, words


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("seen", [1, 20_000])
def test_a_killed_encode_run_again_loses_and_doubles_nothing(seen, made, undisturbed, tmp_path):
    whole, words = undisturbed
    running = subprocess.Popen([SEMID, *words], cwd=tmp_path)
    store = tmp_path / "ids.db"
    deadline = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
        if not store.exists(): continue
        running.send_signal(signal.SIGSTOP)  # it can't run away while we look
        if issued(store) >= seen: break
        running.send_signal(signal.SIGCONT)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "ids.parquet").exists()

    assert semid(*words, cwd=tmp_path).returncode == 0
    again = read_ids(tmp_path / "ids.parquet")
    assert again.equals(read_ids(whole / "ids.parquet"))
    unique = again["unique_id"].to_pylist()
    assert len(set(unique)) == len(unique) == 60_000
    assert (tmp_path / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def issued(path):
    "How many IDs a store holds, without waiting for who writes it; 0 while it can't be read."
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0)
    try: return connection.execute("SELECT COUNT(*) FROM collisions WHERE count > 0").fetchone()[0]
    except sqlite3.OperationalError: return 0
    finally: connection.close()


def test_a_sweep_that_was_stopped_goes_on(made, tmp_path):
    words = ["sweep", str(made / "vectors.parquet"), "-o", "out", "--levels", 2, "--clusters", "4,8", "-q",
             "--max-iter", 3]
    assert semid(*words, cwd=tmp_path).returncode == 0
    points = sorted((tmp_path / "out" / "points").iterdir())
    before = {p: p.stat().st_mtime_ns for p in points}
    points[0].unlink()
    table = (tmp_path / "out" / "sweep.csv").read_bytes()
    assert semid(*words, cwd=tmp_path).returncode == 0
    assert points[0].exists() and points[1].stat().st_mtime_ns == before[points[1]]
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == table


def commands(of=None, name="semid"):
    "Every command, by its name."
    of = of or typer.main.get_command(options.app)
    for word, one in of.commands.items():
        if hasattr(one, "commands"): yield from commands(one, f"{name} {word}")
        else: yield f"{name} {word}", one


def test_every_command_and_option_is_explained():
    assert len(list(commands())) > 40
    for name, command in commands():
        assert command.help, name
        assert not [option.opts for option in command.params if not option.help], name
    run = semid("encode", "--help", cwd=Path.cwd())
    assert run.returncode == 0 and "--device" in run.stdout


@pytest.mark.parametrize("names", [("--output", "-o"), ("--quiet", "-q"), ("--max-iter", "--max-iterations"),
                                   ("--seed", "--random-state"), ("--levels", "--n-levels"),
                                   ("--clusters", "--n-clusters")], ids="".join)
def test_one_option_has_the_same_names_in_all_commands(names):
    having = 0
    for name, command in commands():
        if name == "semid dedup" and "--clusters" in names: continue  # as many as it likes: "auto"
        for option in command.params:
            if name == "semid sweep" and "--seeds" in option.opts: continue  # several
            assert len(set(names) & set(option.opts)) in (0, 2), (name, option.opts)
            having += names[0] in option.opts
    assert having > 1


NO_ROOM = errno.ENOSPC, os.strerror(errno.ENOSPC)


@pytest.mark.parametrize("error", [OSError(*NO_ROOM), RuntimeError(f"writing: {NO_ROOM[1]}")], ids=type)
def test_a_full_disk_is_one_sentence_whoever_tells_of_it(error, monkeypatch, capsys):
    monkeypatch.setattr(options, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit): options.run()
    assert capsys.readouterr().err.startswith("semid: The disk is full: ")


def test_other_errors_of_libraries_are_shown_whole(monkeypatch):
    monkeypatch.setattr(options, "app", Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"): options.run()
