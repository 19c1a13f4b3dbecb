"The whole pipeline in a copy: it runs, runs nothing twice, gives the same bytes again, and is written down."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from semid import ModelService
from semid.features import read_features
from semid.semantic_ids.encoding import read_ids

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
GRID = {"implementation": ["kmeans", "constrained"], "n_clusters": [16], "slack": [0, 0.5], "seed": [0]}


def run(folder, *words):
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "SEMID_PIPELINE": "a test"}
    env.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The project in another folder, with few pictures and a small grid, after `dvc repro`."
    folder = tmp_path_factory.mktemp("whole pipeline")
    for name in ("experiments", "semid", "dvc.yaml", "params.yaml", ".dvcignore"):
        source = ROOT / name
        if source.is_file(): shutil.copy2(source, folder / name)
        else: shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.pyc", "runs"))
    (folder / "experiments" / "runs").mkdir()
    settings = yaml.safe_load((folder / "params.yaml").read_text())
    settings["workers"] = 1
    settings["collection"] |= {"n": 240, "side": 64}
    settings["quality"] |= {"epochs": 2, "per_epoch": 256, "width": 4}
    settings["refine"]["least_score"] = 0.3
    settings["ranking"] |= {"epochs": 30, "side": 48}  # after fewer all pictures have the same vector
    settings["boundary"] |= {"n": 300, "epochs": 3}
    settings["sweep"] |= {"grid": GRID, "max_iter": 10}
    settings["ids"]["n_clusters"] = 32
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "config", "core.analytics", "false")
    run(folder, "dvc", "repro", "-q")
    return folder


def test_every_item_has_an_id_of_its_own(copy):
    manifest = json.loads((copy / "data" / "report" / "manifest.json").read_text())
    unique = read_ids(copy / "data" / "report" / "ids.parquet")["unique_id"].to_pylist()
    found = json.loads((copy / "data" / "metrics" / "dedup.json").read_text())
    refined = json.loads((copy / "data" / "metrics" / "refine.json").read_text())
    told = "kept", "removed", "heldout_kept", "heldout_leaks"
    assert sum(found[name] for name in told) == refined["kept"]
    assert len(set(unique)) == manifest["n_items"] == found["kept"] + found["heldout_kept"]
    assert manifest["parameters"]["chosen"]["n_clusters"] == 16


def test_every_picture_is_in_one_heap(copy):
    read = lambda name: json.loads((copy / "data" / "metrics" / name).read_text())
    collected, refined = read("collect.json"), read("refine.json")
    assert collected["pictures"] == refined["pictures"] == 240
    assert refined["kept"] + refined["rejected"] + refined["quarantined"] == 240
    kept = [pq.read_metadata(copy / "data" / "refined" / f"{split}.parquet").num_rows
            for split in ("train", "validation", "test")]
    assert sum(kept) == refined["kept"]


def test_pictures_and_captions_are_vectors_of_one_space(copy):
    read = lambda name: json.loads((copy / "data" / "metrics" / name).read_text())
    ranking, embed = read("ranking.json"), read("embed.json")
    assert embed["images"] == read("refine.json")["kept"] and embed["captions"] == 5 * embed["images"]
    assert len(ranking["by kind"]) == 5 and 0 < ranking["t2i_recall@10"] < 1
    for kind in "images", "captions":
        ids, X = read_features(copy / "data" / "embedded" / kind)
        assert X.shape == (embed[kind], embed["dim"]) and len(set(ids)) == embed[kind]
        assert np.allclose(np.linalg.norm(X, axis=1), 1, atol=1e-5)


def test_exports_say_what_torch_says(copy):
    found = json.loads((copy / "data" / "metrics" / "onnx.json").read_text())
    gaps = [of["max_abs_diff"] for of in found["parity"]["dual"].values()]
    assert max(gaps) <= 1e-4 and found["megabytes"]["dual-int8"] < found["megabytes"]["dual"]
    names = {path.name for path in (copy / "data" / "onnx").glob("*.onnx")}
    kinds = [f"{bits}_{kind}" for bits in ("", "-int8") for kind in ("image", "text")]
    assert names == {f"dual{kind}_encoder.onnx" for kind in kinds}


