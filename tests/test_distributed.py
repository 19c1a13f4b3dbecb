"k-means over shards: the same bytes for any cut, any number of workers, and whatever dies."
import hashlib, json, os, subprocess, sys, threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from semid.clustering.distributed import DistributedKMeans
from semid.clustering import distributed, mapping, shards, staged
from semid.clustering.mapping import assign_parquet
from semid.clustering.inference import KMeansInference
from semid.clustering.kmeans import KMeans
from semid.clustering.pool import about_process, open_pool
from semid.clustering.shards import find_sources, stage_features
from semid.clustering.staged import ShardWorker
from semid.semantic_ids.rq_kmeans import RQKMeans
from semid.config import ConfigError, DataError, SemidError, ShapeMismatchError
from semid.feature_files import FeatureWriter, write_features
from semid.features import read_features

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import it
K, N, D = 30, 6000, 12
SETTINGS = dict(random_state=3, rows_per_shard=1000)
pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, D)) * 2
    return (centres[rng.integers(0, 50, N)] + rng.normal(size=(N, D))).astype(np.float32)


def names(at, to): return [f"item-{i:05d}" for i in range(at, to)]


@pytest.fixture(scope="module")
def data(X, tmp_path_factory):
    "Files of very different sizes."
    folder = tmp_path_factory.mktemp("data")
    for n, (at, to) in enumerate([(0, 10), (10, 11), (11, 3500), (3500, 3500), (3500, 6000)]):
        write_features(folder / f"f{n}.parquet", names(at, to), X[at:to])
    return folder


@pytest.fixture(scope="module")
def whole(X, data, tmp_path_factory):
    "A run that nothing happens to, in one process."
    return kmeans(tmp_path_factory.mktemp("whole")).fit(data)


def kmeans(output_dir, n_clusters=K, n_workers=0, **settings):
    settings = SETTINGS | settings
    return DistributedKMeans(n_clusters, n_workers=n_workers, output_dir=output_dir, **settings)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*.npy")}


def assert_same(model, whole):
    assert files(model.output_dir) == files(whole.output_dir)
    assert model.inertia_ == whole.inertia_ and model.n_iter_ == whole.n_iter_
    assert model.history_ == whole.history_


def test_it_is_kmeans(X, whole):
    single = KMeans(K, random_state=3).fit(X)
    assert np.array_equal(single.cluster_centers_, whole.cluster_centers_)
    assert np.array_equal(single.labels_, whole.labels_)
    assert single.inertia_ == whole.inertia_ and single.n_iter_ == whole.n_iter_ > 5
    ids, labels, distances = (np.concatenate(part) for part in zip(*whole.assignments()))
    assert ids.dtype.kind == "U" and ids.tolist() == names(0, N)
    exact = np.linalg.norm(X.astype(float) - single.cluster_centers_[labels], axis=1)
    assert np.allclose(distances, exact, rtol=1e-6)


@pytest.mark.parametrize("settings", [
    dict(metric="cosine"), dict(tol=0.0, max_iter=7), dict(early_stop=0.005), dict(init="random"),
    dict(init_sample=20)], ids=lambda s: next(iter(s)))
def test_every_setting_is_kmeans_too(X, data, tmp_path, settings):
    single = KMeans(K, random_state=3, **settings).fit(X)
    model = kmeans(tmp_path, **settings).fit(data)
    assert np.array_equal(single.cluster_centers_, model.cluster_centers_)
    assert np.array_equal(single.labels_, model.labels_) and single.n_iter_ == model.n_iter_


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_huge_and_tiny_values(X, tmp_path, scale):
    far = (X * np.float32(scale)).astype(np.float32)
    write_features(tmp_path / "f.parquet", names(0, N), far)
    single = KMeans(K, random_state=3).fit(far)
    model = kmeans(tmp_path / "out").fit(tmp_path / "f.parquet")
    assert np.array_equal(single.cluster_centers_, model.cluster_centers_)
    assert single.inertia_ == model.inertia_


def test_empty_clusters_are_filled_alike(X, data, tmp_path):
    far = (np.full((K, D), 1e3) + np.arange(K)[:, None]).astype(np.float32)
    single = KMeans(K, init=far).fit(X)
    for rows in 700, 6000:
        model = kmeans(tmp_path / str(rows), init=far, rows_per_shard=rows).fit(data)
        assert np.array_equal(single.cluster_centers_, model.cluster_centers_)
    assert (np.bincount(single.labels_, minlength=K) > 0).all()


