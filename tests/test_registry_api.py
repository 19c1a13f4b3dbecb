"The registry over HTTP: whatever is sent, without a token, too much, too slowly; and its client."
import hashlib
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import schemathesis
import sqlalchemy as sa
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from semid import ModelService, RegistryClient, create_registry_app
from semid.config import ConfigError, DataError, SemidError
from semid.registry import client as registry_client
from semid.registry.entities import ConflictError, Model, ModelPageInfo, NotFoundError
from semid.registry.tables import TABLES

TOKEN = "the-token-of-bob-1234"
AS_BOB = {"Authorization": f"Bearer {TOKEN}"}
AS_JSON = {"content-type": "application/json"}
MODELS, SEARCH = "/datasets/streets/models", "/datasets/streets/models/search"
MODEL = f"{MODELS}/m1"


@pytest.fixture(scope="module", autouse=True)
def mlflow_elsewhere(tmp_path_factory):
    "Contents of these tests go to an MLflow of their own."
    for name in "mlflow", "alembic": logging.getLogger(name).setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        patch.delenv("SEMID_REGISTRY_TOKEN", raising=False)
        yield


def filled(path, **how):
    "A registry with a dataset, two slices and a model."
    service = ModelService(path, user="ada", mirror=None, **how)
    service.create_dataset("streets")
    for name in "train", "test": service.create_slice("streets", name, data_count=1200)
    service.create_model("streets", "v1", "yolov8n", ["train"], ["test"], model_id="m1")
    return service


@pytest.fixture
def service(tmp_path): return filled(tmp_path / "registry.db")


@pytest.fixture
def here(service):
    "Requests on this machine, without a token."
    return TestClient(create_registry_app(service), base_url="http://localhost")


def rows(service):
    "How many rows each table has."
    with service.database.transaction() as connection:
        return {table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in TABLES.sorted_tables}


def unharmed(service, before):
    "Are all tables whole, and is what was there still there?"
    with service.database.transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    after = rows(service)
    assert all(after[name] >= n for name, n in before.items())
    assert service.get_model("streets", "m1").name == "v1"


def port_of():
    with socket.create_server(("127.0.0.1", 0)) as free: return free.getsockname()[1]


@pytest.fixture
def serve():
    "Serve an application in a thread: its port."
    servers = []
    def start(app):
        listening = socket.create_server(("127.0.0.1", 0))
        servers.append(uvicorn.Server(uvicorn.Config(app, log_level="critical")))
        threading.Thread(target=servers[-1].run, args=([listening],), daemon=True).start()
        while not servers[-1].started: time.sleep(0.01)
        return listening.getsockname()[1]
    yield start
    for one in servers: one.should_exit = True


@pytest.fixture
def run():
    "Serve a registry in another process: its process and port, once it answers."
    running = []
    code = ("import sys; from semid import ModelService, serve_registry;"
            "path, host, port = sys.argv[1:];"
            "serve_registry(ModelService(path, user='ada', mirror=None), host, int(port))")
    def start(path, host="127.0.0.1"):
        port = port_of()
        command = [sys.executable, "-u", "-c", code, str(path), host, str(port)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and running[-1].poll() is None:
            try: httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
            except httpx.TransportError: time.sleep(0.05)
            else: break
        return running[-1], port
    yield start
    for one in running:
        one.terminate()
        one.communicate()


def described(service):
    "The operations of a registry with a token."
    app = create_registry_app(service, {TOKEN: "bob"}, max_body=100_000, max_file=100_000)
    loaded = schemathesis.openapi.from_asgi("/openapi.json", app, headers=AS_BOB)
    return [found.ok() for found in loaded.get_all_operations()]


CHECKS = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "ignored_auth",
    "response_schema_conformance", "response_headers_conformance")]


