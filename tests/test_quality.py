"Quality models: a killed run ends as a whole one, the documented calls work, Ray gives the same rows."
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import kill_once_there, semid
from semid.collection import collect, open_collection
from semid.config import ConfigError
from semid.images import image_bytes, read_image
from semid.quality.degradations import FAMILIES, degrade, random_damage
from semid.quality.model import QualityAssessmentInference
from semid.quality.refiner import VisualDegradationsRefiner, score_pictures
from semid.training import CHECKPOINT

TRAIN = "quality train --collection scenes --epochs 4 --per-epoch 96 --width 4 -q --output-path".split()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A small collection, and a model that was trained on it for a moment."
    folder = tmp_path_factory.mktemp("pictures")
    collect("scenes", folder / "scenes", n=300, side=64, damage=random_damage, progress=False)
    semid(*TRAIN, "model", cwd=folder)
    return folder


def test_the_documented_commands(project, tmp_path):
    "Arrays in, a model out, scores of a folder; where there was a pickle there is a folder."
    rng = np.random.default_rng(0)
    labels = rng.random(64)
    noise = 100 * (1 - labels)[:, None, None, None] * rng.normal(size=(64, 48, 48, 3))
    images = (128 + noise).clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "train_images.npy", images)
    np.save(tmp_path / "train_labels.npy", labels)
    semid("quality", "train", "--train_images", "train_images.npy", "--train_labels", "train_labels.npy",
          "--output_path", "./models/quality_assessment/quality_model", "--epochs", 10, "--batch_size", 32,
          "--device", "cpu", "-q", cwd=tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(3): Image.fromarray(images[i]).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "cut.jpg").write_bytes(image_bytes(Image.new("RGB", (300, 300)))[:200])
    semid("quality", "score", "--model-path", "models/quality_assessment/quality_model", "images/",
          "--output", "scores.parquet", "-q", cwd=tmp_path)
    table = pq.read_table(tmp_path / "scores.parquet")
    assert [Path(name).name for name in table["id"].to_pylist()] == ["0.png", "1.png", "2.png", "cut.jpg"]
    broken = [False, False, False, True]
    assert table["score"].is_null().to_pylist() == table["error"].is_valid().to_pylist() == broken
    inference = QualityAssessmentInference(
        model_path=tmp_path / "models/quality_assessment/quality_model", device="cpu")
    score = inference.predict_from_bytes((tmp_path / "images" / "0.png").read_bytes())
    assert score == pytest.approx(table["score"][0].as_py(), abs=1e-5)