@pytest.mark.parametrize("n_workers", [2, 4])
def test_any_number_of_workers_and_any_order_of_names(data, whole, tmp_path, n_workers):
    urls = [str(data / f"f{n}.parquet") for n in (4, 1, 0, 3, 2)]
    assert_same(kmeans(tmp_path, n_workers=n_workers).fit(urls), whole)


def test_more_workers_than_shards_and_other_cuts(X, data, whole, tmp_path):
    write_features(tmp_path / "one.parquet", names(0, N), X)
    model = kmeans(tmp_path / "out", n_workers=2, rows_per_shard=N).fit(tmp_path / "one.parquet")
    assert len([*model.assignments()]) == 1
    assert np.array_equal(model.cluster_centers_, whole.cluster_centers_)
    assert np.array_equal(model.labels_, whole.labels_) and model.inertia_ == whole.inertia_


def test_a_uri_is_fetched_and_nothing_of_it_stays(data, whole, tmp_path):
    assert_same(kmeans(tmp_path).fit(f"file://{data}/f*.parquet"), whole)
    assert [p.name for p in tmp_path.rglob("*.parquet")] == ["quarantine.parquet"]


@pytest.mark.parametrize("path, base, found", [
    ("/data/f0.parquet", "/data/f0.parquet", "0"), ("/data", "/data", "012"), ("", "", "012"),
    ("/data/*.parquet", "/data", "012"), ("/d*/f[12].parquet", "", "12")])
@pytest.mark.parametrize("options", ["", "?region=eu-west-1", "?endpoint_override=http://[::1]:9000/*"])
def test_the_options_of_a_uri_reach_the_store(tmp_path, monkeypatch, path, base, found, options):
    asked, disk = [], pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem())
    (tmp_path / "bucket" / "data").mkdir(parents=True)
    for n in "012": (tmp_path / "bucket" / "data" / f"f{n}.parquet").touch()
    class Stores:
        @staticmethod
        def from_uri(uri):
            asked.append(uri)
            return disk, uri.removeprefix("s3://").partition("?")[0]
    monkeypatch.setattr(pa.fs, "FileSystem", Stores)
    sources = find_sources(f"s3://bucket{path}{options}")
    assert asked == [f"s3://bucket{base}{options}"]
    assert [s.path for s in sources] == [f"bucket/data/f{n}.parquet" for n in found]


def test_only_local_files_are_hashed_and_beside_the_staging(data, tmp_path, monkeypatch):
    threads = []
    def digest(path, known=shards.file_sha256):
        threads.append(threading.current_thread())
        return known(path)
    monkeypatch.setattr(shards, "file_sha256", digest)
    far = stage_features(find_sources(f"file://{data}"), tmp_path / "far")
    assert threads == [] and {mark["sha256"] for mark in far.marks} == {""}
    near = stage_features(find_sources(data), tmp_path / "near")
    assert len(threads) == 5 and threading.main_thread() not in threads
    assert [m["sha256"] for m in near.marks] == [
        hashlib.sha256((data / f"f{n}.parquet").read_bytes()).hexdigest() for n in range(5)]


def test_a_run_on_fetched_files_is_resumed(data, whole, tmp_path):
    kmeans(tmp_path, max_iter=3).fit(f"file://{data}")
    assert_same(kmeans(tmp_path).fit(f"file://{data}", resume=True), whole)


def test_a_shard_of_one_row(X, tmp_path):
    n, rows = 91, 10  # an even split into 10 shards leaves one row for the last
    write_features(tmp_path / "f.parquet", names(0, n), X[:n])
    single = KMeans(5, random_state=3).fit(X[:n])
    one, many = (kmeans(tmp_path / str(w), 5, w, rows_per_shard=rows).fit(tmp_path / "f.parquet")
                 for w in (1, 4))
    assert [len(labels) for _, labels, _ in many.assignments()] == [10] * 9 + [1]
    assert_same(many, one)
    assert many.cluster_centers_.tobytes() == single.cluster_centers_.tobytes()
    assert many.labels_.tobytes() == single.labels_.tobytes() and many.inertia_ == single.inertia_


def test_mixed_column_types(X, tmp_path):
    half = X.astype(np.float16).astype(np.float32)
    write_features(tmp_path / "a.parquet", names(0, 2000), half[:2000], dtype="float16")
    write_features(tmp_path / "b.parquet", names(2000, 4000), half[2000:4000])
    lists = pa.array([*half[4000:].astype(float)], pa.list_(pa.float64()))
    pq.write_table(pa.table({"id": names(4000, N), "feature": lists}), tmp_path / "c.parquet")
    single = KMeans(K, random_state=3).fit(half)
    mixed = kmeans(tmp_path / "mixed").fit(tmp_path / "*.parquet")
    assert np.array_equal(mixed.cluster_centers_, single.cluster_centers_)
    write_features(tmp_path / "half" / "a.parquet", names(0, N), half, dtype="float16")
    small = kmeans(tmp_path / "small").fit(tmp_path / "half")
    assert np.array_equal(small.cluster_centers_, single.cluster_centers_)


