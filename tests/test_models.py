"Models from a mirror with random weights: cut off, wrong, offline, two at once; files that mean harm."
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import httpx2
import huggingface_hub
import onnx
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import semid.cli.models  # noqa: F401  (makes its commands known)
from semid.cli.options import app
from semid.config import ConfigError, DataError, ModelFormatError, SemidError, alone_in, file_sha256
from semid.models.boundary import BoundaryRegressor, train_boundary
from semid.models.hub import CLIP, REGRESSOR, RERANKERS, Source, fetch_model, index_mirror, open_source
from semid.models.manifest import note_model, unknown_files
from semid.models.moments import sample_moments
from semid.models.prepare import (
    check_own,
    download_models,
    note_own_model,
    note_regressor,
    read_manifest,
    verify_models,
)
from semid.models.reranker import Reranker
from semid.models.reranker_training import small_cross_encoder, train_wordpiece
from semid.onnx_file import onnx_session
from semid.ranking.encoders import open_encoder
from semid.training import CHECKPOINT

SILENT = {"progress": False, "say": lambda _: None}
# open_clip's architecture of this name, as small as can be: all else is as it is with the large one
SEES = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TINY = {"embed_dim": 16, "vision_cfg": SEES,
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
CLIPS = "--clip", "ViT-B-32"
WEIGHTS = "open_clip_model.safetensors"
START = """
import sys, open_clip
open_clip.add_model_config(sys.argv.pop(1))
from semid.cli.main import main
main()
"""


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    import open_clip
    path = tmp_path_factory.mktemp("arch") / "ViT-B-32.json"
    path.write_text(json.dumps(TINY))
    known = {**open_clip.factory._MODEL_CONFIGS}
    open_clip.add_model_config(path)
    yield path
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(known)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, tiny):
    "A folder in the hub's layout with a CLIP and a cross-encoder of random weights."
    import open_clip
    folder = tmp_path_factory.mktemp("mirror")
    torch.manual_seed(0)
    clip = folder / CLIP["ViT-B-32"].repository
    clip.mkdir(parents=True)
    save_file(open_clip.create_model("ViT-B-32").state_dict(), clip / "open_clip_model.safetensors")
    words = ["what is a heart", "where is the river", "the city at the river is red", "a blue square"]
    network = small_cross_encoder(train_wordpiece(words, 300), width=32, max_length=48)
    network.save_pretrained(str(folder / RERANKERS[0].repository), create_model_card=False)
    index_mirror(folder)
    return folder


def semid(*words):
    "The command line, in this process."
    found = CliRunner().invoke(app, ["models", *map(str, words)])
    return SimpleNamespace(returncode=found.exit_code, stdout=found.output, stderr=str(found.exception or ""))


def command(tiny, *words):
    "The same in another one."
    return [sys.executable, "-c", START, str(tiny), "models", *map(str, words)]