def test_a_killed_training_ends_as_a_whole_one(project):
    words = [*TRAIN, "killed"]
    checkpoint = project / "killed" / CHECKPOINT
    kill_once_there(checkpoint, *words, cwd=project)
    assert checkpoint.exists() and not (project / "killed" / "model.safetensors").exists()
    assert "resume" in semid(*words, cwd=project, check=False).stderr
    semid(*words, "--resume", cwd=project)
    semid(*TRAIN, "whole", cwd=project)
    weights = [(project / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
    assert not checkpoint.exists()


def test_ray_gives_the_same_rows(project, local_ray):
    collection = open_collection(project / "scenes")
    here = VisualDegradationsRefiner(project / "model", device="cpu", progress=False).refine(collection)
    spread = VisualDegradationsRefiner(project / "model", device="cpu", n_workers=2).refine(collection)
    assert here.table.equals(spread.table)


SNIPPET = """
from semid.quality.model import QualityAssessmentInference

# Load model
inference = QualityAssessmentInference(
    model_path="./models/quality_assessment/quality_model",
    device="cuda"
)

# Predict quality score
score = inference.predict_from_bytes(image_bytes)
"""


def test_the_documented_snippet_where_there_is_no_gpu(project, tmp_path, monkeypatch):
    (tmp_path / "models" / "quality_assessment").mkdir(parents=True)
    (tmp_path / "models" / "quality_assessment" / "quality_model").symlink_to(project / "model")
    monkeypatch.chdir(tmp_path)
    names = {"image_bytes": next(open_collection(project / "scenes").records())["image"]["bytes"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Device 'cuda' is not available")
        exec(SNIPPET, names)
    assert type(names["score"]) is float and 0 <= names["score"] <= 1
    said = names["inference"].predict_degradations(names["image_bytes"])
    assert set(said) == set(FAMILIES) and all(0 <= severity <= 1 for severity in said.values())


LARGE = """
import resource, sys
from pathlib import Path
from semid.quality.model import QualityAssessmentInference
model, large = QualityAssessmentInference(sys.argv[1]), Path(sys.argv[2]).read_bytes()
model.assess([large], threads=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len({found.score for found in model.assess([large] * 24, threads=2)}) == 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_large_pictures_are_not_kept_whole(project, tmp_path):
    "Memory of a batch is that of its tiles: 24 pictures of 36 million pixels would be 2.6 GB."
    (tmp_path / "large.jpg").write_bytes(image_bytes(Image.new("RGB", (6000, 6000), "navy")))
    command = [sys.executable, "-c", LARGE, project / "model", tmp_path / "large.jpg"]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 700_000  # kB: a picture for each thread, and what decoding it takes


def test_a_picture_is_the_same_however_it_comes(project):
    model = QualityAssessmentInference(project / "model")
    clear = Image.new("RGBA", (64, 64), (200, 20, 20, 0))
    deep = Image.fromarray(np.full((64, 64), 20_000, np.uint16))
    for image in (clear, deep):
        a, b = model.predict([image, image_bytes(image, "PNG")])
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("words, says", [
    (["--epochs", 0], "epochs must be"), (["--batch-size", 0], "batch_size must be"),
    (["--seed", -1], "seed must be"), (["--heads", "a,a"], "names of their own"),
])
def test_slips_are_one_sentence(tmp_path, words, says):
    np.save(tmp_path / "x.npy", np.zeros((100, 32, 32, 3), np.uint8))
    np.save(tmp_path / "y.npy", np.zeros((100, 2)))
    arrays = "--train-images", "x.npy", "--train-labels", "y.npy", "--groups", "g.npy"
    np.save(tmp_path / "g.npy", np.arange(100))
    done = semid("quality", "train", *arrays, *words, "-q", cwd=tmp_path, check=False)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan"), "much"])
def test_thresholds_are_shares(project, threshold):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        VisualDegradationsRefiner(project / "model", {"watermark": threshold})


def test_a_loaded_model_will_do(project):
    model = QualityAssessmentInference(project / "model")
    refined = VisualDegradationsRefiner(model, {"score": 0}, progress=False).refine(
        open_collection(project / "scenes"))
    assert refined.counts()["kept"] == 300


def test_files_that_cannot_be_read_have_an_error(project, tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "good.png")
    table = score_pictures(project / "model", [tmp_path], progress=False)
    assert table["error"].is_valid().to_pylist() == [True, False]


def test_one_broken_picture_of_64_costs_itself(project):
    model = QualityAssessmentInference(project / "model")
    good = next(open_collection(project / "scenes").records())["image"]["bytes"]
    found = model.assess([good] * 31 + [b"GIF89a broken"] + [good] * 32)
    assert sum(one.score is not None for one in found) == 63
    assert found[31].error and not any(one.error for i, one in enumerate(found) if i != 31)


def test_a_mirror_changes_little_and_order_nothing(project):
    model = QualityAssessmentInference(project / "model")
    pictures = [read_image(r["image"]["bytes"]) for r in open_collection(project / "scenes").records("test")]
    scores = np.array(model.predict(pictures))
    np.testing.assert_allclose(model.predict(pictures[::-1]), scores[::-1], atol=1e-5)
    alone = [model.predict([picture])[0] for picture in pictures]
    np.testing.assert_allclose(alone, scores, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (31, 33), (1200, 900)])
def test_pictures_of_any_size(project, size):
    picture = Image.effect_noise(size, 80).convert("RGB")
    score, = QualityAssessmentInference(project / "model").predict([degrade(picture, "jpeg", 1)])
    assert 0 <= score <= 1
