"The hub over HTTP, from a small one that runs here: whole, broken off, wrong, not there, out of order."
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from semid.models.hub import Published

pytest.importorskip("huggingface_hub")

REPOSITORY, REVISION, MIB = "somebody/small-one", "5eed" * 10, 1 << 20
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# more than the client asks for at once, so that a part of it is there when the rest breaks off
FILES = {WEIGHTS: np.random.default_rng(0).bytes(20 * MIB), CONFIG: b'{"layers": 1}'}
PINS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
MODEL = Published("cross-encoder/small", "reranker", REPOSITORY, REVISION, "Apache-2.0", PINS)
# its client reads HF_ENDPOINT when it is imported, hence in a process of its own
CHILD = """
import json, sys, time
from semid.config import SemidError
from semid.models.hub import Published, fetch_model, open_source
time.sleep = lambda seconds: None  # the client waits 23 seconds in all before it gives up
model, folder, calls = json.loads(sys.argv[1])
for _ in range(calls):
    try: said = fetch_model(Published(**model), folder, open_source("hub"), progress=False)
    except SemidError as e: said = {"error": type(e).__name__, "why": str(e)}
    print(json.dumps(said))
"""


def entry(name, content):
    "What the hub lists of a file: large ones are known by sha256, small ones by what git calls them."
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": name, "size": len(content), "oid": git,
            **({"lfs": large} if name == WEIGHTS else {})}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url, asked = urlsplit(self.path), self.headers.get("Range", "")
        is_listing = url.path.startswith("/api/") and "blobs" in parse_qs(url.query)
        self.server.calls += is_listing  # one in each fetch of a model
        self.server.asked.append((self.server.calls, url.path, asked))
        prefix, status, code = self.server.fails
        if prefix and url.path.startswith(prefix): return self.answer(status, b"?", {"X-Error-Code": code})
        if url.path == f"/api/models/{REPOSITORY}/revision/{REVISION}": return self.say_model()
        if url.path == f"/api/models/{REPOSITORY}/tree/{REVISION}": return self.say(self.listed())
        file = url.path.removeprefix(f"/{REPOSITORY}/resolve/{REVISION}/")
        if file == WEIGHTS:  # large ones lie elsewhere
            return self.answer(302, b"", {"Location": f"/stored/{WEIGHTS}"})
        name = file.removeprefix("/stored/")
        if name in self.server.files: return self.send_range(self.server.files[name], asked)
        self.answer(404, b"?", {"X-Error-Code": "RepoNotFound"})

    def listed(self): return [entry(*item) for item in self.server.listed.items()]

    def say(self, found): self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def say_model(self):
        siblings = [{"rfilename": each["path"], "size": each["size"], "blobId": each["oid"],
                     **({"lfs": {**each["lfs"], "sha256": each["lfs"]["oid"]}} if "lfs" in each else {})}
                    for each in self.listed()]
        self.say({"id": REPOSITORY, "modelId": REPOSITORY, "sha": REVISION, "siblings": siblings})

    def send_range(self, content, asked):
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
        part, end = content[first:last + 1], self.server.breaks_at if self.server.calls == 1 else None
        self.answer(206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"},
                    None if end is None else max(0, end - first))

    def answer(self, status, body, headers, sent=None):
        "Send an answer; less of it than it says, and the connection breaks."
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": REVISION, **headers}.items():
            if value != "": self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.close_connection = len(body[:sent]) < len(body)

    def log_message(self, *_): pass


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.listed = {**FILES}, {**FILES}  # what is sent, and what is said of it
        self.fails = "", 0, ""       # paths that begin so are answered with a status and a code
        self.breaks_at = None        # no byte of a file from here on is sent in the first call
        self.calls, self.asked = 0, []

    def ranges(self, call):
        "The first bytes of the ranges of the weights that were asked for in a call."
        found = [asked for of, path, asked in self.asked if of == call and path == f"/stored/{WEIGHTS}"]
        return [int(re.fullmatch(r"bytes=(\d+)-\d+", asked)[1]) for asked in found]


@pytest.fixture
def hub():
    with Hub() as server:
        running = threading.Thread(target=server.serve_forever, args=[0.02])
        running.start()
        yield server
        server.shutdown()
        running.join()