def send_all(operations, mode, known, examples):
    "Send each operation some requests; the answers are of those described. How many were sent, by status."
    statuses = {}
    for operation in operations:
        if mode.is_negative and operation.path == "/health": continue  # there is nothing to send

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                  suppress_health_check=[*HealthCheck])
        def send(case):
            there = {name: value for name, value in known.items() if name in case.path_parameters}
            case.path_parameters.update(there)
            # a cursor, or an id, has to be one that was given out: what fits its description can be refused
            checks = {"checks": CHECKS} if known else {"excluded_checks": [positive_data_acceptance]}
            answer = case.call_and_validate(headers=AS_BOB, **checks)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code >= 400: assert isinstance(answer.json()["detail"], str)

        send()
    return statuses


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_whatever_is_sent_is_answered_as_described(service, mode):
    before = rows(service)
    statuses = send_all(described(service), mode, {}, 20)
    assert sum(statuses.values()) > 300 and max(statuses) < 500
    unharmed(service, before)


def test_whatever_is_sent_to_what_is_there_is_answered_as_described(service):
    known = {"dataset_id": "streets", "model_id": "m1", "slice_id": "train"}
    operations = [one for one in described(service) if "{dataset_id}" in one.path and one.method != "delete"]
    statuses = send_all(operations, schemathesis.GenerationMode.POSITIVE, known, 30)
    assert len(CHECKS) == 6 and max(statuses) < 500
    assert statuses[200] > 100 and statuses[201] >= 10 and rows(service)["registry_models"] > 1


def every_request(app):
    "Methods and addresses that are described, and some that are not."
    found = [(method, re.sub(r"\{\w+\}", "a", path)) for path, methods in app.openapi()["paths"].items()
             for method in methods if path != "/health"]
    others = [("get", path) for path in ("/", "/openapi.json", "/docs", "/health/", "//health")]
    return [*found, *others, ("put", "/a"), ("head", "/datasets"), ("options", "/datasets")]


def test_nobody_without_the_token_learns_anything(service):
    before, app = rows(service), create_registry_app(service, {TOKEN: "bob"})
    client = TestClient(app)
    requests = every_request(app)
    assert len(requests) >= 26
    wrong = ({}, {"Authorization": "Bearer the-token-of-eve-1234"}, {"Authorization": f"Basic {TOKEN}"},
             {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"X-Token": TOKEN})
    for method, path in requests:
        answers = [client.request(method, path, headers=headers) for headers in wrong]
        assert {answer.status_code for answer in answers} == {401}, (method, path)
        assert all(answer.headers["www-authenticate"].startswith("Bearer") for answer in answers)
        assert all("datasets" not in answer.text and TOKEN not in answer.text for answer in answers)
    assert client.get(f"/datasets?token={TOKEN}").status_code == 401
    assert client.get("/datasets", cookies={"token": TOKEN}).status_code == 401
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/datasets", headers=AS_BOB).status_code == 200
    assert rows(service) == before


def test_pages_of_the_web_can_not_use_a_registry_of_this_machine(service, here):
    before = rows(service)
    new = json.dumps({"id": "evil"})
    for kind in "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", None:
        headers = {"content-type": kind} if kind else {}
        for path in "/datasets", "/datasets/streets/slices", f"{MODEL}/pin", f"{MODEL}/restore":
            assert here.post(path, content=new, headers=headers).status_code == 415
        assert here.patch(MODEL, content=new, headers=headers).status_code == 415
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"},
                    {"host": "evil.example:80", "origin": "http://evil.example:80"}, {"host": "localhost.a"}):
        answers = [here.get(path, headers=headers) for path in ("/datasets", "/health")]
        answers += [here.post("/datasets", content=new, headers=AS_JSON | headers),
                    here.delete(MODEL, headers=headers)]
        assert {answer.status_code for answer in answers} == {403}, headers
    asked = {"origin": "http://localhost", "access-control-request-method": "POST"}
    allowed = here.options("/datasets", headers=asked)
    assert allowed.status_code == 405 and "access-control-allow-origin" not in allowed.headers
    assert rows(service) == before
    for host in "localhost:8100", "127.0.0.1", "[::1]:1":
        assert here.get("/datasets", headers={"host": host}).is_success
    for far in "203.0.113.7", "::ffff:203.0.113.7", "2001:db8::1":
        other = TestClient(create_registry_app(service), base_url="http://localhost", client=(far, 50000))
        assert other.get("/datasets").status_code == 403


