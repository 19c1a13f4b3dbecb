"The registry and MLflow: what is shown there, contents, MLflow away, two processes at once, kill -9."
import bz2, gzip, io, json, logging, lzma, os, pickle, shutil, signal, socket, subprocess, sys
import threading, time, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from semid import ConflictError, MirrorError, ModelService, ModelTrainClass
from semid.config import ConfigError, DataError, ModelFormatError
from semid.registry.mirror import mirror_name
from semid.registry.stores import check_is_there
from semid.registry.sync import _alone, outstanding
from test_registry import postgres  # noqa: F401

mlflow = pytest.importorskip("mlflow")

REFUSING = "http://127.0.0.1:9"
CAR = ModelTrainClass(class_name="car", annotation_type="box", ap=0.85)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    "MLflow's tables, which take seconds to make."
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def open_service(tmp_path):
    def open_(mirror):
        service = ModelService(tmp_path / "registry.db", user="ada", mirror=mirror)
        if not service.get_datasets(): service.create_dataset("streets")
        return service
    return open_


@pytest.fixture
def service(open_service, uri): return open_service(uri)


@pytest.fixture
def client(uri): return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    (folder / "heads").mkdir(parents=True)
    np.savez(folder / "heads" / "car.npz", weight=np.arange(12.0))
    (folder / "metadata.json").write_text('{"type": "YOLO"}')
    return folder


def create(service, name="YOLOv8", **given):
    return service.create_model("streets", name, "yolov8n", training_classes=[CAR], **given)


def versions(client, name="streets.YOLOv8"):
    "The ids of our models by their version."
    found = client.search_model_versions(f"name = '{name}'")
    return {int(one.version): one.tags["semid.model_id"] for one in found}


def production(client, name="streets.YOLOv8"):
    version = client.get_registered_model(name).aliases.get("production")
    return version and client.get_model_version(name, version).tags["semid.model_id"]


def waiting(service):
    with service.database.transaction() as connection: return len(outstanding(connection))


def test_every_change_is_shown(service, client):
    model = create(service, training_parameters={"epochs": 100, "optimizer": {"lr": 0.01}})
    run = client.get_run(model.run_id)
    assert run.data.metrics["semid.ap.car.box"] == 0.85 and run.data.params["semid.optimizer.lr"] == "0.01"
    assert client.get_experiment(run.info.experiment_id).name == "semid-registry"
    version = client.get_model_version("streets.YOLOv8", "1")
    assert version.source == run.info.artifact_uri and version.run_id == model.run_id
    tags = {name.removeprefix("semid."): value for name, value in version.tags.items()}
    assert (tags["baseline_model"], tags["is_trained"], tags["average_ap"], tags["revision"]) == (
        "yolov8n", "false", "0.85", "1")
    bus = ModelTrainClass(class_name="bus", ap=0.65)
    service.update_model("streets", model.id, is_trained=True, training_classes=[CAR, bus])
    tags = client.get_model_version("streets.YOLOv8", "1").tags
    told = [tags[f"semid.{name}"] for name in ("is_trained", "average_ap", "revision")]
    assert told == ["true", "0.75", "2"]
    assert client.get_run(model.run_id).data.metrics["semid.average_ap"] == 0.75
    assert waiting(service) == 0 and service.sync(progress=False) == 0


def test_the_last_pin_is_in_production(service, client):
    first, second, third = (create(service) for _ in range(3))
    assert versions(client) == {1: first.id, 2: second.id, 3: third.id} and production(client) is None
    steps = (("pin", second, second), ("pin", first, first), ("pin", third, third), ("unpin", third, first),
             ("unpin", first, second), ("unpin", second, None))
    for action, model, wanted in steps:
        getattr(service, f"{action}_model")("streets", model.id)
        assert production(client) == (wanted and wanted.id), (action, wanted)


def test_deleted_restored_and_renamed_models(service, client):
    first, second = create(service, is_pinned=True), create(service, is_pinned=True)
    service.delete_model("streets", second.id, force=True)
    assert versions(client) == {1: first.id} and production(client) == first.id
    service.restore_model("streets", second.id)
    assert versions(client) == {1: first.id, 3: second.id} and production(client) == second.id
    service.update_model("streets", second.id, name="a/b: 'c'")
    renamed = mirror_name("streets", "a/b: 'c'")
    assert versions(client) == {1: first.id} and production(client) == first.id
    assert production(client, renamed) == second.id and not {*"/:'"} & {*renamed}