@pytest.mark.parametrize("before", [1, 2])
def test_a_worker_dies_in_mid_iteration(data, whole, tmp_path, monkeypatch, before):
    grave = str(tmp_path / "grave")

    class Mortal(ShardWorker):
        "The first to have done so many shards of iteration 2 dies of the next."
        def do(self, job, shard):
            if (job["kind"], job["iteration"]) == ("assign", 2):
                self.shards = getattr(self, "shards", [])
                with suppress(FileExistsError):
                    if len(self.shards) == before:
                        with open(grave, "x") as file: json.dump([os.getpid(), self.shards, shard], file)
                        os._exit(1)
                self.shards.append(shard)
            super().do(job, shard)
    monkeypatch.setattr(distributed, "ShardWorker", Mortal)
    model = kmeans(tmp_path / "run", n_workers=2).fit(data)
    pid, done, deadly = json.loads(Path(grave).read_text())
    assert len({*done, deadly}) == before + 1 and {*done, deadly} <= {*range(6)}
    assert pid not in [about["pid"] for about in model._workers.ready.values()]
    assert_same(model, whole)


DRIVER = """
import sys
from semid.clustering.distributed import DistributedKMeans
class Slow(DistributedKMeans):
    def _write_state(self, i, *state):
        super()._write_state(i, *state)
        if i == 4:
            print("there", flush=True)
            import time
            time.sleep(60)
Slow({K}, n_workers=2, output_dir=sys.argv[2], address=sys.argv[3], **{SETTINGS}).fit(sys.argv[1])
"""


def test_a_driver_that_joined_a_cluster_is_killed_and_its_run_resumed(data, whole, tmp_path):
    code, address = DRIVER.format(K=K, SETTINGS=SETTINGS), ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", code, str(data), str(tmp_path), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
        assert driver.stdout.readline().strip() == b"there"
        with pytest.raises(ConfigError, match="Another run is at work"):
            kmeans(tmp_path).fit(data, resume=True)
        driver.kill()
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["status"] == "running" and progress["iteration"] == 4
    with pytest.raises(ConfigError, match="unfinished run"): kmeans(tmp_path).fit(data)
    assert_same(kmeans(tmp_path).fit(data, resume=True), whole)


class Died(Exception): pass


@pytest.mark.parametrize("at", ["_write_state", "_finish", "_stage", "_loop"])
def test_a_resumed_run_ends_like_any_other_wherever_it_died(data, whole, tmp_path, at, monkeypatch):
    def die(*args, **kwargs): raise Died
    monkeypatch.setattr(DistributedKMeans, at, die)
    with pytest.raises(Died): kmeans(tmp_path).fit(data)
    monkeypatch.undo()
    assert_same(kmeans(tmp_path).fit(data, resume=True), whole)


def test_a_finished_run_goes_on_only_where_iterations_were_short(data, whole, tmp_path):
    assert kmeans(tmp_path, max_iter=3).fit(data).n_iter_ == 3
    assert_same(kmeans(tmp_path).fit(data, resume=True), whole)
    before = (tmp_path / "progress.json").stat().st_mtime_ns
    assert_same(kmeans(tmp_path).fit(data, resume=True), whole)
    assert (tmp_path / "progress.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("settings, words", [
    (dict(n_clusters=9), "n_clusters=30, not 9"), (dict(metric="cosine"), "metric=l2, not cosine"),
    (dict(random_state=4), "random_state=3, not 4")])
def test_resume_refuses_other_settings(data, tmp_path, settings, words):
    kmeans(tmp_path, max_iter=1).fit(data)
    with pytest.raises(ConfigError, match=words): kmeans(tmp_path, **settings).fit(data, resume=True)


def test_resume_refuses_other_data(X, tmp_path):
    source, out = tmp_path / "f.parquet", tmp_path / "out"
    write_features(source, names(0, N), X)
    kmeans(out, max_iter=1).fit(source)
    os.utime(source)  # a new time alone is not another file
    kmeans(out, max_iter=2).fit(source, resume=True)
    changed = X.copy()
    changed[5, 5] += 1
    write_features(source, names(0, N), changed)
    with pytest.raises(DataError, match="other data"): kmeans(out, max_iter=3).fit(source, resume=True)