def test_answers_are_made_where_they_hold_nobody_up(service, here, monkeypatch):
    threads, ask, write = [], ModelService.get_models, Model.model_dump_json

    def asked(*given, **named):
        threads.append(threading.get_ident())
        return ask(*given, **named)

    def written(*given, **named):
        threads.append(threading.get_ident())
        return write(*given, **named)

    monkeypatch.setattr(ModelService, "get_models", asked)
    monkeypatch.setattr(Model, "model_dump_json", written)
    page = here.get(MODELS).json()
    assert len(threads) == 2 and len(set(threads)) == 1
    assert ModelPageInfo.model_validate(page).models[0] == service.get_model("streets", "m1")


HARM = ["'; DROP TABLE registry_models; --", '" OR 1=1 --', "%", "_", "100%_/\\", "../../etc/passwd", "..",
        ".", "a\0b", "\ud800", "a\r\nSet-Cookie: a=b", "${jndi:ldap://a}", "{{7*7}}", "<script>",
        "\u202e", "💥" * 60, "a" * 300, " ", "NULL", "Robert'); DELETE FROM registry_models WHERE ('1'='1"]
NEW = {"name": "a", "baselineModel": "b"}


def bodies_with(text):
    "Every field that takes a text, with this one."
    filters = [{name: text} for name in ("name", "nameContains", "baselineModel", "createdAfter")]
    filters += [{"idIn": [text]}, {"meta": {text: text}}, {"classAp": [{"class": text}]}]
    models = [{name: text} for name in ("name", "baselineModel", "description", "meta", "id", "runId",
                                        "modelContentId")]
    models += [{name: [text]} for name in ("trainingSliceIds", "validationSliceIds")]
    models += [{"trainingClasses": [{"class": text}]}, {"trainingParameters": {text: text}},
               {"isTrained": True, "trainedAt": text}, {text: text}]
    return [("/datasets", {"id": text}), ("/datasets", {"id": "d", "name": text, "description": text}),
            ("/datasets/streets/slices", {"id": text}),
            (SEARCH, {"cursor": text}), (SEARCH, {"orderBy": text}),
            *((MODELS, NEW | one) for one in models),
            *((SEARCH, {"filter": {"must": one, "not": one}}) for one in filters)]


PLACES = ["/datasets/{}/slices", "/datasets/{}/models", "/datasets/streets/slices/{}", MODELS + "/{}",
          MODELS + "/{}/history", "/contents/{}", "/contents/{}/files/a", "/contents/a/files/{}",
          MODELS + "?cursor={}", MODELS + "?orderBy={}&length={}", "/{}"]


def test_text_that_does_harm_elsewhere_is_text_here(service, here):
    before, said = rows(service), []
    for text in HARM:
        bodies = [(path, json.dumps(body)) for path, body in bodies_with(text)]
        said += [here.post(path, content=body, headers=AS_JSON) for path, body in bodies]
        sent = text.encode("utf-8", "surrogatepass")
        quoted = "".join(f"%{byte:02x}" for byte in sent)
        said += [here.get(path.replace("{}", quoted)) for path in PLACES]
        said += [here.delete(f"{MODELS}/{quoted}?force=true")]
        said += [here.get("/datasets", headers={"x-a": sent.translate(None, b"\0\r\n")})]
    assert {answer.status_code for answer in said} <= {200, 201, 204, 400, 404, 405, 409, 422}
    assert not any("set-cookie" in answer.headers or "root:" in answer.text for answer in said)
    assert sum(answer.status_code == 201 for answer in said) > 100  # most of it is kept, as text
    unharmed(service, before)


def test_wildcards_mean_themselves(service, here):
    for name in "100%", "100x", "a_b", "axb": service.create_model("streets", name, "b")
    def found(part):
        asked = {"filter": {"must": {"nameContains": part}}, "orderBy": "name"}
        return [one["name"] for one in here.post(SEARCH, json=asked).json()["models"]]
    assert [found("0%"), found("A_"), found("%"), found("\\")] == [["100%"], ["a_b"], ["100%"], []]