@pytest.fixture(scope="module")
def prepared(mirror, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "models"
    done = semid("download", "--source", mirror.as_uri(), "--models-dir", folder, *CLIPS, "--int8", "-q")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_everything_is_prepared_and_said(prepared):
    folder, said = prepared
    about = read_manifest(folder)
    assert [*about] == ["clip/ViT-B-32", "cross-encoder/ms-marco-MiniLM-L6-v2", "onnx/clip_ViT-B-32",
                        "onnx/clip_ViT-B-32-int8", "regressor", "reranker"]
    names = {path.name for path in (folder / "onnx").glob("*.onnx")}
    assert {"clip_ViT-B-32_text_encoder.onnx", "clip_ViT-B-32_image_encoder.onnx"} <= names
    assert not any(model["pretrained"] for model in about.values())
    assert "not the published weights" in said and "trained here" in said
    for name in "onnx/clip_ViT-B-32", "reranker":
        assert about[name]["opset"] >= 18
        assert (about[name]["revision"], about[name]["licence"]) == ("", "unknown")
        gaps = [of["max_abs_diff"] for of in flat(about[name]["parity"])]
        assert len(gaps) >= 2 and max(gaps) <= 1e-4
        assert about[name]["latency_ms"]
    search = about["onnx/clip_ViT-B-32-int8"]["search"]
    assert search["scenes"] == 64 and 0.3 < search["top_10_shared"] <= 1
    assert about["regressor"]["source"] == "trained here on 2,000 simulated moments"
    assert verify_models(folder) == {name: [] for name in about}


def flat(parity):
    "The innermost dicts."
    if "max_abs_diff" in parity: return [parity]
    return [each for value in parity.values() for each in flat(value)]


def test_what_was_prepared_works(prepared):
    folder, _ = prepared
    ours = open_encoder(f"onnx:{folder / 'onnx' / 'clip_ViT-B-32'}", "cpu")
    assert ours.encode_texts(["a heart", "two red squares"]).shape == (2, 16)
    found = Reranker(folder / "reranker").rerank("what is a river", ["the river", None, "a city"])
    assert found[1].score is None and {found[0].index, found[2].index} == {0, 2}
    regressor = BoundaryRegressor(folder / "regressor")
    moved, stayed = regressor.refine(np.array([[1.0, 9.0, 60.0]]), np.zeros((1, regressor.dim)))
    assert 0 <= moved[0, 0] < moved[0, 1] <= 60 and stayed == {}


def test_again_fetches_nothing_and_verify_needs_the_folder_alone(prepared, mirror, monkeypatch):
    folder, _ = prepared
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = semid("download", "--source", mirror.as_uri(), "--models-dir", folder, *CLIPS, "--int8", "-q")
    assert again.returncode == 0 and again.stdout.count("there already") == 6
    assert again.stdout.count("there already, not the published weights") == 5  # each time
    off = semid("download", "--offline", "--models-dir", folder, "--clip", "ViT-B-32", "-q")
    assert off.returncode == 0, off.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = semid("download", "--models-dir", folder, "--clip", "ViT-B-32", "-q")
    assert told.returncode == 0, told.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    good = semid("verify", "--models-dir", folder)
    assert good.returncode == 0 and good.stdout.count(": good") == 6
    listed = semid("list", "--models-dir", folder).stdout
    assert "laion/CLIP" not in listed and "1a25a446712b" not in listed and "MIT" not in listed


def test_offline_and_incomplete_is_another_exit(tmp_path, mirror):
    only = ("--clip-only", "--clip", "ViT-B-32", "--models-dir", tmp_path / "m", "-q")
    nothing = semid("download", "--offline", *only)
    assert nothing.returncode == 1 and "offline nothing is fetched" in nothing.stderr
    assert semid("download", "--source", mirror.as_uri(), *only).returncode == 0
    weights = tmp_path / "m" / "clip" / "ViT-B-32" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    damaged = semid("download", "--offline", *only)
    assert damaged.returncode == 1 and "sha256 differs" in damaged.stderr
    bad = semid("verify", "--models-dir", tmp_path / "m")
    assert bad.returncode == 1 and "clip/ViT-B-32: " in bad.stdout and "sha256 differs" in bad.stdout
    assert semid("download", "--source", mirror.as_uri(), *only).returncode == 0  # and is mended
    assert semid("verify", "--models-dir", tmp_path / "m").returncode == 0


def test_killed_in_mid_download_goes_on(tmp_path, tiny, mirror):
    weights = mirror / CLIP["ViT-B-32"].repository / "open_clip_model.safetensors"
    slow = ("import semid.models.hub as hub, time; was = hub._append\n"
            "class Slow:\n"
            "    def __init__(self, file): self.file = file\n"
            "    def __enter__(self): return self\n"
            "    def __exit__(self, *_): self.file.close()\n"
            "    def seek(self, at): return self.file.seek(at)\n"
            "    def read(self, n):\n"
            "        time.sleep(0.2)\n"
            "        return self.file.read(n)\n"
            "known = hub.open_source\n"
            "def open_source(name):\n"
            "    found = known(name)\n"
            "    return hub.Source(found.name, found.listing, lambda *of: Slow(found.open(*of)))\n"
            "import semid.models.prepare as prepare; prepare.open_source = open_source\n")
    words = ["download", "--source", mirror.as_uri(), "--clip-only", *CLIPS, "--models-dir", tmp_path, "-q"]
    process = subprocess.Popen([sys.executable, "-c", slow + START, str(tiny), "models", *map(str, words)])
    part, end = None, time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        part = next(tmp_path.rglob("*.part"), None)
        if part and part.stat().st_size: break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    got = part.read_bytes()
    assert 0 < len(got) < weights.stat().st_size and weights.read_bytes().startswith(got)
    assert not (tmp_path / "clip").exists() and read_manifest(tmp_path) == {}
    done = semid(*words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clip" / "ViT-B-32" / weights.name).read_bytes() == weights.read_bytes()
    assert not any((tmp_path / ".incoming").rglob("*.part"))


def test_a_wrong_hash_is_refused_and_no_other_takes_its_place(tmp_path, mirror):
    wrong = tmp_path / "wrong"
    for model in CLIP["ViT-B-32"], RERANKERS[0]:
        for path in (mirror / model.repository).iterdir():
            (wrong / model.repository).mkdir(parents=True, exist_ok=True)
            (wrong / model.repository / path.name).write_bytes(path.read_bytes())
    index_mirror(wrong)
    for model, name in ((CLIP["ViT-B-32"], WEIGHTS), (RERANKERS[0], "model.safetensors")):
        path = wrong / model.repository / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    failed = semid("download", "--source", wrong.as_uri(), *CLIPS, "--models-dir", tmp_path / "m", "-q")
    assert failed.returncode == 1 and failed.stderr.count("is refused: its sha256") == 2
    assert "2 of 3 models" in failed.stderr and "takes the place" not in failed.stdout
    assert [*read_manifest(tmp_path / "m")] == ["regressor"]
    assert not (tmp_path / "m" / "clip").exists() and not (tmp_path / "m" / "reranker").exists()


def test_another_cross_encoder_takes_its_place_by_name(tmp_path, mirror):
    other = tmp_path / "other"
    for path in (mirror / RERANKERS[0].repository).iterdir():
        (other / RERANKERS[2].repository).mkdir(parents=True, exist_ok=True)
        (other / RERANKERS[2].repository / path.name).write_bytes(path.read_bytes())
    index_mirror(other)
    done = semid("download", "--source", other, "--reranker-only", "--models-dir", tmp_path / "m", "-q")
    assert done.returncode == 0, done.stderr
    assert "TinyBERT-L2-v2 takes the place of cross-encoder/ms-marco-MiniLM-L6-v2" in done.stdout
    about = read_manifest(tmp_path / "m")["reranker"]
    assert about["repository"] == RERANKERS[2].repository and len(about["instead_of"]) == 2


def test_two_at_once(tmp_path, tiny, mirror):
    words = command(tiny, "download", "--source", mirror.as_uri(), "--clip-only", "--clip", "ViT-B-32",
                    "--models-dir", tmp_path, "-q")
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(words, **piped) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("there already") for text in said) == [0, 2]
    assert verify_models(tmp_path) == {"clip/ViT-B-32": [], "onnx/clip_ViT-B-32": []}


def test_your_own_regressor_stays(tmp_path, mirror):
    train_boundary(sample_moments(100, 1), tmp_path / "regressor", epochs=1, progress=False)
    mine = (tmp_path / "regressor" / "model.safetensors").read_bytes()
    wants = dict(kinds=["regressor"], source=mirror, **SILENT)
    download_models(tmp_path, **wants)
    assert read_manifest(tmp_path)["regressor"]["source"] == "trained by you"
    train_boundary(sample_moments(100, 2), tmp_path / "regressor", epochs=1, progress=False)
    assert verify_models(tmp_path)["regressor"]
    note_regressor(tmp_path)
    assert verify_models(tmp_path) == {"regressor": []}
    download_models(tmp_path, **wants)
    assert (tmp_path / "regressor" / "model.safetensors").read_bytes() != mine
    (tmp_path / "regressor" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SemidError, match="can't be read"): download_models(tmp_path, **wants)
    assert (tmp_path / "regressor" / "model.safetensors").read_bytes() == b"damaged"


def test_a_mirror_may_have_a_regressor(tmp_path, mirror):
    at = tmp_path / "mirror" / REGRESSOR.repository
    train_boundary(sample_moments(100, 1), at, epochs=1, progress=False)
    index_mirror(tmp_path / "mirror")
    download_models(tmp_path / "m", ["regressor"], source=tmp_path / "mirror", **SILENT)
    assert read_manifest(tmp_path / "m")["regressor"]["source"].startswith("file://")
    assert BoundaryRegressor(tmp_path / "m" / "regressor").dim == 52


def test_a_replaced_regressor_is_nobodys(tmp_path, mirror):
    wants = dict(kinds=["regressor"], source=mirror, **SILENT)
    download_models(tmp_path, **wants)
    train_boundary(sample_moments(100, 1), tmp_path / "regressor", epochs=1, progress=False)
    for offline in True, False:
        with pytest.raises(SemidError, match="holds another regressor than was written down .trained here"):
            download_models(tmp_path, offline=offline, **wants)
    assert read_manifest(tmp_path)["regressor"]["source"].startswith("trained here")
    note_regressor(tmp_path)
    download_models(tmp_path, **wants)
    assert verify_models(tmp_path) == {"regressor": []}


def test_a_regressor_with_a_folder_in_it(tmp_path, mirror):
    train_boundary(sample_moments(60, 1), tmp_path / "regressor", epochs=1, progress=False)
    (tmp_path / "regressor" / "notes").mkdir()
    (tmp_path / "regressor" / "notes" / "a.txt").write_text("mine")
    download_models(tmp_path, ["regressor"], source=mirror, **SILENT)
    assert verify_models(tmp_path) == {"regressor": []}
    assert "regressor/notes/a.txt" in read_manifest(tmp_path)["regressor"]["files"]


def test_what_is_no_regressor_is_refused_each_time(tmp_path):
    at = tmp_path / "mirror" / REGRESSOR.repository
    at.mkdir(parents=True)
    (at / "metadata.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, at / "model.safetensors")
    index_mirror(tmp_path / "mirror")
    for _ in range(2):
        with pytest.raises(SemidError, match="can't be read as a BoundaryRegressor"):
            download_models(tmp_path / "m", ["regressor"], source=tmp_path / "mirror", **SILENT)
        assert not (tmp_path / "m" / "regressor").exists() and read_manifest(tmp_path / "m") == {}


def test_the_manifest_is_written_by_one_at_a_time(tmp_path):
    train_boundary(sample_moments(60, 1), tmp_path / "regressor", epochs=1, progress=False)
    noting = threading.Thread(target=note_regressor, args=[tmp_path])
    with alone_in(tmp_path):
        noting.start()
        noting.join(0.5)
        assert noting.is_alive() and read_manifest(tmp_path) == {}
    noting.join(60)
    assert [*read_manifest(tmp_path)] == ["regressor"]


@pytest.fixture(scope="module")
def second(mirror, tmp_path_factory):
    "Another mirror, with another CLIP and with a regressor; its cross-encoders are the first two."
    import open_clip
    folder = tmp_path_factory.mktemp("second")
    shutil.copytree(mirror, folder, dirs_exist_ok=True)
    torch.manual_seed(1)
    save_file(open_clip.create_model("ViT-B-32").state_dict(), folder / CLIP["ViT-B-32"].repository / WEIGHTS)
    shutil.copytree(folder / RERANKERS[0].repository, folder / RERANKERS[1].repository)
    train_boundary(sample_moments(60, 1), folder / REGRESSOR.repository, epochs=1, progress=False)
    index_mirror(folder)
    return folder


def test_a_mirrors_weights_don_t_stand_in_for_the_published_ones(tmp_path, mirror, second, monkeypatch):
    only = dict(kinds=["clip"], clip=["ViT-B-32"], measure=False, progress=False)
    weights, told = tmp_path / "clip" / "ViT-B-32" / WEIGHTS, []
    download_models(tmp_path, source=mirror, say=told.append, **only)
    at = CLIP["ViT-B-32"].repository
    ours = {folder: file_sha256(folder / at / WEIGHTS) for folder in (mirror, second)}
    assert file_sha256(weights) == ours[mirror]
    monkeypatch.setitem(CLIP, "ViT-B-32", replace(CLIP["ViT-B-32"], files={WEIGHTS: ours[second]}))
    download_models(tmp_path, source=second, say=told.append, **only)
    about = read_manifest(tmp_path)
    assert file_sha256(weights) == ours[second]
    for name in "clip/ViT-B-32", "onnx/clip_ViT-B-32":
        assert (about[name]["pretrained"], about[name]["licence"]) == (True, "MIT")
        assert about[name]["revision"] == CLIP["ViT-B-32"].revision
    told.clear()
    download_models(tmp_path, source=mirror, say=told.append, **only)  # which has none that is nearer
    assert told == ["clip/ViT-B-32: there already", "onnx/clip_ViT-B-32: there already"]
    assert file_sha256(weights) == ours[second]


def failing(source, error, names):
    "A source that breaks off in the middle of some repositories' files."
    known = open_source(source)
    class Breaking:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *_): self.file.close()
        def seek(self, at): return self.file.seek(at)
        def read(self, n):
            if self.file.tell(): raise error
            return self.file.read(min(n, 9))
    def open_file(model, file):
        found = known.open(model, file)
        return Breaking(found) if model.name in names else found
    return lambda name: Source(known.name, known.listing, open_file)


def test_a_network_that_breaks_off_is_told_and_nothing_takes_a_place(tmp_path, second, monkeypatch):
    wants, told = dict(kinds=["clip", "reranker", "regressor"], clip=["ViT-B-32"], measure=False,
                       progress=False, source=second), []
    with monkeypatch.context() as patch:
        broken = failing(second, httpx2.ReadError("gone"), {RERANKERS[0].name, REGRESSOR.name})
        patch.setattr("semid.models.prepare.open_source", broken)
        with pytest.raises(SemidError, match="2 of 3 models could not be prepared") as error:
            download_models(tmp_path, say=told.append, **wants)
    assert str(error.value).count("broke off (ReadError: gone): try again") == 2
    assert not any("takes the place" in line or "trained here" in line for line in told)
    assert [*read_manifest(tmp_path)] == ["clip/ViT-B-32", "onnx/clip_ViT-B-32"]
    problems = {name: why for name, why in verify_models(tmp_path).items() if why}
    assert [*problems] == ["download of reranker", "download of regressor"]
    assert semid("verify", "--models-dir", tmp_path).returncode == 1
    download_models(tmp_path, say=told.append, **wants)
    assert verify_models(tmp_path) == {name: [] for name in read_manifest(tmp_path)}
    assert read_manifest(tmp_path)["regressor"]["source"] == second.as_uri()


def test_a_full_disk_is_no_network_that_broke_off(tmp_path, second, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("semid.models.hub.os.fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            fetch_model(RERANKERS[0], tmp_path, open_source(second), progress=False)
    file = next((tmp_path / ".incoming").rglob("*.part"))
    monkeypatch.setattr("semid.models.hub.shutil.disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(DataError, match="bytes more, and .* has room for 5"):
        fetch_model(RERANKERS[0], tmp_path, open_source(second), progress=False)
    home = second / RERANKERS[0].repository
    for name in RERANKERS[0].files: shutil.copy(home / name, file.parent / name)
    whole = (home / "model.safetensors").read_bytes()
    (file.parent / "model.safetensors").unlink()
    part = f"model.safetensors.{hashlib.sha256(whole).hexdigest()[:12]}.part"
    (file.parent / part).write_bytes(whole[:-5])  # what is there already needs no room
    fetch_model(RERANKERS[0], tmp_path, open_source(second), progress=False)
    assert (tmp_path / RERANKERS[0].name / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("part", ["onnx", "reranker"])
def test_a_kill_before_an_export_is_whole_is_no_obstacle(part, tmp_path, tiny, mirror):
    killed = ("import os, signal, semid.models.onnx as onnx, semid.models.reranker as reranker\n"
              "for module in onnx, reranker:\n"
              "    def write(path, about, known=module.write_json):\n"
              f"        if path.parent.name == {part!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
              "        known(path, about)\n"
              "    module.write_json = write\n")
    kind = {"onnx": "--clip-only", "reranker": "--reranker-only"}[part]
    words = ["download", "--source", mirror.as_uri(), kind, *(CLIPS if part == "onnx" else ()),
             "--models-dir", str(tmp_path), "-q"]
    process = subprocess.run([sys.executable, "-c", killed + START, str(tiny), "models", *words])
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / part).iterdir()]
    assert left and not any(name.endswith(("_encoder.json", "reranker.json")) for name in left)
    done = semid(*words)
    assert done.returncode == 0, done.stderr
    assert verify_models(tmp_path) == {name: [] for name in read_manifest(tmp_path)}


def test_a_missing_package_is_told_and_the_rest_is_done(tmp_path, second, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SemidError, match="1 of 2 models .* reranker: .*sentence_transformers"):
        download_models(tmp_path, ["reranker", "regressor"], source=second, **SILENT)
    assert "regressor" in read_manifest(tmp_path)


def test_a_regressor_trained_among_models_is_written_down(tmp_path, mirror):
    download_models(tmp_path / "m", ["regressor"], source=mirror, **SILENT)
    (tmp_path / "data.json").write_text(json.dumps(sample_moments(60, 1)))
    words = ["train-boundary", tmp_path / "data.json", tmp_path / "m" / "regressor", "--epochs", 1, "-q"]
    done = semid(*words)
    assert done.returncode == 0 and "which chose the epoch" in done.stdout, done.stderr
    assert read_manifest(tmp_path / "m")["regressor"]["source"] == "trained by you"
    assert semid("verify", "--models-dir", tmp_path / "m").returncode == 0


KILLED = {"epoch": ("import os, signal, semid.training as training\n"
                    "def write(*_, known=training._write_checkpoint):\n"
                    "    known(*_)\n"
                    "    os.kill(os.getpid(), signal.SIGKILL)\n"
                    "training._write_checkpoint = write\n"),
          "plot": ("import os, signal, semid.models.boundary as boundary\n"
                   "boundary.plot_boundary = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n")}


@pytest.mark.parametrize("when", KILLED)
def test_a_kill_while_a_regressor_is_trained_is_no_obstacle(tmp_path, tiny, mirror, when):
    words = ["download", "--regressor-only", "--source", mirror.as_uri(), "--models-dir", str(tmp_path), "-q"]
    process = subprocess.run([sys.executable, "-c", KILLED[when] + START, str(tiny), "models", *words])
    assert process.returncode == -signal.SIGKILL
    left = {CHECKPOINT} if when == "epoch" else {CHECKPOINT, "metadata.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "regressor").iterdir()} == left
    assert semid(*words).returncode == 0 and verify_models(tmp_path) == {"regressor": []}
    assert read_manifest(tmp_path)["regressor"]["source"] == "trained here on 2,000 simulated moments"
    assert not (tmp_path / "regressor" / CHECKPOINT).exists()


@pytest.fixture
def copied(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path / "models")
    return tmp_path / "models"


def test_what_users_make_beside_models_is_named_and_no_fault(copied):
    weights = copied / "clip" / "ViT-B-32" / WEIGHTS
    made = semid("export", f"open_clip:ViT-B-32:{weights}", "--output", copied / "onnx", "--name", "own")
    assert made.returncode == 0, made.stderr
    (copied / "own").mkdir()
    (copied / "own" / "model.safetensors").write_text("trained by somebody")
    good = semid("verify", "--models-dir", copied)
    assert good.returncode == 0 and "not looked at: 1 other files (own/model" in good.stdout
    (copied / "clip" / "ViT-B-32" / "code.py").write_text("?")
    bad = semid("verify", "--models-dir", copied)
    assert bad.returncode == 1 and "files that nobody wrote down: clip/ViT-B-32/code.py" in bad.stdout


def test_what_users_made_is_not_replaced_until_it_is_forgotten(copied, mirror):
    entry = read_manifest(copied)["onnx/clip_ViT-B-32"]
    for name in "onnx/clip_ViT-B-32", "reranker": note_model(copied, name, entry | {"yours": True})
    for name, kind in ("onnx/clip_ViT-B-32", "clip"), ("reranker", "reranker"):
        words = "download", "--source", mirror.as_uri(), "--models-dir", copied, f"--{kind}-only", "-q"
        words += ("--clip", "ViT-B-32") if kind == "clip" else ()
        assert f"{name} is yours, and would be lost" in semid(*words).stderr
        assert semid("forget", name, "--models-dir", copied).returncode == 0
        assert semid(*words).returncode == 0 and "yours" not in read_manifest(copied)[name]
    assert "knows no nothing" in semid("forget", "nothing", "--models-dir", copied).stderr


def test_a_cross_encoder_of_yours_is_written_down_and_takes_nobodys_place(copied):
    with pytest.raises(ConfigError, match="give yours another name"): check_own(copied / "reranker")
    (copied / "own").mkdir()
    (copied / "own" / "config.json").write_text("{}")
    note_own_model(copied / "own", "reranker", "trained by you on pairs.parquet")
    about = read_manifest(copied)["own"]
    assert about["yours"] and [*about["files"]] == ["own/config.json"] and verify_models(copied)["own"] == []


def test_an_export_of_what_is_no_longer_there_is_not_good(copied, second):
    download_models(copied, ["clip"], ["ViT-B-32"], second, **SILENT)  # without its 8 bits
    bad = {name: why for name, [*why] in verify_models(copied).items() if why}
    assert [*bad] == ["onnx/clip_ViT-B-32-int8"]
    assert "made of other files than those of onnx/" in bad["onnx/clip_ViT-B-32-int8"][0]


def test_a_real_regressor_takes_the_place_of_a_simulated_one(copied, second):
    download_models(copied, ["regressor"], source=second, **SILENT)
    assert read_manifest(copied)["regressor"]["source"] == second.as_uri()
    ours, theirs = copied / "regressor", second / REGRESSOR.repository
    assert file_sha256(ours / "model.safetensors") == file_sha256(theirs / "model.safetensors")


def test_packages_are_missed_before_anything_is_fetched(mirror, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SemidError, match=r"needs onnxscript: pip install 'semid\[images,onnx\]'"):
        download_models(tmp_path, ["clip"], ["ViT-B-32"], mirror, **SILENT)
    assert not (tmp_path / "clip").exists()


def test_a_lost_manifest_and_a_half_install_fetch_nothing(copied, mirror, monkeypatch):
    waits = copied / ".incoming" / "clip"
    waits.mkdir(parents=True, exist_ok=True)
    os.replace(copied / "clip" / "ViT-B-32", waits / "ViT-B-32.gone")  # killed between two renames
    only = dict(kinds=["clip"], clip=["ViT-B-32"], **SILENT)
    download_models(copied, offline=True, **only)
    assert verify_models(copied)["clip/ViT-B-32"] == [] and not any(waits.iterdir())
    (copied / "model_manifest.json").unlink()
    closed = failing(mirror, AssertionError(), CLIP["ViT-B-32"].name)
    monkeypatch.setattr("semid.models.prepare.open_source", closed)
    download_models(copied, source=mirror, **only)
    assert verify_models(copied)["clip/ViT-B-32"] == []
    assert unknown_files(copied)[0] == []


def test_offline_a_folder_that_can_t_be_written_to_will_do(copied, mirror, monkeypatch):
    def locked(*_): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("semid.models.prepare.alone_in", locked)
    monkeypatch.setattr("semid.config.os.replace", locked)
    wants = dict(clip=["ViT-B-32"], **SILENT)
    download_models(copied, offline=True, **wants)
    with pytest.raises(PermissionError): download_models(copied, source=mirror, **wants)


def test_a_damaged_cross_encoder_is_not_an_absent_one(tmp_path, second):
    other = tmp_path / "other"
    shutil.copytree(second / RERANKERS[1].repository, other / RERANKERS[1].repository)
    index_mirror(other)
    for source in other, second:  # now both are there
        download_models(tmp_path / "m", ["reranker"], source=source, measure=False, **SILENT)
    weights = tmp_path / "m" / RERANKERS[0].name / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(SemidError, match="MiniLM-L6-v2 is damaged .*sha256 differs.*offline nothing"):
        download_models(tmp_path / "m", ["reranker"], offline=True, **SILENT)
    with pytest.raises(SemidError, match="none of 3 .*L6-v2 is not there.*L12-v2 is not.*TinyBERT-L2-v2 is"):
        download_models(tmp_path / "n", ["reranker"], offline=True, **SILENT)


def test_an_index_may_promise_no_pipe(tmp_path, mirror):
    shutil.copytree(mirror, tmp_path / "mirror")
    weights = tmp_path / "mirror" / CLIP["ViT-B-32"].repository / WEIGHTS
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(SemidError, match="is listed in models.json, and is no file"):
        download_models(tmp_path / "m", ["clip"], ["ViT-B-32"], tmp_path / "mirror", **SILENT)


def test_an_export_names_no_folder_with_code_in_it(copied, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "__init__.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')")
    (code / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    file = copied / "onnx" / "clip_ViT-B-32_encoder.json"
    about = json.loads(file.read_text())
    about["reads"]["arch"] = f"local-dir:{code}"
    file.write_text(json.dumps(about))
    with pytest.raises(ModelFormatError, match="open_clip has no architecture 'local-dir:"):
        open_encoder(f"onnx:{copied / 'onnx' / 'clip_ViT-B-32'}", "cpu")
    assert not (tmp_path / "harmed").exists()


class Bomb:
    def __reduce__(self): return os.system, ("touch harmed",)


def harmful():
    "Bytes that are no weights."
    yield "pickle", pickle.dumps({"weight": Bomb()})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb()))
        file.writestr("../../../harmed", "x")
        file.writestr("archive/data/0", bytes(50_000_000))
    yield "zip", packed.getvalue()
    yield "a long head", (2**60).to_bytes(8, "little") + b"{}"
    head = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}).encode()
    yield "offsets beyond the end", len(head).to_bytes(8, "little") + head + bytes(16)


@pytest.mark.parametrize("content", [pytest.param(content, id=kind) for kind, content in harmful()])
def test_files_that_mean_harm_are_refused(content, tmp_path, monkeypatch, mirror):
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "mirror"
    shutil.copytree(mirror, evil)
    train_boundary(sample_moments(60, 1), evil / REGRESSOR.repository, epochs=1, progress=False)
    other = "model.safetensors"
    for model, name in (CLIP["ViT-B-32"], WEIGHTS), (RERANKERS[0], other), (REGRESSOR, other):
        (evil / model.repository / name).write_bytes(content)  # all else is as it is with good ones
    index_mirror(evil)
    with pytest.raises(SemidError, match="3 of 3 models could not be prepared") as error:
        download_models(tmp_path / "m", clip=["ViT-B-32"], source=evil, **SILENT)
    for kind, name in ("clip", WEIGHTS), ("reranker", "model.safetensors"):
        why = f"The {kind} in [^ ]*/.incoming/[^ ]* is refused: {name} can't be opened"
        assert re.search(why, str(error.value))
    assert "can't be read as a BoundaryRegressor model" in str(error.value)
    assert not (tmp_path / "harmed").exists() and not (tmp_path.parent / "harmed").exists()
    assert read_manifest(tmp_path / "m") == {} and not (tmp_path / "m" / "clip").exists()
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError): onnx_session(tmp_path / "a.onnx")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError): Reranker(tmp_path / "r")