def spoilt(folder, X):
    "Files with every kind of trouble, and the rows that can be used."
    folder.mkdir()
    bad = X[:1000].astype(object)
    bad[3, 2], bad[4, 0] = np.nan, np.inf
    rows = [None if i == 5 else [1.0] if i == 6 else [*map(float, row)] for i, row in enumerate(bad)]
    ids = [None if i == 7 else "item-00001" if i == 8 else name for i, name in enumerate(names(0, 1000))]
    table = pa.table({"id": ids, "feature": pa.array(rows, pa.list_(pa.float32()))})
    pq.write_table(table, folder / "a.parquet")
    write_features(folder / "b.parquet", names(1000, 4000), X[1000:4000])
    write_features(folder / "c.parquet", names(4000, N), X[4000:])
    with open(folder / "c.parquet", "r+b") as file: file.truncate(999)
    (folder / "d.parquet").write_bytes(b"")
    return np.delete(X[:4000], [3, 4, 5, 6, 7, 8], axis=0)


def test_what_is_bad_is_counted_before_any_worker_sees_it(X, tmp_path):
    good = spoilt(tmp_path / "data", X)
    with pytest.raises(DataError, match="can't be used"): kmeans(tmp_path / "no").fit(tmp_path / "data")
    model = kmeans(tmp_path / "out", max_bad_fraction=0.6).fit(tmp_path / "data")
    assert np.array_equal(model.cluster_centers_, KMeans(K, random_state=3).fit(good).cluster_centers_)
    assert model.report_["kept"] == len(good) and model.report_["bad_files"] == 2
    listed = pq.read_table(tmp_path / "out" / "quarantine.parquet")
    assert listed.num_rows == 8 and {"NaN", "Inf", "null id", "unreadable"} <= {*listed["reason"].to_pylist()}


def test_too_few_rows_and_no_rows(X, tmp_path):
    write_features(tmp_path / "few.parquet", names(0, 5), X[:5])
    with pytest.raises(ShapeMismatchError, match="n_samples=5 should be >= n_clusters=30"):
        kmeans(tmp_path / "o").fit(tmp_path / "few.parquet")
    with pytest.raises(DataError, match="no Parquet file"): kmeans(tmp_path / "o").fit(tmp_path / "no*.pq")


@pytest.mark.parametrize("keep, left", [(1, 1), (3, 3), (None, None)])
def test_the_iterations_on_disk_are_bounded(data, whole, tmp_path, keep, left):
    most = 0

    class Watched(DistributedKMeans):
        def _note(self, *state):
            nonlocal most
            most = max(most, len({p.name.split("_")[1] for p in tmp_path.glob("iter_*_shard_*")}))
            super()._note(*state)
    model = Watched(K, n_workers=1, output_dir=tmp_path, keep_iterations=keep, **SETTINGS).fit(data)
    kinds = [[int(p.name.split("_")[1]) for p in tmp_path.glob(f"iter_*_shard_0_{kind}.npy")]
             for kind in ("assignments", "ids", "distances")]
    n = whole.n_iter_ + 1
    assert all(sorted(kind) == [*range(n - (left or n), n)] for kind in kinds)
    assert most <= (keep or n) + 1
    assert not (tmp_path / "staging").exists()
    assert np.array_equal(model.cluster_centers_, whole.cluster_centers_)


def test_all_iterations_that_stay_are_whole(data, whole, tmp_path, monkeypatch):
    def die(*args): raise Died
    monkeypatch.setattr(DistributedKMeans, "_finish", die)
    with pytest.raises(Died): kmeans(tmp_path).fit(data)
    monkeypatch.undo()
    (tmp_path / ".iter_3_shard_0_assignments.npy.1-.tmp").write_bytes(b"of a worker that died")
    model = kmeans(tmp_path, keep_iterations=None).fit(data, resume=True)
    assert np.array_equal(model.cluster_centers_, whole.cluster_centers_)
    kinds = [{p.name.removesuffix(f"_{kind}.npy") for p in tmp_path.glob(f"iter_*_{kind}.npy")}
             for kind in ("assignments", "ids", "distances")]
    assert kinds[0] == kinds[1] == kinds[2] and len({name.split("_")[1] for name in kinds[0]}) >= 2
    assert not list(tmp_path.glob(".iter_*"))


@pytest.mark.parametrize("name", ["iter_{i}/centroids.npy", "iter_{i}_shard_2_assignments.npy"])
def test_a_cut_file_is_named_and_what_to_do_works(data, whole, tmp_path, name, monkeypatch):
    def die(*args): raise Died
    monkeypatch.setattr(DistributedKMeans, "_finish", die)
    with pytest.raises(Died): kmeans(tmp_path).fit(data)
    monkeypatch.undo()
    i = json.loads((tmp_path / "progress.json").read_text())["iteration"] - ("shard" in name)
    (tmp_path / name.format(i=i)).write_bytes(b"")
    says = rf"{name.format(i=i)} can't be read .*: remove .*/progress.json to start anew"
    with pytest.raises(DataError, match=says): kmeans(tmp_path).fit(data, resume=True)
    (tmp_path / "progress.json").unlink()
    assert_same(kmeans(tmp_path).fit(data), whole)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1)])