def test_cursors_are_nobody_elses(service, here):
    service.create_dataset("roads")
    for dataset in "streets", "roads":
        for n in range(5): service.create_model(dataset, f"m{n}", "b")
    page = lambda dataset, **asked: here.get(f"/datasets/{dataset}/models", params={"length": 2, **asked})
    cursor = page("streets").json()["next"]
    assert page("streets", cursor=cursor).status_code == 200
    changed = [cursor[:n] + ("A" if cursor[n] != "A" else "B") + cursor[n + 1:]
               for n in range(0, len(cursor) - 1, 7)]
    for bad in [*changed, cursor[:-4], cursor[4:], cursor * 2, "", "a", "=" * 40]:
        assert page("streets", cursor=bad).status_code == 400, bad
    assert page("roads", cursor=cursor).status_code == 400
    assert page("streets", cursor=cursor, orderBy="name").status_code == 400
    assert page("streets", cursor=cursor, deleted=True).status_code == 400


# What is asked of a model


def test_null_takes_away_and_absent_leaves(service, here):
    full = {"description": "d", "meta": {"a": 1}, "trainingParameters": {"lr": 0.1}, "isTrained": True,
            "trainingClasses": [{"class": "car", "ap": 0.5}]}
    assert here.patch(MODEL, json=full).status_code == 200
    same = here.patch(MODEL, json={}).json()
    assert {name: same[name] for name in ("description", "meta", "trainingParameters")} == {
        name: full[name] for name in ("description", "meta", "trainingParameters")}
    assert same["trainingSlices"][0]["id"] == "train" and same["trainedAt"]
    gone = {"description": None, "meta": None, "trainingParameters": None, "trainingClasses": [],
            "trainingSlices": [], "validationSlices": []}
    for name, nothing in gone.items():
        changed = here.patch(MODEL, json={name.replace("Slices", "SliceIds"): None}).json()
        assert changed[name] == nothing and changed["name"] == "v1"
    for name in "name", "baselineModel", "isTrained":
        answer = here.patch(MODEL, json={name: None})
        assert answer.status_code == 422 and name in answer.json()["detail"]
    twice = here.patch(MODEL, content=b'{"name": "a", "name": "b"}', headers=AS_JSON)
    assert twice.json()["name"] == "b"


def test_who_saw_an_older_revision_is_told(service, here):
    assert here.patch(MODEL, json={"name": "v2", "revision": 1}).json()["revision"] == 2
    late = [here.patch(MODEL, json={"name": "v3", "revision": 1}), here.delete(f"{MODEL}?revision=1"),
            here.patch(MODEL, json={"revision": 10**40}),
            *(here.post(f"{MODEL}/{what}", json={"revision": 1}) for what in ("pin", "unpin"))]
    assert {answer.status_code for answer in late} == {409}
    assert "changed by ada" in late[0].json()["detail"]
    assert here.get(MODEL).json()["revision"] == 2
    for bad in "2", 2.5, True, [2]:
        assert here.post(f"{MODEL}/pin", json={"revision": bad}).status_code == 422
    assert here.post(f"{MODEL}/pin", json={"revision": 2}).json()["isPinned"]
    assert here.delete(f"{MODEL}?revision=3").status_code == 409  # it is pinned
    assert here.delete(f"{MODEL}?revision=3&force=true").status_code == 204
    assert here.delete(MODEL).status_code == 404


# What takes too much, or too long


def test_a_byte_too_many(service):
    client = TestClient(create_registry_app(service, max_body=1000), base_url="http://localhost")
    def post(size):
        body = b'{"name": "a", "baselineModel": "b", "meta": "' + b"a" * (size - 47) + b'"}'
        assert len(body) == size
        return client.post(MODELS, content=body, headers=AS_JSON)
    assert [post(1000).status_code, post(1001).status_code] == [201, 413]
    chunks = (b"a" * 600 for _ in range(2))
    assert client.patch(MODEL, content=chunks, headers=AS_JSON).status_code == 413