@pytest.mark.parametrize("where", ["../weights.bin", "weights.bin", "/{}/weights.bin"])
def test_weights_in_another_file_are_refused(where, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    where = where.format(str(tmp_path).strip("/"))
    (tmp_path / "deep" / where).write_bytes(bytes(16))
    monkeypatch.chdir(tmp_path / "deep")
    value = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4],
                             data_location=onnx.TensorProto.EXTERNAL)
    value.external_data.add(key="location", value=where)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [value])
    (tmp_path / "deep" / "a.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ModelFormatError, match="can't be loaded"): onnx_session(tmp_path / "deep" / "a.onnx")


def test_a_manifest_leads_nowhere_else(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "m").mkdir()
    manifest = tmp_path / "m" / "model_manifest.json"
    for name in "../secret", str(tmp_path / "secret"), "link":
        if name == "link": (tmp_path / "m" / "link").symlink_to(tmp_path / "secret")
        about = {"kind": "clip", "source": "hub", "licence": "MIT", "pretrained": True,
                 "files": {name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}}
        manifest.write_text(json.dumps({"type": "manifest of models", "models": {"evil": about}}))
        assert verify_models(tmp_path / "m")["evil"] == [f"{name} leads out of the folder"]
    (tmp_path / "m" / "circle").symlink_to("circle")
    for name in "circle", "n" * 300:
        about["files"] = {name: {"size": 1, "sha256": "0" * 64}}
        manifest.write_text(json.dumps({"type": "manifest of models", "models": {"evil": about}}))
        assert verify_models(tmp_path / "m")["evil"][0].startswith(name)
    manifest.write_text("{}")
    with pytest.raises(ModelFormatError, match="is no manifest"): verify_models(tmp_path / "m")
    with pytest.raises(DataError, match="has no model_manifest.json"): verify_models(tmp_path / "n")
