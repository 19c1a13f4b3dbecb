"Models from a mirror with random weights: cut off, wrong, offline, two at once; files that mean harm."
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import huggingface_hub
import onnx
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import semid.cli.models  # noqa: F401  (makes its commands known)
from semid.cli.options import app
from semid.config import DataError, ModelFormatError, SemidError
from semid.models.boundary import BoundaryRegressor, train_boundary
from semid.models.hub import CLIP, REGRESSOR, RERANKERS, index_mirror
from semid.models.moments import sample_moments
from semid.models.prepare import download_models, note_regressor, read_manifest, verify_models
from semid.models.reranker import Reranker
from semid.models.reranker_training import small_cross_encoder, train_wordpiece
from semid.onnx_file import onnx_session
from semid.ranking.encoders import open_encoder

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
    assert "these are not the published weights" in said and "trained here" in said
    for name in "onnx/clip_ViT-B-32", "reranker":
        assert about[name]["opset"] >= 18 and about[name]["revision"] and about[name]["licence"]
        gaps = [of["max_abs_diff"] for of in flat(about[name]["parity"])]
        assert len(gaps) >= 2 and max(gaps) <= 1e-4
        assert about[name]["latency_ms"]
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
    off = semid("download", "--offline", "--models-dir", folder, "--clip", "ViT-B-32", "-q")
    assert off.returncode == 0, off.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = semid("download", "--models-dir", folder, "--clip", "ViT-B-32", "-q")
    assert told.returncode == 0, told.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    good = semid("verify", "--models-dir", folder)
    assert good.returncode == 0 and good.stdout.count(": good") == 6
    listed = semid("list", "--models-dir", folder).stdout
    assert "laion/CLIP" not in listed and "1a25a446712b" in listed and "False" in listed


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
def test_files_that_mean_harm_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, name in ((CLIP["RN50"], "open_clip_model.safetensors"), (RERANKERS[0], "model.safetensors"),
                        (REGRESSOR, "model.safetensors")):
        at = tmp_path / "mirror" / model.repository
        at.mkdir(parents=True)
        for file in model.files: (at / file).write_text("{}")
        (at / name).write_bytes(content)
    index_mirror(tmp_path / "mirror")
    with pytest.raises(SemidError, match="3 of 3 models could not be prepared"):
        download_models(tmp_path / "m", clip=["RN50"], source=tmp_path / "mirror", **SILENT)
    assert not (tmp_path / "harmed").exists() and not (tmp_path.parent / "harmed").exists()
    assert not {"reranker", "onnx/clip_RN50"} & {*read_manifest(tmp_path / "m")}
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError): onnx_session(tmp_path / "a.onnx")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError): Reranker(tmp_path / "r")


@pytest.mark.parametrize("where", ["../weights.bin", "weights.bin"])
def test_weights_in_another_file_are_refused(where, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
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
        about = {"files": {name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}}
        manifest.write_text(json.dumps({"type": "manifest of models", "models": {"evil": about}}))
        assert verify_models(tmp_path / "m")["evil"] == [f"{name} leads out of the folder"]
    manifest.write_text("{}")
    with pytest.raises(ModelFormatError, match="is no manifest"): verify_models(tmp_path / "m")
    with pytest.raises(DataError, match="has no model_manifest.json"): verify_models(tmp_path / "n")