def test_showing_twice_changes_nothing(service, client):
    model = create(service, is_pinned=True)
    before = client.get_model_version("streets.YOLOv8", "1"), client.get_run(model.run_id)
    assert service.sync(progress=False, again=True) == 1
    after = client.get_model_version("streets.YOLOv8", "1"), client.get_run(model.run_id)
    assert before[0].last_updated_timestamp == after[0].last_updated_timestamp
    assert before[1].to_dictionary() == after[1].to_dictionary()
    assert len(client.get_metric_history(model.run_id, "semid.average_ap")) == 1
    [change] = service.get_history("streets", model.id)
    assert (change.action, service.get_model("streets", model.id).revision) == ("create", 1)


def test_what_mlflow_lost_is_shown_again(service, client, uri, open_service):
    model = create(service, is_pinned=True)
    client.delete_registered_model("streets.YOLOv8")
    client.delete_run(model.run_id)
    assert service.sync(progress=False) == 0
    assert service.sync(progress=False, again=True) == 1
    assert production(client) == model.id
    assert service.get_model("streets", model.id).run_id != model.run_id


def test_the_run_that_a_user_names_is_linked_if_it_is_there(service, client):
    training = client.create_run(client.create_experiment("trainings")).info.run_id
    model = create(service, run_id=training)
    assert client.get_model_version("streets.YOLOv8", "1").run_id == training
    for bad in "0" * 32, "../../../etc/passwd", "file:///etc/passwd", "x'; DROP TABLE runs; --":
        model = create(service, "bad", run_id=bad)
        version = client.search_model_versions("name = 'streets.bad'")[0]
        run = client.get_run(version.run_id)
        assert model.run_id == bad and run.data.tags["semid.model_id"] == model.id
        assert version.source == run.info.artifact_uri and "etc" not in version.source


ODD = ["é ü 漢字", "a" * 255, "a\nb", "..", "'; --", "%2e%2e%2f", "a%b_c#d?e", '"quoted"', "\u202e \u00a0"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_shown(service, client, name):
    one = ModelTrainClass(class_name=name, ap=0.5)
    model = service.create_model("streets", name, "b", training_parameters={name: name}, is_pinned=True,
                                 description=name * 70, training_classes=[one])
    assert waiting(service) == 0 and production(client, mirror_name("streets", name)) == model.id


def test_registries_that_share_an_mlflow_keep_apart(open_service, uri, client, tmp_path):
    ours, theirs = open_service(uri), ModelService(tmp_path / "other.db", user="bob", mirror=uri)
    theirs.create_dataset("streets")
    a, b = (create(one, model_id="yolo", is_pinned=True) for one in (ours, theirs))
    assert len(versions(client)) == 2 and a.run_id != b.run_id
    def alias(): return client.get_registered_model("streets.YOLOv8").aliases.get("production")
    assert str(alias()) == "1"  # who was first keeps it
    theirs.unpin_model("streets", "yolo")
    theirs.pin_model("streets", "yolo")
    assert str(alias()) == "1"
    ours.delete_model("streets", "yolo", force=True)
    assert [*versions(client)] == [2] and alias() is None
    theirs.sync(progress=False, again=True)
    assert str(alias()) == "2"


def test_an_alias_that_a_person_set_stays(service, client, caplog):
    first, second = create(service, is_pinned=True), create(service)
    alias = lambda: client.get_registered_model("streets.YOLOv8").aliases.get("production")
    client.set_registered_model_alias("streets.YOLOv8", "production", "2")
    for model in first, second: service.update_model("streets", model.id, description="told anew")
    assert str(alias()) == "2"  # nobody pinned anything
    by_hand = client.create_model_version("streets.YOLOv8", "file:///theirs").version
    client.set_registered_model_alias("streets.YOLOv8", "production", by_hand)
    with caplog.at_level(logging.WARNING): service.pin_model("streets", second.id)
    service.unpin_model("streets", first.id)
    assert str(alias()) == str(by_hand) and "stays it" in caplog.text and waiting(service) == 0
    client.delete_registered_model_alias("streets.YOLOv8", "production")
    service.sync(progress=False, again=True)
    assert production(client) == second.id


def test_models_of_one_run_do_not_overwrite_each_other(service, client):
    run = client.create_run(client.create_experiment("trainings")).info.run_id
    first = create(service, run_id=run, training_parameters={"epochs": 1})
    bus = ModelTrainClass(class_name="bus", ap=0.25)
    second = service.create_model("streets", "other", "b", training_classes=[bus], run_id=run)
    assert first.run_id == second.run_id == run
    found = client.get_run(run).data
    assert found.metrics["semid.average_ap"] == 0.85 and "semid.ap.bus" not in found.metrics
    told = lambda name: json.loads(client.get_model_version(f"streets.{name}", "1").tags["semid.aps"])
    assert [told("YOLOv8"), told("other")] == [{"car.box": 0.85}, {"bus": 0.25}]
    service.update_model("streets", first.id, training_classes=[bus], training_parameters={"epochs": 2})
    tags = client.get_model_version("streets.YOLOv8", "1").tags
    assert told("YOLOv8") == {"bus": 0.25} and json.loads(tags["semid.training_parameters"]) == {"epochs": 2}
    assert client.get_run(run).data.metrics == found.metrics


def warnings_of(caplog): return [one for one in caplog.records if one.name == "semid.registry"]


def test_mlflow_away_then_sync(open_service, uri, client, caplog):
    service = open_service(REFUSING)
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING): models = [create(service) for _ in range(5)]
    service.pin_model("streets", models[2].id)
    service.delete_model("streets", models[4].id)
    assert time.perf_counter() - start < 10
    [said] = warnings_of(caplog)
    assert "is away" in said.getMessage() and "sync" in said.getMessage()
    assert waiting(service) == 5 and models[0].run_id is None
    with pytest.raises(MirrorError, match="is away"): service.sync(progress=False)
    back = open_service(uri)
    assert back.sync(progress=False) == 5 and back.sync(progress=False) == 0
    assert {*versions(client).values()} == {one.id for one in models[:4]}
    first = back.get_model("streets", models[0].id)
    assert production(client) == models[2].id and first.run_id and first.revision == 1


