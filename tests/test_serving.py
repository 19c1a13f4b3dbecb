"Serving: many clients at once, changes while it runs, commands, and the page in a browser."
import asyncio
import shutil
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import SEMID, semid
from semid.collection import collect
from semid.models.onnx import export_encoder
from semid.semantic_ids.encoding import ids_table
from semid.serving.database import DatabaseWriter, ImageDatabase

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A collection, a model trained for a moment, a database with semantic IDs: all by the commands."
    folder = tmp_path_factory.mktemp("serving")
    collect("scenes", folder / "scenes", n=200, side=48, progress=False)
    semid(*"ranking train --collection scenes --epochs 2 --side 48 --batch-size 32 -q".split(), cwd=folder)
    assert "200 of them new; 0 can't" in semid("database", "build", "scenes", "-q", cwd=folder).stdout
    ids = [*ImageDatabase(folder / "db").ids]
    codes = np.stack([np.arange(200) % 5, np.arange(200) % 7], 1).astype(np.int32)
    said = [f"{a}-{b}" for a, b in codes]
    table = ids_table(ids, codes, said, [f"{text}-{i}" for i, text in enumerate(said)])
    pq.write_table(table, folder / "ids.parquet")
    assert "200 of 200" in semid("database", "ids", "ids.parquet", cwd=folder).stdout
    return folder