def test_moments_are_moved(copy):
    found = json.loads((copy / "data" / "metrics" / "boundary.json").read_text())
    assert found["simulated"] and found["videos"] > 0 and 0 <= found["mae"] < 60 and found["stayed"] == 0


def test_nothing_is_there_twice(copy):
    settings = yaml.safe_load((copy / "params.yaml").read_text())["dedup"]
    kept, X = read_features(copy / "data" / "dedup" / "train.parquet")
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    near = unit @ unit.T
    np.fill_diagonal(near, 0)
    assert near.max() < settings["threshold"]
    clusters = pq.read_table(copy / "data" / "clusters" / "assignments.parquet")
    assert set(kept) <= set(clusters["id"].to_pylist())


def test_the_report_holds_the_whole_grid(copy):
    lines = (copy / "data" / "report" / "sweep.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 4  # a head, and every length of the three points
    best = json.loads((copy / "data" / "report" / "recommendation.json").read_text())
    assert best["reasons"][0].startswith("Recommended: ") and best["point"]["n_clusters"] == 16


def test_the_measured_codes_are_those_of_the_measured_vectors(copy):
    read = lambda name: json.loads((copy / "data" / "metrics" / name).read_text())
    fit, ids = read("fit.json"), read("ids.json")
    assert ids["relative_mse"] == pytest.approx(fit["train_relative_mse"], rel=1e-5)
    assert ids["heldout"]["relative_mse"] == pytest.approx(fit["heldout_relative_mse"], rel=1e-5)


def test_metrics_and_plots_are_wired(copy):
    shown = json.loads(run(copy, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert 0 < shown["data/report/best.json"]["data"]["relative_mse"] < 1
    run(copy, "dvc", "plots", "show", "-o", "shown")
    page = (copy / "shown" / "index.html").read_text()
    assert "collision_heatmap" in page and "vega" in page


def test_the_runs_hang_under_one_parent(copy):
    import mlflow
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{copy / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("semid").experiment_id])
    parents = [r for r in runs if r.data.tags.get("semid.role") == "pipeline"]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert [r.info.run_id for r in parents] == list({r.data.tags["mlflow.parentRunId"] for r in children})
    assert {r.info.status for r in runs} == {"FINISHED"}
    stages = sorted(r.data.tags["semid.stage"] for r in children)
    assert stages == sorted(yaml.safe_load((copy / "dvc.yaml").read_text())["stages"])
    swept = next(r for r in children if r.data.tags["semid.stage"] == "sweep")
    assert "constrained-K16-slack0.5-seed0.relative_mse" in swept.data.metrics
    history = client.get_metric_history(swept.info.run_id, "kmeans-K16-seed0.bits")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    report = next(r for r in children if r.data.tags["semid.stage"] == "report")
    assert "relative_mse" in report.data.metrics and report.data.params["report.k"] == "10"
    assert "sweep.csv" in {a.path for a in client.list_artifacts(report.info.run_id)}


def test_what_was_trained_is_registered(copy, tmp_path):
    import mlflow
    uri = f"sqlite:///{copy / 'mlflow.db'}"
    service = ModelService(copy / "registry.db", mirror=uri)
    models = {model.name: model for model in service.iter_models("pipeline")}
    assert sorted(models) == ["k-means", "quality", "quantiser", "ranking", "sweep-winner"]
    assert [name for name, model in models.items() if model.is_pinned] == ["sweep-winner"]
    for model in models.values(): assert model.training_data_count > 0 and model.is_trained and model.run_id
    assert len(models["quality"].training_classes) == 16 and 0 < models["ranking"].average_ap < 1
    assert len(models["sweep-winner"].meta["metrics"]["relative_mse_per_level"]) >= 1
    client = mlflow.MlflowClient(tracking_uri=uri)
    winner = client.get_model_version_by_alias("pipeline.sweep-winner", "production")
    assert winner.tags["semid.model_id"] == models["sweep-winner"].id
    tags = {name: client.get_run(model.run_id).data.tags for name, model in models.items()}
    stages = {name: found.get("semid.stage") for name, found in tags.items()}
    assert stages == {"quality": "train_quality", "ranking": "train_ranking", "k-means": "cluster",
                      "quantiser": "fit_ids", "sweep-winner": None}
    back = service.download_content(models["sweep-winner"].model_content.id, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in (copy / "data" / "report" / "model").iterdir()}
    told = (copy / "data" / "registry" / "registered.json").read_text()
    assert not [model.id for model in models.values() if model.id in told or model.run_id in told]


def test_the_page_tells_of_this_run(copy):
    page = (copy / "data" / "report" / "index.html").read_text()
    told = json.loads((copy / "data" / "report" / "overview.json").read_text())
    collected = sum(told["funnels"][-1]["lost"].values()) + told["funnels"][-1]["kept"]
    assert told["funnels"][-1]["collected"] == collected and told["funnels"][0]["collected"] == 240
    assert told["ids"]["items"] == told["funnels"][-1]["kept"]
    assert told["models"] == ["quality", "ranking", "k-means", "quantiser", "sweep-winner"]
    assert "There is nothing to show of" not in page and "not measured" not in page
    stages = yaml.safe_load((copy / "dvc.yaml").read_text())["stages"]
    assert all(f"<tr><td>{name}<td>" in page for name in stages if name != "overview")
    assert stages["overview"]["outs"][0]["data/report/overview.json"]["persist"]  # else it might be restored
    assert not re.search(r"<script|<link|https?://|url\(", page) and page.count("data:image/") > 50


def test_one_can_explore_what_came_out(copy):
    before = {path: path.stat().st_mtime_ns for path in (copy / "data").rglob("*") if path.is_file()}
    words = "papermill --log-level ERROR --cwd experiments experiments/explore.ipynb".split()
    run(copy, *words, "experiments/runs/explore.ipynb")
    done = json.loads((copy / "experiments" / "runs" / "explore.ipynb").read_text())["cells"]
    shown = [output.get("data", {}) for cell in done for output in cell.get("outputs", [])]
    assert sum("<figure" in "".join(data.get("text/html", "")) for data in shown) >= 8
    assert sum("image/png" in data for data in shown) == 3
    after = {path: path.stat().st_mtime_ns for path in (copy / "data").rglob("*") if path.is_file()}
    assert after == before


def test_again_runs_nothing_and_forced_gives_the_same_bytes(copy):
    "With another number of workers, which no stage tracks, since they change nothing."
    lock, settings = (copy / "dvc.lock").read_bytes(), yaml.safe_load((copy / "params.yaml").read_text())
    (copy / "params.yaml").write_text(yaml.safe_dump(settings | {"workers": 2}))
    assert "up to date" in run(copy, "dvc", "repro")
    shutil.rmtree(copy / "data" / "sweep")  # which would else be kept
    run(copy, "dvc", "repro", "-f", "-q")
    assert (copy / "dvc.lock").read_bytes() == lock


def test_one_more_point_is_one_more_fit(copy):
    points = copy / "data" / "sweep" / "points"
    before = {path.name: path.stat().st_mtime_ns for path in points.glob("*.json")}
    settings = yaml.safe_load((copy / "params.yaml").read_text())
    settings["sweep"]["grid"] |= {"n_clusters": [16, 8], "slack": [0.5]}
    (copy / "params.yaml").write_text(yaml.safe_dump(settings))
    run(copy, "dvc", "repro", "-q", "sweep")
    after = {path.name: path.stat().st_mtime_ns for path in points.glob("*.json")}
    assert set(after) == {f"{kind}-K{K}{rest}-seed0.json" for K in (8, 16)
                          for kind, rest in (("kmeans", ""), ("constrained", "-slack0.5"))}
    kept = set(before) & set(after)
    assert len(kept) == 2 and all(before[name] == after[name] for name in kept)