def test_a_server_that_does_not_answer_costs_seconds(open_service, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        service = open_service(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        model = create(service)
        service.pin_model("streets", model.id)
        assert time.perf_counter() - start < 8
    assert len(warnings_of(caplog)) == 1 and service.get_model("streets", model.id).is_pinned


@pytest.fixture
def refusing():
    "A server that says that it is well, and refuses all else."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def _answer(self):
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200 if self.path == "/health" else 503)
            self.send_header("content-length", "0")
            self.end_headers()
        do_GET = do_POST = do_PATCH = _answer
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_server_that_is_healthy_but_refuses_costs_seconds(open_service, refusing, caplog):
    uri, asked = refusing
    service = open_service(uri)
    start = time.perf_counter()
    model = create(service)
    first = time.perf_counter() - start
    service.pin_model("streets", model.id)
    for n in range(20): create(service, f"m{n}")
    assert first < 8 and time.perf_counter() - start < 12
    [said] = warnings_of(caplog)
    assert "has not answered in 5 seconds" in said.getMessage() and len(asked) > 1
    service._sync._not_before = 0  # a minute later, the first is still being tried
    start = time.perf_counter()
    create(service)
    assert time.perf_counter() - start < 2 and waiting(service) == 22
    service._sync.wait = 0.5
    with pytest.raises(MirrorError, match="Another process is showing|has not answered"):
        service.sync(progress=False)


def test_a_process_ends_though_mlflow_does_not_answer(refusing, tmp_path):
    code = ("import sys; from semid import ModelService; s = ModelService(sys.argv[1], mirror=sys.argv[2])\n"
            "s.create_dataset('d'); print(s.create_model('d', 'a', 'b').name)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "registry.db", refusing[0]], timeout=60,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "a") and "Traceback" not in done.stderr


def test_another_attempt_comes_after_a_while(open_service, uri, client, caplog):
    service = open_service(REFUSING)
    first = create(service)
    service._sync.mirror.uri = uri  # it is back
    second = create(service)
    assert second.run_id is None  # within a minute nobody asks
    service._sync._not_before = 0
    third = create(service)
    assert third.run_id and waiting(service) == 2 and len(warnings_of(caplog)) == 1
    service.sync(progress=False)
    assert {*versions(client).values()} == {first.id, second.id, third.id}


def test_a_model_that_mlflow_refuses_does_not_hold_up_the_others(open_service, uri, client, monkeypatch):
    service = open_service(None)
    bad, good = create(service, "bad"), create(service, "good")
    shown = open_service(uri)
    show = shown._sync.mirror.show
    def refuse(model, runs, shared):
        if model.id == bad.id: raise MirrorError("MLflow says: no.")
        return show(model, runs, shared)
    monkeypatch.setattr(shown._sync.mirror, "show", refuse)
    with pytest.raises(MirrorError, match="1 models were shown and 1 were not.*MLflow says: no"):
        shown.sync(progress=False)
    assert versions(client, "streets.good") == {1: good.id} and waiting(shown) == 1


def test_where_mlflow_is_found(tmp_path, monkeypatch, empty_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert ModelService(tmp_path / "registry.db")._sync is None
    with pytest.raises(ConfigError, match="nowhere"): ModelService(tmp_path / "registry.db").sync()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    assert ModelService(tmp_path / "registry.db")._sync.mirror.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert ModelService(tmp_path / "registry.db", mirror=False)._sync is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", REFUSING)
    assert ModelService(tmp_path / "registry.db")._sync.mirror.uri == REFUSING
    assert ModelService(tmp_path / "registry.db", mirror=True)._sync.mirror.uri == REFUSING


def test_a_process_keeps_its_own_mlflow(service, tmp_path):
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)
    service.create_dataset("roads")
    service.create_model("roads", "a", "b")
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)) == before
    assert mlflow.active_run() is None


