"Models by the command line: a mirror with random weights, cut off, wrong, offline, two at once; files that mean harm."
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import onnx
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from semid.config import DataError, ModelFormatError, SemidError
from semid.models.boundary import BoundaryRegressor, train_boundary
from semid.models.hub import CLIP, REGRESSOR, RERANKERS, index_mirror
from semid.models.moments import sample_moments
from semid.models.prepare import download_models, note_regressor, read_manifest, verify_models
from semid.models.reranker import Reranker
from semid.ranking.encoders import onnx_session, open_encoder

# open_clip's architecture of this name, as small as can be: all else is as it is with the large one
TINY = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
START = """
import sys, open_clip
open_clip.add_model_config(sys.argv.pop(1))
from semid.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("arch") / "ViT-B-32.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, tiny):
    "A folder in the hub's layout with a CLIP and a cross-encoder of random weights."
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("mirror")
    torch.manual_seed(0)
    import open_clip
    known = {**open_clip.factory._MODEL_CONFIGS}
    open_clip.add_model_config(tiny)
    clip = folder / CLIP["ViT-B-32"].repository
    clip.mkdir(parents=True)
    save_file(open_clip.create_model("ViT-B-32").state_dict(), clip / "open_clip_model.safetensors")
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(known)
    words = "[PAD] [UNK] [CLS] [SEP] what where who is a the of river city heart red blue square".split()
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    at = folder / RERANKERS[0].repository
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, num_labels=1, max_position_embeddings=64)
    BertForSequenceClassification(config).save_pretrained(at)
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names).save_pretrained(at)
    index_mirror(folder)
    return folder


def command(tiny, *words):
    return [sys.executable, "-c", START, str(tiny), "models", *map(str, words)]


def semid(tiny, *words, **env):
    return subprocess.run(command(tiny, *words), capture_output=True, text=True, timeout=300, env={**os.environ, **env})


@pytest.fixture(scope="module")
def prepared(tiny, mirror, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "models"
    done = semid(tiny, "download", "--source", mirror.as_uri(), "--models-dir", folder, "--clip", "ViT-B-32", "--int8", "-q")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_everything_is_prepared_and_said(prepared):
    folder, said = prepared
    about = read_manifest(folder)
    assert [*about] == ["clip/ViT-B-32", "cross-encoder/ms-marco-MiniLM-L6-v2", "onnx/clip_ViT-B-32",
                        "onnx/clip_ViT-B-32-int8", "regressor", "reranker"]
    assert {name: (folder / "onnx" / f"clip_ViT-B-32_{name}_encoder.onnx").is_file() for name in ("text", "image")} \
        == {"text": True, "image": True}
    assert not any(model["pretrained"] for model in about.values())
    assert "these are not the published weights" in said and "trained here" in said
    for name in "onnx/clip_ViT-B-32", "reranker":
        assert about[name]["opset"] == 18 and about[name]["revision"] and about[name]["licence"]
        gaps = [of["max_abs_diff"] for of in flat(about[name]["parity"])]
        assert len(gaps) >= 2 and max(gaps) <= 1e-4
        assert about[name]["latency_ms"]
    assert about["regressor"]["source"] == "trained here on 2,000 simulated moments"
    assert verify_models(folder) == {name: [] for name in about}


def flat(parity):
    "The innermost dicts."
    if "max_abs_diff" in parity: return [parity]
    return [each for value in parity.values() for each in flat(value)]


def test_what_was_prepared_works(prepared, tiny):
    folder, _ = prepared
    ours = open_encoder(f"onnx:{folder / 'onnx' / 'clip_ViT-B-32'}", "cpu")
    assert ours.encode_texts(["a heart", "two red squares"]).shape == (2, 16)
    found = Reranker(folder / "reranker").rerank("what is a river", ["the river", None, "a city"])
    assert found[1].score is None and {found[0].index, found[2].index} == {0, 2}
    moved, stayed = BoundaryRegressor(folder / "regressor").refine(np.array([[1.0, 9.0, 60.0]]), np.zeros((1, 52)))
    assert 0 <= moved[0, 0] < moved[0, 1] <= 60 and stayed == {}


def test_again_fetches_nothing_and_verify_needs_the_folder_alone(prepared, tiny, mirror):
    folder, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = semid(tiny, "download", "--source", mirror.as_uri(), "--models-dir", folder, "--clip", "ViT-B-32", "--int8", "-q")
    assert again.returncode == 0 and again.stdout.count("there already") == 6
    off = semid(tiny, "download", "--offline", "--models-dir", folder, "--clip", "ViT-B-32", "-q")
    assert off.returncode == 0, off.stderr
    env = semid(tiny, "download", "--models-dir", folder, "--clip", "ViT-B-32", "-q", HF_HUB_OFFLINE="1")
    assert env.returncode == 0, env.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == {p: t for p, t in before.items() if p.name != ".lock"} | {
        p: p.stat().st_mtime_ns for p in before if p.name == ".lock"}
    good = semid(tiny, "verify", "--models-dir", folder)
    assert good.returncode == 0 and good.stdout.count(": good") == 6
    listed = semid(tiny, "list", "--models-dir", folder).stdout
    assert "laion/CLIP" not in listed and "1a25a446712b" in listed and "False" in listed


def test_offline_and_incomplete_is_another_exit(tmp_path, tiny, mirror):
    only = ("--clip-only", "--clip", "ViT-B-32", "--models-dir", tmp_path / "m", "-q")
    nothing = semid(tiny, "download", "--offline", *only)
    assert nothing.returncode == 1 and "offline nothing is fetched" in nothing.stderr
    assert semid(tiny, "download", "--source", mirror.as_uri(), *only).returncode == 0
    weights = tmp_path / "m" / "clip" / "ViT-B-32" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    damaged = semid(tiny, "download", "--offline", *only)
    assert damaged.returncode == 1 and "sha256 differs" in damaged.stderr
    bad = semid(tiny, "verify", "--models-dir", tmp_path / "m")
    assert bad.returncode == 1 and "clip/ViT-B-32: " in bad.stdout and "sha256 differs" in bad.stdout
    assert semid(tiny, "download", "--source", mirror.as_uri(), *only).returncode == 0  # and is mended
    assert semid(tiny, "verify", "--models-dir", tmp_path / "m").returncode == 0


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
    words = ["download", "--source", mirror.as_uri(), "--clip-only", "--clip", "ViT-B-32", "--models-dir", tmp_path, "-q"]
    process = subprocess.Popen([sys.executable, "-c", slow + START, str(tiny), "models", *map(str, words)])
    part, end = None, time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        part = next((tmp_path / ".incoming").rglob("*.part"), None) if (tmp_path / ".incoming").exists() else None
        if part and part.stat().st_size: break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    got = part.read_bytes()
    assert 0 < len(got) < weights.stat().st_size and weights.read_bytes().startswith(got)
    assert not (tmp_path / "clip").exists() and read_manifest(tmp_path) == {}
    done = semid(tiny, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clip" / "ViT-B-32" / weights.name).read_bytes() == weights.read_bytes()
    assert not any((tmp_path / ".incoming").rglob("*.part"))


def test_a_wrong_hash_is_refused_and_no_other_takes_its_place(tmp_path, tiny, mirror):
    wrong = tmp_path / "wrong"
    for model in CLIP["ViT-B-32"], RERANKERS[0]:
        for path in (mirror / model.repository).iterdir():
            (wrong / model.repository).mkdir(parents=True, exist_ok=True)
            (wrong / model.repository / path.name).write_bytes(path.read_bytes())
    index_mirror(wrong)
    for model, name in ((CLIP["ViT-B-32"], "open_clip_model.safetensors"), (RERANKERS[0], "model.safetensors")):
        path = wrong / model.repository / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    failed = semid(tiny, "download", "--source", wrong.as_uri(), "--clip", "ViT-B-32", "--models-dir", tmp_path / "m", "-q")
    assert failed.returncode == 1 and failed.stderr.count("is refused: its sha256") == 2
    assert "2 of 3 models" in failed.stderr and "takes the place" not in failed.stdout
    assert [*read_manifest(tmp_path / "m")] == ["regressor"]
    assert not (tmp_path / "m" / "clip").exists() and not (tmp_path / "m" / "reranker").exists()


def test_another_cross_encoder_takes_its_place_by_name(tmp_path, tiny, mirror):
    other = tmp_path / "other"
    for path in (mirror / RERANKERS[0].repository).iterdir():
        (other / RERANKERS[2].repository).mkdir(parents=True, exist_ok=True)
        (other / RERANKERS[2].repository / path.name).write_bytes(path.read_bytes())
    index_mirror(other)
    done = semid(tiny, "download", "--source", other, "--reranker-only", "--models-dir", tmp_path / "m", "-q")
    assert done.returncode == 0, done.stderr
    assert "TinyBERT-L2-v2 takes the place of cross-encoder/ms-marco-MiniLM-L6-v2" in done.stdout
    about = read_manifest(tmp_path / "m")["reranker"]
    assert about["repository"] == RERANKERS[2].repository and len(about["instead_of"]) == 2


def test_two_at_once(tmp_path, tiny, mirror):
    words = command(tiny, "download", "--source", mirror.as_uri(), "--clip-only", "--clip", "ViT-B-32",
                    "--models-dir", tmp_path, "-q")
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("there already") for text in said) == [0, 2]
    assert verify_models(tmp_path) == {"clip/ViT-B-32": [], "onnx/clip_ViT-B-32": []}


def test_your_own_regressor_stays(tmp_path, tiny, mirror):
    train_boundary(sample_moments(100, 1), tmp_path / "regressor", epochs=1, progress=False)
    mine = (tmp_path / "regressor" / "model.safetensors").read_bytes()
    wants = dict(kinds=["regressor"], source=mirror, say=lambda _: None)
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
    download_models(tmp_path / "m", ["regressor"], source=tmp_path / "mirror", progress=False, say=lambda _: None)
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


@pytest.mark.parametrize("kind, content", harmful(), ids=lambda value: value if isinstance(value, str) else "")
def test_files_that_mean_harm_are_refused(kind, content, tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    for model, name in ((CLIP["RN50"], "open_clip_model.safetensors"), (RERANKERS[0], "model.safetensors"),
                        (REGRESSOR, "model.safetensors")):
        at = tmp_path / "mirror" / model.repository
        at.mkdir(parents=True)
        for file in model.files: (at / file).write_text("{}")
        (at / name).write_bytes(content)
    index_mirror(tmp_path / "mirror")
    with pytest.raises(SemidError, match="3 of 3 models could not be prepared"):
        download_models(tmp_path / "m", clip=["RN50"], source=tmp_path / "mirror", progress=False, say=lambda _: None)
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
    value = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
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
        about = {"files": {name: {"size": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}}}
        manifest.write_text(json.dumps({"type": "manifest of models", "models": {"evil": about}}))
        assert verify_models(tmp_path / "m")["evil"] == [f"{name} leads out of the folder"]
    manifest.write_text("{}")
    with pytest.raises(ModelFormatError, match="is no manifest"): verify_models(tmp_path / "m")
    with pytest.raises(DataError, match="has no model_manifest.json"): verify_models(tmp_path / "n")