@pytest.mark.parametrize("name", ["values_2", "ids_3"])
def test_a_stage_that_is_not_whole_is_laid_down_anew(data, whole, tmp_path, name, spoil, monkeypatch):
    def die(*args): raise Died
    monkeypatch.setattr(DistributedKMeans, "_finish", die)
    with pytest.raises(Died): kmeans(tmp_path).fit(data)
    monkeypatch.undo()
    spoil(tmp_path / "staging" / name)
    assert_same(kmeans(tmp_path).fit(data, resume=True), whole)


def test_a_file_that_is_gone_in_mid_run_is_named(data, tmp_path):
    stage = stage_features(find_sources(data), tmp_path / "stage")
    assert stage.is_whole()
    stage.path("values", 0).unlink()
    assert not stage.is_whole()
    with pytest.raises(DataError, match="values_0 is gone or has another size: remove .*stage, and run"):
        next(shards.shard_blocks(stage, 0))
    stage.path("ids", 0).unlink()
    with pytest.raises(DataError, match="ids_0 is gone: remove .*stage, and run again"):
        staged._link(stage.path("ids", 0), tmp_path / "ids")


def test_a_map_that_stays_open_is_of_the_present_file(data, tmp_path):
    from semid.clustering.shards import quantise_shard, quantised_blocks
    stages = [stage_features(find_sources(data), tmp_path / name) for name in ("kept", "anew")]
    stages[0].keep_open = 2**26
    for value in (0, 1):
        shift, blocks = np.full(D, value, np.float32), []
        for stage in stages:
            quantise_shard(stage, 0, shift)
            blocks.append([(rows.quantised.copy(), rows.scale.copy())
                           for _, rows in quantised_blocks(stage, 0, shift)])
        for kept, anew in zip(*blocks, strict=True):
            for a, b in zip(kept, anew): assert np.array_equal(a, b)
    assert len(stages[0].open_maps) == 3 and not stages[1].open_maps