@pytest.fixture(scope="module")
def start_server(empty_store, tmp_path_factory):
    "Start MLflow's server, again on the same port and with the same tables."
    folder = tmp_path_factory.mktemp("server")
    store = shutil.copy(empty_store, folder / "mlflow.db")
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    options = {"backend-store-uri": f"sqlite:///{store}", "artifacts-destination": folder / "artifacts",
               "port": port, "workers": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "mlflow", "server", *words]
    running = []
    def start():
        with open(folder / "log", "a") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try: check_is_there(f"http://127.0.0.1:{port}")
            except MirrorError: time.sleep(0.2)
            else: return f"http://127.0.0.1:{port}"
        raise AssertionError((folder / "log").read_text()[-2000:])
    def stop():
        for one in running:
            if one.poll() is None: os.killpg(one.pid, signal.SIGKILL)
            one.wait()
    yield start, stop
    stop()


def test_a_server_that_goes_away_and_comes_back(open_service, start_server, weights, tmp_path, caplog):
    start, stop = start_server
    uri = start()
    service, client = open_service(uri), mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    content = service.add_content(weights)
    first = create(service, model_content_id=content.id, is_pinned=True)
    assert first.run_id == content.run_id and production(client) == first.id
    assert (service.download_content(content.id, tmp_path / "back") / "metadata.json").is_file()
    stop()
    second = create(service)
    service.pin_model("streets", second.id)
    assert waiting(service) == 1 and len(warnings_of(caplog)) == 1
    with pytest.raises(MirrorError, match="is away"): service.download_content(content.id, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    start()
    assert service.sync(progress=False) == 1 and service.sync(progress=False, again=True) == 2
    assert versions(client) == {1: first.id, 2: second.id} and production(client) == second.id


SYNC = """
import sys
from semid import ModelService
service = ModelService(sys.argv[1], mirror=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(service.sync(progress=False))
"""


def test_two_processes_sync_at_once(open_service, uri, client, tmp_path):
    service = open_service(None)
    models = [create(service, is_pinned=n == 3) for n in range(6)]
    service.delete_model("streets", models[5].id)
    command = [sys.executable, "-c", SYNC, tmp_path / "registry.db", uri]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for one in running: assert one.stdout.readline() == "ready\n"
    for one in running: print("go", file=one.stdin, flush=True)
    assert sum(int(one.communicate(timeout=120)[0]) for one in running) == 6
    assert sorted(versions(client).values()) == sorted(one.id for one in models[:5])
    assert production(client) == models[3].id and waiting(service) == 0
    runs = client.search_runs([client.get_experiment_by_name("semid-registry").experiment_id])
    assert len(runs) == 5


def test_two_processes_sync_one_postgresql(postgres, uri, client):  # noqa: F811
    service = ModelService(postgres, user="ada", mirror=None)
    service.create_dataset("streets")
    models = [create(service, is_pinned=n == 1) for n in range(4)]
    command = [sys.executable, "-c", SYNC, postgres, uri]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for one in running: assert one.stdout.readline() == "ready\n"
    for one in running: print("go", file=one.stdin, flush=True)
    assert sum(int(one.communicate(timeout=120)[0]) for one in running) == 4
    assert sorted(versions(client).values()) == sorted(one.id for one in models)
    assert production(client) == models[1].id and waiting(service) == 0


@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_who_shows_a_model_waits_for_others_only_so_long(where, request, tmp_path, uri, caplog):
    url = tmp_path / "registry.db" if where == "sqlite" else request.getfixturevalue("postgres")
    service = ModelService(url, user="ada", mirror=uri)
    service.create_dataset(f"waiting-{where}")
    service._sync.wait = 0.3
    with _alone(service.database, 1): model = service.create_model(f"waiting-{where}", "a", "b")
    assert len(warnings_of(caplog)) == 1 and service.get_model(f"waiting-{where}", model.id).run_id is None
    with _alone(service.database, 1), pytest.raises(MirrorError, match="Another process is showing models"):
        service.sync(progress=False)
    service._sync.wait = 30  # MLflow itself may be slow
    assert service.sync(progress=False) == 1


def test_many_threads_on_one_postgresql_hold_each_other_up_only_so_long(postgres, uri, client):  # noqa: F811
    service = ModelService(postgres, user="ada", mirror=uri)
    service.create_dataset("crowded")
    service._sync.patience = 60
    def create_one(n): return service.create_model("crowded", f"m{n}", "b").run_id
    with ThreadPoolExecutor(24) as pool: runs = [*pool.map(create_one, range(24))]  # more than the pool has
    assert len({*runs}) == 24 and None not in runs and waiting(service) == 0


def test_threads_that_show_one_model_make_one_version(open_service, uri, client):
    model = create(open_service(None))
    shown = open_service(uri)
    threads = [threading.Thread(target=shown._sync.try_to_show, args=[model.id]) for _ in range(6)]
    for one in threads: one.start()
    for one in threads: one.join()
    assert versions(client) == {1: model.id} and waiting(shown) == 0


KILLED = """
import os, sys
from semid import ModelService
from semid.registry import sync
from semid.registry.mirror import Mirror
def stop(*_): os.kill(os.getpid(), 9)
if sys.argv[3] == "before": sync.MirrorSync.try_to_show = stop
elif sys.argv[3] == "after the version": Mirror.hide = stop
else: sync._write = stop
service = ModelService(sys.argv[1], mirror=sys.argv[2])
service.create_model("streets", "YOLOv8", "yolov8n", is_pinned=True)
"""


@pytest.mark.parametrize("when", ["before", "after the version", "before it is noted"])
def test_killed_between_the_registry_and_mlflow(open_service, uri, client, tmp_path, when):
    open_service(None)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "registry.db", uri, when], timeout=120)
    assert done.returncode == -signal.SIGKILL
    service = open_service(uri)
    [model] = service.iter_models("streets")
    assert waiting(service) == 1 and len(client.search_model_versions()) == (when != "before")
    assert service.sync(progress=False) == 1 and service.sync(progress=False) == 0
    assert versions(client) == {1: model.id} and production(client) == model.id
    runs = client.search_runs([client.get_experiment_by_name("semid-registry").experiment_id])
    assert [run.info.run_id for run in runs] == [service.get_model("streets", model.id).run_id]