def fetch(port, folder, calls=1):
    "Fetch the model from the hub at a port, in another process; what each call says."
    known = {name: value for name, value in os.environ.items()
             if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    away = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    words = [sys.executable, "-c", CHILD, json.dumps([asdict(MODEL), str(folder / "models"), calls])]
    done = subprocess.run(words, env=known | away, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def files_in(folder): return [path for path in (folder / "models").rglob("*") if path.is_file()]


def assert_whole(folder, said):
    home = folder / "models" / MODEL.name
    assert {path.name: path.read_bytes() for path in files_in(folder)} == FILES
    assert all(path.parent == home for path in files_in(folder))
    assert (said["source"], said["revision"], said["pretrained"]) == ("hub", REVISION, True)
    assert {name: about["sha256"] for name, about in said["files"].items()} == PINS


def test_what_is_pinned_is_installed_and_is_not_fetched_twice(hub, tmp_path):
    first, again = fetch(hub.server_port, tmp_path, calls=2)
    assert_whole(tmp_path, first)
    assert again == first and (first["repository"], first["licence"]) == (REPOSITORY, "Apache-2.0")
    assert hub.ranges(1) and [path for call, path, _ in hub.asked if call == 2] == [
        f"/api/models/{REPOSITORY}/revision/{REVISION}"]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_broke_off_in_mid_file_goes_on_where_it_was(hub, tmp_path, processes):
    hub.breaks_at = 18 * MIB
    if processes == 1: broken, said = fetch(hub.server_port, tmp_path, calls=2)
    else:
        broken, = fetch(hub.server_port, tmp_path)
        part, = files_in(tmp_path)
        assert part.suffix == ".part" and FILES[WEIGHTS].startswith(part.read_bytes())
        there = part.stat().st_size
        said, = fetch(hub.server_port, tmp_path)
        assert hub.ranges(2)[0] == there
    assert broken["error"] == "BrokenOff" and f"{WEIGHTS} of {REPOSITORY} broke off" in broken["why"]
    assert hub.ranges(1)[0] == 0
    assert hub.ranges(2) and min(hub.ranges(2)) > 0
    assert_whole(tmp_path, said)


def spoilt(content): return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name, is_listed", [(WEIGHTS, False), (CONFIG, False), (CONFIG, True)])
def test_other_bytes_than_are_pinned_are_refused(hub, tmp_path, name, is_listed):
    hub.files[name] = spoilt(FILES[name])
    if is_listed: hub.listed[name] = hub.files[name]  # by a hash that is not the pinned one's kind
    said, = fetch(hub.server_port, tmp_path)
    assert said["error"] == "DataError" and f"{name} of {REPOSITORY} from hub is refused" in said["why"]
    assert PINS[name] in said["why"]
    assert not (tmp_path / "models" / MODEL.name).exists()
    assert all(path.read_bytes() == FILES[path.name] for path in files_in(tmp_path))  # others may wait


def test_weights_that_are_listed_as_others_are_not_fetched(hub, tmp_path):
    hub.files[WEIGHTS] = hub.listed[WEIGHTS] = spoilt(FILES[WEIGHTS])
    said, = fetch(hub.server_port, tmp_path)
    assert said["error"] == "DataError" and "is another one at the hub than is pinned" in said["why"]
    assert hub.ranges(1) == [] and files_in(tmp_path) == []


def assert_only_asked(hub):
    "The model was looked for, and no other in its place."
    assert {path for _, path, _ in hub.asked} == {f"/api/models/{REPOSITORY}/revision/{REVISION}"}


@pytest.mark.parametrize("status, code",
                         [(404, "RepoNotFound"), (404, "RevisionNotFound"), (403, "GatedRepo")])
def test_a_model_that_can_t_be_had_is_not_offered(hub, tmp_path, status, code):
    hub.fails = "/api/", status, code
    said, = fetch(hub.server_port, tmp_path)
    assert said["error"] == "NotOffered" and f"{REPOSITORY} can't be had from the hub" in said["why"]
    assert_only_asked(hub)
    assert files_in(tmp_path) == []


def test_a_model_without_a_file_is_not_offered(hub, tmp_path):
    del hub.listed[CONFIG]
    said, = fetch(hub.server_port, tmp_path)
    assert said["error"] == "NotOffered" and f"hub has no {CONFIG} of {REPOSITORY}" in said["why"]
    assert_only_asked(hub)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_out_of_order_broke_off(hub, tmp_path, status):
    hub.fails = "/api/", status, ""
    said, = fetch(hub.server_port, tmp_path)
    assert said["error"] == "BrokenOff" and f"The hub can't be asked for {REPOSITORY}" in said["why"]
    assert str(status) in said["why"]
    assert_only_asked(hub)
    assert files_in(tmp_path) == []


def test_a_hub_that_lists_files_and_sends_none_broke_off(hub, tmp_path):
    hub.fails = f"/{REPOSITORY}/", 500, ""
    said, = fetch(hub.server_port, tmp_path)
    assert said["error"] == "BrokenOff" and f"{WEIGHTS} of {REPOSITORY} broke off" in said["why"]
    assert not (tmp_path / "models" / MODEL.name).exists()
    assert sum(path.stat().st_size for path in files_in(tmp_path)) == 0


def test_a_hub_that_takes_no_connections_broke_off(tmp_path):
    with Hub() as closed: port = closed.server_port
    said, = fetch(port, tmp_path)
    assert said["error"] == "BrokenOff" and "(ConnectError: " in said["why"]
    assert files_in(tmp_path) == []