@pytest.fixture(scope="module")
def url(project):
    "The address of a running service."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"serve --database db/ --port {port} --device cpu --timeout 100".split()  # of a busy machine
    running = subprocess.Popen([SEMID, *words], cwd=project, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while True:
        assert running.poll() is None and time.monotonic() < deadline
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except httpx.TransportError: time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    running.terminate()
    running.wait()


def test_the_commands_search(project):
    lines = semid("search", "a dog playing in the park", "--database", "db/", "--top-k", 10,
                  cwd=project).stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == [*range(1, 11)]
    inside = semid("search", "a heart", "--prefix", "3-4", cwd=project).stdout.splitlines()
    database = ImageDatabase(project / "db")
    codes = {line.split()[2]: tuple(database.codes[database._row_of[line.split()[2]]]) for line in inside}
    assert len(codes) == 6 and {*codes.values()} == {(3, 4)}
    assert "Give either" in semid("search", cwd=project, check=False).stderr
    assert "semid database index" in semid("search", "a", "--approximate", cwd=project, check=False).stderr
    assert "nearest" in semid("database", "index", "--ef-search", 200, cwd=project).stdout
    nearly = semid("search", "a heart", "--approximate", cwd=project).stdout.splitlines()
    assert len(nearly) == 10 and {line.split()[2] for line in nearly} <= {*database.ids}
    assert "no database" in semid("search", "a", "--database", "none", cwd=project, check=False).stderr


def test_an_exported_encoder_opens_the_same_database(project):
    export_encoder(project / "models" / "ranking", project / "onnx")
    ours, theirs = (semid("search", "a heart", *how, cwd=project).stdout.split()
                    for how in (("--model-path", "onnx:onnx"), ()))
    assert len(ours) == len(theirs) == 30  # rank, score, id; a model of a moment gives nearly equal scores
    assert np.allclose(np.array(ours[1::3], float), np.array(theirs[1::3], float), atol=1.01e-3)
    (project / "a.jpg").write_bytes(ImageDatabase(project / "db").thumbnail(ours[2]))
    asked = "search", "--image", "a.jpg", "--model-path", "onnx:onnx"
    assert len(semid(*asked, cwd=project).stdout.splitlines()) == 10


def test_many_clients_at_once(url):
    "32 clients: each is answered, and all with the same pictures."
    async def client(http):
        return [await http.post("/search", json={"query": "a red heart", "top_k": 5}) for _ in range(8)]
    async def ask_all():
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            return await asyncio.gather(*(client(http) for _ in range(32)))
    answers = [answer for some in asyncio.run(ask_all()) for answer in some]
    assert len(answers) == 256
    assert {answer.status_code for answer in answers} == {200}
    assert len({tuple(line["id"] for line in answer.json()["results"]) for answer in answers}) == 1


def test_bodies_without_a_length_have_a_limit_too(url):
    host, _, port = url.removeprefix("http://").partition(":")
    head = b"POST /search HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(head)
        for _ in range(161): client.sendall(b"10000\r\n" + b"a" * 2**16 + b"\r\n")  # 10 MiB, and a bit
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    assert httpx.get(f"{url}/health").status_code == 200
    assert 'status="413"' in httpx.get(f"{url}/metrics").text


def test_clients_that_leave_are_counted(url):
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /search HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
    deadline = time.monotonic() + 60
    while 'status="499"' not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_changes_are_seen_while_it_runs(project, url):
    writer, database = DatabaseWriter(project / "db"), ImageDatabase(project / "db")
    writer.add(["new"], database.parts[0][:1])
    assert httpx.get(f"{url}/health").json()["pictures"] == 201
    assert httpx.get(f"{url}/items/new").json() == {"id": "new", "codes": [], "path": []}
    writer.remove(["new"])
    assert httpx.get(f"{url}/items/new").status_code == 404


KILLED = """
import sys
import numpy as np
from semid.serving.database import DatabaseWriter, ImageDatabase
database = ImageDatabase(sys.argv[1])
print("ready", flush=True)
for i in range(10_000): DatabaseWriter(sys.argv[1]).add([f"extra-{i}"], database.parts[0][:1])
"""


def test_a_killed_writer_leaves_a_whole_database(project, tmp_path):
    shutil.copytree(project / "db", tmp_path / "db")
    for wait in (0.05, 0.13, 0.21):
        running = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "db"], stdout=subprocess.PIPE)
        running.stdout.readline()
        time.sleep(wait)
        running.kill()
        running.wait()
        database = ImageDatabase(tmp_path / "db")
        assert {*ImageDatabase(project / "db").ids} <= {*database.ids}
        assert len(database.search(database.parts[0][:1], 1000)[0]) == len(database) >= 200
    DatabaseWriter(tmp_path / "db").add(["last"], database.parts[0][:1])
    assert "last" in ImageDatabase(tmp_path / "db")


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_by_keyboard(url, scheme):
    "Search, open a picture, walk to a prefix, close: without a mouse and without an error."
    from playwright.sync_api import sync_playwright
    a_picture = httpx.get(f"{url}/pictures/{httpx.get(f'{url}/ids/').json()['items'][0]}").content
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page, errors = browser.new_page(color_scheme=scheme), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(url)
        page.wait_for_selector("#results li")
        page.locator("body").press("/")
        page.keyboard.type("a red heart")
        page.keyboard.press("Enter")
        page.wait_for_selector("#said:has-text('30 pictures in')")
        page.locator("#results button").first.focus()
        page.keyboard.press("ArrowRight")
        chosen = page.evaluate("document.activeElement.dataset.id")
        page.keyboard.press("Enter")
        page.wait_for_selector("#panel")
        assert page.inner_text("#panel h2") == chosen
        assert page.locator("#panel section").count() == 2
        prefix = page.locator("#panel section h3 button").last
        wanted = prefix.inner_text()
        prefix.press("Enter")
        page.wait_for_selector(f"#said:has-text('40 pictures start with {wanted}')")
        page.keyboard.press("Escape")
        page.wait_for_selector("#panel", state="detached")
        page.locator("#tree button").first.press("Enter")  # one level up, and down again
        page.wait_for_selector("#said:text-is('200 pictures')")
        page.locator("#tree button", has_text="3 ").press("Enter")
        page.wait_for_selector("#said:has-text('40 pictures start with 3')")
        assert page.locator("#tree button").count() == 8  # up, and seven codes below
        page.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": a_picture})
        page.wait_for_selector("#said:has-text('30 pictures in')")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
        browser.close()
    assert not errors and dark == (scheme == "dark")