def test_contents_come_back_as_they_were(service, client, weights, tmp_path):
    content = service.add_content(weights)
    assert [file.path for file in content.files] == ["heads/car.npz", "metadata.json"]
    assert service.get_content(content.id) == content and content.created_by == "ada"
    back = service.download_content(content.id, tmp_path / "back")
    came = {path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file()}
    assert came == {file.path for file in content.files}
    assert all((back / name).read_bytes() == (weights / name).read_bytes() for name in came)
    assert service.download_content(content.id, tmp_path / "back") == back
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".part")) == []
    model = create(service, model_content_id=content.id)
    version = client.get_model_version("streets.YOLOv8", "1")
    assert model.run_id == content.run_id == version.run_id
    assert version.source == f"{client.get_run(content.run_id).info.artifact_uri}/contents/{content.id}"
    with pytest.raises(ConflictError, match="something else"):
        service.download_content(content.id, weights / "heads")


def test_a_file_goes_to_the_run_that_is_named(service, client, weights):
    run = client.create_run(client.create_experiment("trainings")).info.run_id
    content = service.add_content(weights / "metadata.json", "about-1", run)
    assert (content.run_id, [file.path for file in content.files]) == (run, ["metadata.json"])
    assert [one.path for one in client.list_artifacts(run, "contents")] == ["contents/about-1"]
    assert client.get_run(run).info.status == "RUNNING"  # a run of others is not ended
    assert service.add_content(weights / "metadata.json", "about-1").run_id == run
    with pytest.raises(ConflictError, match="another content"): service.add_content(weights, "about-1")
    with pytest.raises(LookupError, match="no run"): service.add_content(weights, run_id="f" * 32)