def raw(port, head, *parts, pause=0.0):
    "What a server says to bytes that come one after the other."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(head)
        for part in parts:
            time.sleep(pause)
            try: client.sendall(part)
            except OSError: break
        answer = b""
        while portion := client.recv(65536): answer += portion
    return answer


def test_a_body_that_does_not_come(service, serve):
    port = serve(create_registry_app(service, upload_timeout=0.5))
    head = (b"%s HTTP/1.1\r\nhost: localhost\r\ncontent-type: %s\r\ncontent-length: 100\r\n"
            b"connection: close\r\n\r\n{")
    start = time.monotonic()
    assert raw(port, head % (b"POST /datasets", b"application/json")).startswith(b"HTTP/1.1 408")
    drops = raw(port, head % (b"POST /datasets", b"application/json"), *[b" "] * 20, pause=0.1)
    assert drops.startswith(b"HTTP/1.1 408")  # however it drips
    file = raw(port, head % (b"PUT /contents/a/files/a", b"application/octet-stream"))
    assert file.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - start < 15
    assert httpx.get(f"http://127.0.0.1:{port}/datasets", trust_env=False).status_code == 200


def test_bytes_that_are_no_request(service, serve):
    port = serve(create_registry_app(service))
    close = b"connection: close\r\n\r\n"
    usual = b" HTTP/1.1\r\nhost: localhost\r\n"
    for bad in (b"GET / HTTP/1.1\r\n" + close, b"GET /datasets" + usual + b"host: a\r\n" + close,
                b"GET /datasets\0" + usual + close, b"\xff\xfe / HTTP/1.1\r\n\r\n",
                b"POST /datasets" + usual + b"content-length: -1\r\n" + close,
                b"GET /" + b"a" * 70_000 + usual + close, b"GET /datasets HTTP/1.0\r\n\r\n",
                b"GET //evil.example/datasets" + usual + close):
        assert re.match(rb"HTTP/1.1 4\d\d", raw(port, bad)), bad[:40]
    assert httpx.get(f"http://127.0.0.1:{port}/datasets", trust_env=False).status_code == 200


def test_files_that_do_not_arrive_whole_are_not_kept(service, tmp_path):
    client = TestClient(create_registry_app(service, max_file=1000), base_url="http://localhost")
    weights, kind = b"weights" * 10, {"content-type": "application/octet-stream"}
    digest = hashlib.sha256(weights).hexdigest()
    def put(path, content=weights, **headers):
        return client.put(f"/contents/{path}", content=content, headers=kind | headers).status_code
    assert put("w/files/w.safetensors", **{"x-sha256": digest[:-1] + "0"}) == 400
    assert put("w/files/w.safetensors", **{"x-sha256": "no"}) == 422
    for large in b"a" * 1001, iter([b"a" * 600] * 2): assert put("w/files/w.safetensors", large) == 413
    assert put("w/files/w.safetensors", **{"content-type": "text/plain"}) == 415
    assert put("w/files/w.safetensors", b"") == 400
    for name in ("..", "%2e%2e", "..%5ca", "a%00b", "a%0d%0ab", ".", "%20", "a" * 300, "w.pkl", "c:a"):
        assert put(f"w/files/{name}") in (400, 404, 405), name
    for name in "..%2fa", "a/b", "%2fetc%2fpasswd": assert put(f"w/files/{name}") in (404, 405)
    for bad in "%2e%2e", "a%00", "a b", "a" * 200:
        assert put(f"{bad}/files/w.safetensors") in (400, 404), bad
    assert client.get("/contents/w").status_code == 404 and rows(service)["registry_contents"] == 0
    assert put("w/files/w.safetensors", **{"x-sha256": digest}) == 201
    answer = client.get("/contents/w/files/w.safetensors")
    assert answer.content == weights and answer.headers["x-sha256"] == digest
    assert answer.headers["content-type"] == "application/octet-stream"
    assert put("w/files/w.safetensors", b"other") == 409
    for name in ("", "../w/w.safetensors", "%2e%2e/registry.db", "W.SAFETENSORS", "w.safetensors/",
                 "..%2f..%2fetc%2fpasswd"):
        assert client.get(f"/contents/w/files/{name}").status_code == 404