MEMORY = """
import sys, threading, time
from semid.clustering.distributed import DistributedKMeans
from semid.clustering.staged import ShardWorker
ShardWorker.keep_open, peak = 2**20, 0
def watch():
    global peak
    while True:
        lines = [line.split() for line in open("/proc/self/status")]
        peak = max(peak, sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssFile:")) // 1024)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
options = dict(n_workers=1, max_iter=4, random_state=0, rows_per_shard=8192)
DistributedKMeans(10, output_dir=sys.argv[2], **options).fit(sys.argv[1])
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_a_workers_memory_does_not_grow_with_the_rows(tmp_path):
    peaks, rng = {}, np.random.default_rng(0)
    for n in (40_000, 240_000):
        with FeatureWriter(tmp_path / f"{n}.parquet", 128) as writer:
            for at in range(0, n, 20_000):
                X = rng.normal(size=(20_000, 128)).astype(np.float32)
                writer.write([f"item-{i}" for i in range(at, at + 20_000)], X)
        command = [sys.executable, "-c", MEMORY, tmp_path / f"{n}.parquet", tmp_path / f"run-{n}"]
        peaks[n] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peaks[240_000] - peaks[40_000] < 90, peaks  # 200,000 more rows and their int8 form are 122 MiB


def test_the_saved_model_is_one_that_inference_loads(X, whole, tmp_path):
    whole.save(tmp_path / "model")
    inference = KMeansInference(tmp_path / "model")
    assert np.array_equal(inference.predict(X), whole.labels_)
    assert inference.predict_cluster(X[7]) == whole.labels_[7]
    about = json.loads((tmp_path / "model" / "metadata.json").read_text())
    assert about["seed"] == 3 and about["n_samples"] == N and about["inertia"] == whole.inertia_


def test_assigning_is_the_same_in_one_process_and_on_ray(X, data, whole, tmp_path):
    whole.save(tmp_path / "model")
    for n_workers in (1, 2):
        n = assign_parquet(tmp_path / "model", data, tmp_path / str(n_workers), n_workers=n_workers)
        assert n == N
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.parquet")} for n in "12")
    assert one == two
    table = pq.read_table(tmp_path / "1" / "assignments")
    assert np.array_equal(table["cluster"].to_numpy(), whole.labels_)
    assert table["id"].to_pylist() == names(0, N) == [*read_features(data)[0]]


def test_ids_of_any_alphabet(X, tmp_path):
    ids = [f"ключ-{i}-鍵" * (1 + i % 3) for i in range(100)]
    write_features(tmp_path / "f.parquet", ids, X[:100])
    model = kmeans(tmp_path / "out", n_clusters=3)
    assert next(model.fit(tmp_path / "f.parquet").assignments())[0].tolist() == ids
    write_features(tmp_path / "z.parquet", ["a\0", "b", "c"], X[:3])
    model = kmeans(tmp_path / "z", 3)
    with pytest.raises(DataError, match="zero character"): model.fit(tmp_path / "z.parquet")


def test_a_stage_of_other_settings_is_not_taken_up(data, tmp_path):
    many = dict(n_workers=0, output_dir=tmp_path / "run", random_state=0, max_iter=2)
    with pytest.raises(ShapeMismatchError): DistributedKMeans(10**6, **many).fit(data)  # and leaves its stage
    assert (tmp_path / "run" / "staging").exists()
    resumed = DistributedKMeans(5, metric="cosine", **many).fit(data, resume=True)
    plain = DistributedKMeans(5, metric="cosine", **(many | {"output_dir": tmp_path / "other"})).fit(data)
    assert np.array_equal(resumed.cluster_centers_, plain.cluster_centers_)


def test_what_others_put_in_the_folder_stays(data, tmp_path):
    mine = [tmp_path / name for name in ("iter_7/weights.bin", "iter_10_ckpt.pth", "iter_1_notes.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    model = DistributedKMeans(5, n_workers=0, output_dir=tmp_path, random_state=0, max_iter=2).fit(data)
    assert all(path.read_text() == "mine" for path in mine)
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="precious.txt"): model.fit(data)
    assert (tmp_path / "staging" / "precious.txt").exists()


def test_a_refused_run_costs_nothing(X, data, tmp_path):
    model = DistributedKMeans(5, n_workers=0, output_dir=tmp_path / "run", random_state=0, max_iter=2)
    model.fit(data).save(tmp_path / "model")
    assign_parquet(tmp_path / "model", data, tmp_path / "out")
    told = ".lock", "quarantine.parquet"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name not in told}
    bad = X[:50].copy()
    bad[7] = np.nan
    ids = [f"r{i}" for i in range(50)]
    pq.write_table(pa.table({"id": ids, "feature": [*bad]}), tmp_path / "bad.parquet")
    for wrong in (tmp_path / "nothing.parquet", tmp_path / "bad.parquet"):
        with pytest.raises(DataError): model.fit(wrong)
        with pytest.raises(DataError): assign_parquet(tmp_path / "model", wrong, tmp_path / "out")
    assert [p for p in before if not p.exists() or p.read_bytes() != before[p]] == []


def test_results_of_one_kind_are_not_mixed_with_those_of_another(X, data, tmp_path):
    KMeans(5, random_state=0).fit(X).save(tmp_path / "model")
    assign_parquet(tmp_path / "model", data, tmp_path / "out")
    codes = RQKMeans(2, 4, random_state=0).fit(X)
    with pytest.raises(ConfigError, match="manifest.json of assignments"):
        codes.encode_parquet(data, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("[1]")
    with pytest.raises(ConfigError, match="something else"):
        assign_parquet(tmp_path / "model", data, tmp_path / "out")
    for wrong in dict(n_workers=-3), dict(n_workers=1.5), dict(max_bad_fraction="0"), dict(n_threads=-1):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            assign_parquet(tmp_path / "model", data, tmp_path / "new", **wrong)


@pytest.mark.parametrize("at", ["rename", "write_json"])
def test_parts_are_the_old_ones_or_the_new_ones_wherever_it_dies(X, data, tmp_path, monkeypatch, at):
    for name, seed in ("old", 0), ("new", 1): KMeans(5, random_state=seed).fit(X).save(tmp_path / name)
    assign_parquet(tmp_path / "old", data, tmp_path / "out")
    content = lambda: {p.name: p.read_bytes() for p in (tmp_path / "out" / "assignments").iterdir()}
    before = content()
    def die(*args): raise Died
    if at == "write_json": monkeypatch.setattr(mapping, "write_json", die)
    else:
        rename = Path.rename
        def stop(self, to): return die() if self.name == ".assignments" else rename(self, to)
        monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(Died): assign_parquet(tmp_path / "new", data, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(DataError): assign_parquet(tmp_path / "new", tmp_path / "none", tmp_path / "out")
    assert content() == before  # what was there is back, though this run failed too
    assign_parquet(tmp_path / "new", data, tmp_path / "out")
    assert content() != before and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock", "assignments", "manifest.json", "quarantine.parquet"]


class Fragile:
    "Dies of item 3, whoever does it."
    def __init__(self, n_threads): self.done = []
    def about(self): return about_process()
    def do(self, job, item):
        if item == 3: os._exit(1)
        self.done.append(item)
    def result(self): return self.done


@pytest.mark.parametrize("gather", [True, False])
def test_an_item_that_kills_every_worker_ends_the_run(gather):
    pool = open_pool(Fragile, [], 2)
    with pytest.raises(SemidError, match="without getting any further"): pool.run({}, range(12), gather)
    pool.close()


class Lost(mapping._ClusterWriter):
    "Writes where a machine that shares no files would."
    def __init__(self, folder, *args): super().__init__(folder.replace("out", "elsewhere"), *args)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_parts_that_went_elsewhere_are_missed(X, data, tmp_path, monkeypatch, n_workers):
    KMeans(5, random_state=0).fit(X).save(tmp_path / "model")
    assign_parquet(tmp_path / "model", data, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out" / "assignments").iterdir()}
    assign = lambda: assign_parquet(tmp_path / "model", data, tmp_path / "out", n_workers=n_workers)
    monkeypatch.setattr(mapping, "_ClusterWriter", Lost)
    with pytest.raises(ConfigError, match="does not see .*elsewhere.*all machines share"): assign()
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "elsewhere" / ".assignments").mkdir(parents=True)
    with pytest.raises(DataError, match="1 of 1 parts are missing .*part-00000.* machines share"): assign()
    assert {p: p.read_bytes() for p in (tmp_path / "out" / "assignments").iterdir()} == before


class Careless(mapping._ClusterWriter):
    "Forgets a row of every part, or leaves a part of its own."
    def table(self, ids, X): return super().table(ids, X)[:-1]


class Busy(mapping._ClusterWriter):
    def do(self, job, block):
        for number in (block[0], 7): super().do(job, (number, *block[1:]))


def test_parts_must_be_all_and_whole(X, data, tmp_path, monkeypatch):
    KMeans(5, random_state=0).fit(X).save(tmp_path / "model")
    for writer, says in (Careless, "not of the rows"), (Busy, "part-00007.parquet is of another run"):
        monkeypatch.setattr(mapping, "_ClusterWriter", writer)
        with pytest.raises(DataError, match=says):
            assign_parquet(tmp_path / "model", data, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("name", ["{}", "file://{}", "{}/part-00000.parquet"])
@pytest.mark.parametrize("encode", [False, True])
def test_results_never_take_the_place_of_what_is_read(X, tmp_path, name, encode):
    if encode: model = RQKMeans(2, 4, random_state=0).fit(X)
    else: KMeans(5, random_state=0).fit(X).save(tmp_path / "model")
    inputs = tmp_path / "out" / ("codes" if encode else "assignments")
    write_features(inputs / "part-00000.parquet", names(0, N), X)
    before = (inputs / "part-00000.parquet").read_bytes()
    def run(data):
        if encode: model.encode_parquet(data, tmp_path / "out")
        else: assign_parquet(tmp_path / "model", data, tmp_path / "out")
    with pytest.raises(ConfigError, match="part-00000.parquet is what is read"): run(name.format(inputs))
    (tmp_path / "link").symlink_to(inputs)
    with pytest.raises(ConfigError, match="is what is read"): run(tmp_path / "link")
    assert (inputs / "part-00000.parquet").read_bytes() == before


def test_the_list_of_bad_rows_never_takes_the_place_of_what_is_read(X, tmp_path):
    KMeans(5, random_state=0).fit(X).save(tmp_path / "model")
    path = tmp_path / "out" / "quarantine.parquet"
    write_features(path, names(0, N), X)
    before = path.read_bytes()
    for url in path, f"file://{path}":
        with pytest.raises(ConfigError, match="is what is read"):
            assign_parquet(tmp_path / "model", url, tmp_path / "out")
    assert path.read_bytes() == before


class Unable:
    "Can't be made."
    def __init__(self, folder, n_threads):
        (Path(folder) / f"made-by-{os.getpid()}").touch()
        raise DataError("there is no such model")


class Unreadable:
    "Can't even be read by a worker."
    def __reduce__(self): return exec, ("raise ImportError('No module named semid')",)


def test_a_worker_that_can_not_be_made_says_why_at_once(tmp_path):
    pool = open_pool(Unable, [str(tmp_path)], 2)
    with pytest.raises(DataError, match="^there is no such model$"): pool.run({}, range(12))
    pool.close()
    assert 1 <= len([*tmp_path.iterdir()]) <= 2  # none was made again
    pool = open_pool(Fragile, [Unreadable()], 2)
    with pytest.raises(SemidError, match="can't be started: .*No module named semid"): pool.run({}, range(12))
    pool.close()


class Astray(ShardWorker):
    "Looks where a machine that shares no files would."
    def do(self, job, shard): super().do(job | {"stage": job["stage"].replace("staging", "other")}, shard)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_worker_that_does_not_see_the_shards_says_so(data, tmp_path, monkeypatch, n_workers):
    monkeypatch.setattr(distributed, "ShardWorker", Astray)
    with pytest.raises(ConfigError, match="does not see .*other/manifest.json: .* all machines share"):
        kmeans(tmp_path, n_workers=n_workers).fit(data)
    monkeypatch.undo()
    assert kmeans(tmp_path, max_iter=1).fit(data, resume=True).n_iter_ == 1


def without(name): return lambda progress: {key: value for key, value in progress.items() if key != name}


@pytest.mark.parametrize("damage, says", [
    (lambda p: json.dumps(p)[:-20], "is damaged"), (lambda p: "", "is damaged"),
    (lambda p: [p], "not that of"), (lambda p: 3, "not that of"),
    (lambda p: p | {"type": "other"}, "not that of"),
    (lambda p: p | {"history": p["history"][:1]}, "no whole 'history'"),
    (lambda p: p | {"history": [1] * 20}, "no whole 'history'"),
    (lambda p: p | {"marks": [{}]}, "no whole 'marks'"), (lambda p: p | {"settings": {}}, "'random_state'"),
    *((without(name), f"no whole '{name}'") for name in
      "status settings iteration moved history marks report n_samples inertia n_shards".split())])
def test_damaged_progress_is_one_sentence(data, whole, tmp_path, damage, says):
    progress = damage(json.loads((whole.output_dir / "progress.json").read_text()))
    (tmp_path / "progress.json").write_text(progress if isinstance(progress, str) else json.dumps(progress))
    for resume in True, False, "auto":
        with pytest.raises(DataError, match=says) as refused: kmeans(tmp_path).fit(data, resume=resume)
        assert "\n" not in str(refused.value) and str(tmp_path / "progress.json") in str(refused.value)
    (tmp_path / "progress.json").unlink()
    with pytest.raises(ShapeMismatchError, match="n_samples"): kmeans(tmp_path, N + 1).fit(data, resume=True)


@pytest.mark.parametrize("damage", [
    lambda m: json.dumps(m)[:-20], lambda m: "", lambda m: [m], lambda m: None,
    lambda m: m | {"sizes": "many"}, lambda m: m | {"marks": [{}]}, lambda m: m | {"low": m["low"][:-1]},
    *map(without, ("dim", "sizes", "high"))])
def test_a_damaged_manifest_is_one_sentence(data, tmp_path, damage):
    with pytest.raises(ShapeMismatchError): kmeans(tmp_path, N + 1).fit(data)  # and leaves its stage
    path = tmp_path / "staging" / "manifest.json"
    damaged = damage(json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(DataError, match="manifest.json is damaged .* remove") as refused:
        kmeans(tmp_path, max_iter=1).fit(data, resume=True)
    assert "\n" not in str(refused.value)
    for left in (tmp_path / "staging").iterdir(): left.unlink()
    (tmp_path / "staging").rmdir()
    assert kmeans(tmp_path, max_iter=1).fit(data, resume=True).n_iter_ == 1  # what the sentence says to do


@pytest.mark.parametrize("settings, says", [
    (dict(rows_per_shard=2.5), "rows_per_shard must be a whole number from 1, not 2.5"),
    (dict(n_workers=1.5), "n_workers must be a whole number from 0, not 1.5"),
    (dict(keep_iterations="2"), "keep_iterations must be a whole number from 1, not '2'"),
    (dict(random_state=[1]), "random_state must be a whole number from 0, not [1]"),
    (dict(n_clusters=3.0), "n_clusters must be a whole number from 1, not 3.0"),
    (dict(max_bad_fraction="0"), "max_bad_fraction must be a share from 0 to 1, not '0'")])
def test_a_setting_of_the_wrong_type_is_named_with_its_value(settings, says):
    with pytest.raises(ConfigError) as refused: DistributedKMeans(**settings)
    assert says in str(refused.value)


def test_numbers_of_numpy_are_settings(data, tmp_path):
    model = kmeans(tmp_path, np.int64(3), random_state=np.uint8(1), rows_per_shard=np.int16(999), max_iter=2)
    assert model.fit(data).n_iter_ <= 2 and repr(model).startswith("DistributedKMeans(n_clusters=3, n_work")