def stored(tmp_path, content): return next((tmp_path / "mlartifacts").rglob(content.id))


def flip(folder):
    path = folder / "heads" / "car.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(folder):
    (folder / "metadata.json").unlink()
    (folder / "metadata.json").symlink_to("/etc/hostname")


TAMPERING = {"a bit": flip, "cut off": lambda folder: os.truncate(folder / "metadata.json", 3),
             "one more": lambda folder: (folder / "more.json").write_text("{}"),
             "one less": lambda folder: (folder / "metadata.json").unlink(), "a link": link,
             "all gone": shutil.rmtree}


@pytest.mark.parametrize("how", TAMPERING)
def test_tampered_artifacts_are_refused(service, weights, tmp_path, how):
    content = service.add_content(weights)
    TAMPERING[how](stored(tmp_path, content))
    with pytest.raises((ModelFormatError, MirrorError)):
        service.download_content(content.id, tmp_path / "to" / "back")
    assert list((tmp_path / "to").iterdir()) == []


def evil(path): path.write_bytes(pickle.dumps(print))
def text(path): path.write_text("a")


def wide(path):
    "An array with objects, whose header is longer than numpy reads unless it may unpickle."
    np.save(path, np.array([], [("x" * 20_000, object)]))


def locked(path):
    "An archive whose first array says that it is encrypted, and whose second holds an object."
    np.savez(path, a=np.arange(3), b=np.array([{}], object))
    whole = bytearray(path.read_bytes())
    for mark, at in (b"PK\x03\x04", 6), (b"PK\x01\x02", 8): whole[whole.index(mark) + at] |= 1
    path.write_bytes(whole)


def archive(name, content, kind=zipfile.ZIP_STORED, damaged=False):
    "What writes an archive with one member, of which some bytes were lost when it is damaged."
    def write(path):
        with zipfile.ZipFile(path, "w", kind) as file: file.writestr(name, content)
        if damaged:
            whole = bytearray(path.read_bytes())
            start = 30 + len(name) + 9  # after the local header, and what the method says of itself
            whole[start:start + 20] = bytes(20)
            path.write_bytes(whole)
    return write


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def disguised(path):
    "A pickle whose first bytes are also those of a safetensors file, with a header as long as the file."
    path.write_bytes((b"\x80\x04B\2\0\0\0\0{0" + pickle.dumps(print, 3)[2:]).ljust(37_880_968))


def deep(path):
    "What begins as a pickle, and as the header of a safetensors file that no parser gets to the end of."
    path.write_bytes(((0x20280).to_bytes(8, "little") + b'{"a":' + b"[" * 100_000).ljust(0x20288))


def packed(by):
    "What writes a compressed pickle."
    return lambda path: path.write_bytes(by(pickle.dumps(print)))