def test_a_content_that_was_damaged_is_not_given(service, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = TestClient(create_registry_app(service), base_url="http://localhost")
    headers = {"content-type": "application/octet-stream"}
    assert client.put("/contents/w/files/w.json", content=b"{}", headers=headers).status_code == 201
    kept = next(tmp_path.rglob("contents/w/w.json"))
    kept.write_text("[]")
    answer = client.get("/contents/w/files/w.json")
    assert answer.status_code == 500 and "not what was stored" in answer.json()["detail"]


# The other side


def counting(status, body=b"<html>Bad Gateway</html>", wait=0.0):
    "A server that answers everything alike, and what it was asked."
    asked = []
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def _answer(self):
            asked.append(self.command)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            time.sleep(wait)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _answer
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


READS = [lambda on: on.get_datasets(), lambda on: on.get_slices("d"), lambda on: on.get_slice("d", "s"),
         lambda on: on.get_models("d"), lambda on: [*on.iter_models("d")], lambda on: on.get_model("d", "m"),
         lambda on: on.get_history("d", "m"), lambda on: on.get_content("c"),
         lambda on: on.download_content("c", "x")]
CHANGES = [lambda on: on.create_dataset("d"), lambda on: on.create_slice("d", "s"),
           lambda on: on.create_model("d", "a", "b"), lambda on: on.update_model("d", "m", name="a"),
           lambda on: on.pin_model("d", "m"), lambda on: on.unpin_model("d", "m"),
           lambda on: on.delete_model("d", "m"), lambda on: on.restore_model("d", "m")]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_only_what_reads_is_asked_again(status):
    server, asked = counting(status)
    with RegistryClient(f"http://127.0.0.1:{server.server_port}", TOKEN, retries=2) as client:
        for calls, times in (READS, 3), (CHANGES, 1):
            for call in calls:
                asked.clear()
                with pytest.raises(SemidError, match=str(status)): call(client)
                assert len(asked) == times
    server.shutdown()
    server.server_close()


def test_a_change_whose_connection_breaks_is_not_made_twice():
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def hang_up():
            while True:
                try: connection, _ = server.accept()
                except OSError: return
                asked.append(connection.recv(65536))
                connection.close()
        threading.Thread(target=hang_up, daemon=True).start()
        with RegistryClient(f"http://127.0.0.1:{server.getsockname()[1]}", retries=2) as client:
            with pytest.raises(SemidError, match="been done or not"): client.create_model("d", "a", "b")
            assert len(asked) == 1
            with pytest.raises(SemidError, match="gave no answer"): client.get_model("d", "m")
            assert len(asked) == 4
    assert not any(TOKEN.encode() in one for one in asked)


def test_weights_are_kept_though_every_answer_is_lost(service, serve, tmp_path):
    "Between client and registry, each first answer is thrown away."
    port, lost = serve(create_registry_app(service)), []
    class Careless(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def _pass_on(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            answer = httpx.request(self.command, f"http://localhost:{port}{self.path}", content=body,
                                   headers=headers, timeout=60, trust_env=False)
            if (asked := (self.command, self.path)) not in lost:
                lost.append(asked)
                return self.connection.close()
            self.send_response(answer.status_code)
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)
        do_GET = do_PUT = _pass_on
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "model" / "deep").mkdir(parents=True)
    for name in "a.json", "deep/b.json": (tmp_path / "model" / name).write_text(name)
    with RegistryClient(f"http://127.0.0.1:{server.server_port}") as client:
        for path in tmp_path / "model", tmp_path / "model" / "a.json":
            content = client.add_content(path)
            back = client.download_content(content.id, tmp_path / content.id)
            for file in content.files:
                assert (back / file.path).read_text() == file.path
    assert sorted(method for method, _ in lost) == ["GET"] * 5 + ["PUT"] * 2
    assert rows(service)["registry_contents"] == 2
    server.shutdown()
    server.server_close()


def test_weights_that_a_gateway_swallows_are_sent_again():
    for status, times in (502, 3), (504, 3), (503, 1):  # 503 is the registry's own: nothing was lost
        server, asked = counting(status)
        with RegistryClient(f"http://127.0.0.1:{server.server_port}", TOKEN, retries=2) as client:
            with pytest.raises(SemidError, match=str(status)): client.add_content(__file__)
        assert asked.count("PUT") == times
        server.shutdown()
        server.server_close()


def test_weights_may_take_their_time(tmp_path):
    "An answer that comes after the usual timeout, but within that of transfers."
    digest = hashlib.sha256(b"weights").hexdigest()
    whole = hashlib.sha256(f"{digest}  w.npz\n".encode()).hexdigest()
    files = [{"path": "w.npz", "sha256": digest, "size": 7}]
    body = json.dumps({"id": "c", "sha256": whole, "files": files}).encode()
    server, asked = counting(201, body, wait=1.0)
    (tmp_path / "w.npz").write_bytes(b"weights")
    with RegistryClient(f"http://127.0.0.1:{server.server_port}", timeout=0.3, retries=0) as client:
        assert client.add_content(tmp_path / "w.npz", "c").sha256 == whole
        with pytest.raises(SemidError, match="none in 0.3 s"): client.get_content("c")
    with RegistryClient(f"http://127.0.0.1:{server.server_port}", timeout=0.3,
                        transfer_timeout=0.4) as client:
        with pytest.raises(SemidError, match="none in 0.4 s"): client.add_content(tmp_path / "w.npz", "c")
    assert asked.count("PUT") == 2  # what may still be stored is not sent again
    server.shutdown()
    server.server_close()


def test_weights_that_grow_while_they_are_sent(service, serve, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.json").write_text("a")
    def late(path, known=registry_client.describe):
        found = known(path)
        (path / "a.json").write_text("a" * 100_000)
        return found
    monkeypatch.setattr(registry_client, "describe", late)
    with RegistryClient(f"http://127.0.0.1:{serve(create_registry_app(service))}") as client:
        with pytest.raises(DataError, match="chang"): client.add_content(tmp_path / "model")
    assert rows(service)["registry_contents"] == 0


def test_folders_that_are_not_what_they_say(service):
    client = TestClient(create_registry_app(service, max_file=1000), base_url="http://localhost")
    def put(body, place="/contents/c"):
        return client.put(place, content=body, headers={"content-type": "application/octet-stream"})
    def folder(*named):
        files = [{"path": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
                 for name, data in named]
        return json.dumps(files).encode() + b"\n" + b"".join(data for _, data in named)
    for name in "../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:evil", "a\nb", ".", "a//b", "a.pkl":
        assert put(folder((name, b"evil"))).status_code == 400, name
    good = folder(("a.json", b"{}"), ("b/c.json", b"[]"))
    for bad in b"", b"\n", b"[]\n", b"{}\n", good[:-1], good + b"a", good.replace(b"{}", b"[]"), b"[" * 900, \
            folder(("a.json", b"{}"), ("a.json", b"{}")), folder(("a", b"{}"), ("a/b", b"{}")):
        assert put(bad).status_code == 400, bad
    assert put(folder(("a.json", b"a" * 1000))).status_code == 413
    assert rows(service)["registry_contents"] == 0
    answer = put(good)
    assert answer.status_code == 201 and put(good).json() == answer.json()
    assert [file["path"] for file in answer.json()["files"]] == ["a.json", "b/c.json"]
    assert client.get("/contents/c/files/b/c.json").content == b"[]"
    assert put(folder(("a.json", b"{}"))).status_code == 409


def test_the_token_goes_nowhere_else():
    server, asked = counting(200, b"[]")
    class Sender(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self):
            self.send_response(307)
            self.send_header("location", f"http://127.0.0.1:{server.server_port}/datasets")
            self.send_header("content-length", "0")
            self.end_headers()
    sender = ThreadingHTTPServer(("127.0.0.1", 0), Sender)
    threading.Thread(target=sender.serve_forever, daemon=True).start()
    client = RegistryClient(f"http://127.0.0.1:{sender.server_port}", TOKEN)
    with pytest.raises(SemidError, match="not followed") as error: client.get_datasets()
    assert not asked and TOKEN not in str(error.value) + repr(client)
    for one in server, sender:
        one.shutdown()
        one.server_close()


def test_a_server_can_not_write_outside_of_the_folder(tmp_path):
    "A content whose names lead elsewhere is refused before anything is written."
    digest = hashlib.sha256(b"evil").hexdigest()
    for name in "../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:evil", "a\nb", ".", "a//b":
        files = [{"path": name, "sha256": digest, "size": 4}]
        whole = hashlib.sha256(f"{digest}  {name}\n".encode()).hexdigest()
        body = json.dumps({"id": "c", "sha256": whole, "files": files}).encode()
        server, asked = counting(200, body)
        with RegistryClient(f"http://127.0.0.1:{server.server_port}") as client:
            with pytest.raises((DataError, SemidError)): client.download_content("c", tmp_path / "in" / "c")
        assert asked == ["GET"]
        server.shutdown()
        server.server_close()
    assert [*tmp_path.iterdir()] == []


def test_two_threads_and_a_real_server(tmp_path, run):
    "Each counts up 20 times, by the revision it saw: nothing is lost, and the history tells it all."
    filled(tmp_path / "registry.db")
    running, port = run(tmp_path / "registry.db")
    assert running.poll() is None
    client = RegistryClient(f"http://127.0.0.1:{port}", timeout=60)
    conflicts = []
    def count(who):
        for n in range(20):
            client.create_model("streets", f"{who} {n}", "b")
            while True:
                seen = client.get_model("streets", "m1")
                counted = {**(seen.meta or {}), who: n + 1}
                try: client.update_model("streets", "m1", meta=counted, revision=seen.revision)
                except ConflictError as e: conflicts.append(str(e))
                else: break
    with ThreadPoolExecutor(2) as pool: [*pool.map(count, ["one", "two"])]
    assert client.get_model("streets", "m1").meta == {"one": 20, "two": 20}
    assert client.get_model("streets", "m1").revision == 41 == len(client.get_history("streets", "m1"))
    assert len([*client.iter_models("streets")]) == client.get_models("streets")[2] == 41
    with pytest.raises(NotFoundError): client.get_model("streets", "m2")
    client.close()
    running.terminate()
    said, errors = running.communicate(timeout=30)
    assert said.strip() == f"http://127.0.0.1:{port}" and "Traceback" not in errors


def test_beyond_this_machine_there_is_a_token(tmp_path, run):
    filled(tmp_path / "registry.db")
    running, port = run(tmp_path / "registry.db", "0.0.0.0")
    kept = tmp_path / "registry.token"
    assert kept.stat().st_mode & 0o777 == 0o600
    token = kept.read_text().strip()
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(ConfigError, match="A token is needed"): RegistryClient(url).get_datasets()
    with pytest.raises(ConfigError, match="not known"): RegistryClient(url, TOKEN).get_datasets()
    with RegistryClient(url, token) as client: assert client.get_model("streets", "m1").name == "v1"
    running.terminate()
    said, errors = running.communicate(timeout=30)
    assert str(kept) in said and token not in said + errors
    kept.chmod(0o644)
    refused, _ = run(tmp_path / "registry.db", "0.0.0.0")
    assert refused.wait(30) != 0 and "chmod 600" in refused.stderr.read()


def test_a_busy_database_is_said_to_be(tmp_path):
    service = filled(tmp_path / "registry.db", timeout=0.2)
    client = TestClient(create_registry_app(service), base_url="http://localhost")
    with service.database.transaction(write=True):
        answer = client.patch(MODEL, json={"name": "v2"})
        assert answer.status_code == 503 and str(tmp_path) not in answer.text
        assert client.get(MODEL).status_code == 200
    assert client.patch(MODEL, json={"name": "v2"}).status_code == 200