def newer(path):
    "An archive that says to need another program."
    archive("a.npy", PLAIN)(path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\1\2") + 6] = 99
    path.write_bytes(whole)


def nameless(path):
    "An archive with a name that is no text."
    archive("a.npy", PLAIN)(path)
    whole = bytearray(path.read_bytes())
    at = whole.index(b"PK\1\2")
    whole[at + 9] |= 8
    whole[at + 46] = 0xff
    path.write_bytes(whole)


OBJECTS, PLAIN = saved(np.array([{}], object)), saved(np.arange(1000))
UNREADABLE = b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': (((('<f8'".ljust(64)

REFUSED = {
    "pickle": ("a.json", evil), "header of no form": ("a.npy", lambda path: path.write_bytes(UNREADABLE)),
    "header of no form in an archive": ("a.npz", archive("a.npy", UNREADABLE)),
    "pickle that begins like safetensors": ("a.dat", disguised), "odd archive": ("a.npz", newer),
    "name of no letters": ("a.npz", nameless),
    "cut archive": ("a.npz", lambda path: path.write_bytes(b"PK\3\4" * 9)),
    "damaged bz2": ("a.npz", archive("a.npy", PLAIN, zipfile.ZIP_BZIP2, damaged=True)),
    "damaged lzma": ("a.npz", archive("a.npy", PLAIN, zipfile.ZIP_LZMA, damaged=True)),
    "objects in a member of another name": ("a.npz", archive("a", OBJECTS)),
    "pickle in a member of another name": ("a.zip", archive("a.txt", pickle.dumps(print))),
    "deep header": ("a.safetensors", deep), "gzip": ("a.gz", packed(gzip.compress)),
    "bz2": ("a.dat", packed(bz2.compress)), "xz": ("a.dat", packed(lzma.compress)),
    "lzma": ("a.dat", packed(lambda data: lzma.compress(data, lzma.FORMAT_ALONE))),
    "zlib": ("a.z", packed(zlib.compress)), "cut gzip": ("a.gz", lambda path: path.write_bytes(b"\x1f\x8b")),
    "Zstandard": ("a.dat", lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" * 9)),
    "named .pkl.gz": ("a.pkl.gz", text),
    "named .pkl": ("a.pkl", text), "named .pt": ("a.PT", text),
    "objects": ("a.npy", lambda path: np.save(path, np.array([{}], object))),
    "archive": ("a.npz", lambda path: np.savez(path, a=np.array([{}], object))),
    "pickle behind a locked member": ("a.npz", locked), "long header": ("a.npy", wide),
    "link out": ("a.json", lambda path: path.symlink_to("/etc/hostname")),
    "link to a folder": ("a", lambda path: path.symlink_to("/etc")), "device": ("a.json", os.mkfifo),
    "dangling": ("a.json", lambda path: path.symlink_to("nothing")), "empty": ("a.json", Path.touch),
    "odd name": ("a%2e.json", text), "back slash": ("a\\b", text), "new line": ("a\nb", text)}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_a_content(service, client, weights, what):
    name, make = REFUSED[what]
    make(weights / name)
    with pytest.raises((DataError, ModelFormatError)): service.add_content(weights)
    assert client.get_experiment_by_name("semid-registry") is None  # nothing was sent


def test_ids_that_lead_elsewhere_are_refused(service, weights, tmp_path):
    for bad in "..", ".", "../x", "a/b", "/etc", "a\0", "x" * 129:
        with pytest.raises(DataError): service.add_content(weights, bad)
    (tmp_path / "nothing").mkdir()
    for path in tmp_path / "nothing", tmp_path / "missing":
        with pytest.raises(DataError): service.add_content(path)
    assert not (tmp_path / "mlartifacts").exists()


def test_what_a_killed_upload_left_is_made_whole(service, client, weights, tmp_path):
    run = client.create_run(client.create_experiment("trainings", artifact_location=(
        tmp_path / "mlartifacts").as_uri())).info.run_id
    (tmp_path / "part").write_text('{"ty')
    shutil.copy(tmp_path / "part", tmp_path / "metadata.json")
    client.log_artifact(run, tmp_path / "metadata.json", "contents/yolo-1")
    content = service.add_content(weights, "yolo-1", run)
    back = service.download_content(content.id, tmp_path / "back")
    assert json.loads((back / "metadata.json").read_text()) == {"type": "YOLO"}


def test_without_a_mirror_mlflow_is_not_imported(tmp_path):
    code = ("import sys; from semid import ModelService; s = ModelService(sys.argv[1])\n"
            "s.create_dataset('d'); s.create_model('d', 'a', 'b', is_pinned=True)\n"
            "print('mlflow' in sys.modules)")
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-c", code, tmp_path / "registry.db"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
