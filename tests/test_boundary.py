"Segments stay segments whatever a model says of them; a training that was killed ends as a whole one."
import json, subprocess, sys, warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import real_data
from semid.config import DataError
from semid.models import boundary
from semid.models.boundary import BoundaryRegressor, train_boundary
from semid.models.moments import (
    WINDOW, is_window, moment_sample, read_moments, sample_moments, temporal_iou, window_features)
from semid.training import CHECKPOINT

SMALL = dict(epochs=3, width=8, device="cpu", progress=False)

seconds = st.floats(0, 200) | st.sampled_from([0, 10, 10.5, 60, 150])
odd_seconds = seconds | st.floats() | st.sampled_from([-1, 1e300, float("nan")])
segments = st.lists(st.tuples(odd_seconds, odd_seconds, odd_seconds), max_size=12)
windows = st.tuples(seconds, seconds, seconds).map(sorted).filter(lambda w: is_window(w)[0])


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    "A regressor that moves windows about by minutes."
    folder = tmp_path_factory.mktemp("boundary")
    train_boundary(sample_moments(60), folder / "model", **SMALL)
    regressor = BoundaryRegressor(folder / "model")
    with torch.no_grad():
        for weights in regressor.network.layers[-1].parameters():
            weights.normal_(0, 10, generator=torch.Generator().manual_seed(0))
    return regressor


@settings(max_examples=200, deadline=None)
@given(given_segments=segments, seed=st.integers(0, 99), holes=st.sets(st.integers(0, 11)))
def test_a_segment_stays_one_or_stays_as_it_was(wild, given_segments, seed, holes):
    n = len(given_segments)
    features = np.random.default_rng(seed).normal(size=(n, wild.dim)).astype(np.float32)
    broken = [i for i in sorted(holes) if i < n]
    features[broken, seed % wild.dim] = [np.nan, np.inf][seed % 2]
    array = np.array(given_segments, float).reshape(-1, 3)
    dicts = [{"id": i, "start": a, "end": b, "duration": c} for i, (a, b, c) in enumerate(given_segments)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refined, stayed = wild.refine(array.copy(), features)
        as_dicts, same = wild.refine(dicts, features)
    assert refined.shape == array.shape and len(as_dicts) == n
    valid = is_window(array)
    assert {*broken, *np.flatnonzero(~valid).tolist()} <= {*stayed}
    for i in range(n):
        assert as_dicts[i].keys() == dicts[i].keys() and as_dicts[i]["id"] == i
        if i in stayed:
            np.testing.assert_array_equal(refined[i], array[i])
            np.testing.assert_array_equal(list(as_dicts[i].values()), list(dicts[i].values()))
        else: assert is_window(refined[i])[0] and refined[i, 2] == array[i, 2]
    if n: np.testing.assert_array_equal(refined, [[one[key] for key in WINDOW] for one in as_dicts])
    assert stayed == same


def test_the_wild_one_moves_windows_and_is_stopped(wild):
    "Else the test above says nothing."
    moments = read_moments(sample_moments(300, seed=1))
    refined, stayed = wild.refine(moments.windows, moments.features)
    assert 10 < len(stayed) < 290 and {*stayed.values()} == {"it would end before it starts"}
    assert np.abs(refined - moments.windows).max() > 20


def test_blocks_change_nothing(wild, monkeypatch):
    moments = read_moments(sample_moments(50))
    whole = wild.predict(moments.features, moments.windows)
    monkeypatch.setattr(boundary, "_AT_ONCE", 7)
    np.testing.assert_allclose(wild.predict(moments.features, moments.windows), whole, rtol=1e-3, atol=0.01)


@settings(max_examples=200, deadline=None)
@given(a=windows, b=windows)
def test_iou_is_what_counting_says(a, b):
    "Seconds that both have of those that either has, counted in steps of a hundredth."
    (a0, a1, _), (b0, b1, _) = a, b
    steps = np.arange(0.005, 200, 0.01)
    in_a, in_b = (a0 <= steps) & (steps < a1), (b0 <= steps) & (steps < b1)
    iou = float(temporal_iou((a0, a1), (b0, b1)))
    assert 0 <= iou <= 1 and iou == temporal_iou((b0, b1), (a0, a1))
    if (in_a | in_b).sum() > 100: assert abs((in_a & in_b).sum() / (in_a | in_b).sum() - iou) < 0.05


@settings(max_examples=200, deadline=None)
@given(window=windows, others=st.lists(st.tuples(odd_seconds, odd_seconds, st.floats(0, 1)), max_size=9),
       saliency=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80))
def test_features_are_numbers_for_any_window(window, others, saliency):
    start, end, duration = window
    others = [other for other in others if np.isfinite(other).all() and max(map(abs, other)) < 1e9]
    features = window_features([(start, end, 0.5), *others], saliency, duration)
    assert features.shape == (52,) and (np.isfinite(features).all() or duration < 1e-3)


values = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(),
                      lambda inner: st.lists(inner, max_size=3), max_leaves=6)
keys = st.sampled_from("video_id query features start_delta end_delta start end duration".split())


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(keys, values, max_size=3), lost=st.sets(keys, max_size=2))
def test_samples_are_read_or_refused(changes, lost):
    good = sample_moments(2)
    bad = {key: value for key, value in (good[1] | changes).items() if key not in lost}
    try: moments = read_moments([good[0], bad])
    except DataError: return
    assert len(moments) == 2 and np.isfinite(moments.features).all() and np.isfinite(moments.deltas).all()
    assert is_window(moments.windows).all()


KILLED = """
import json, os, signal, sys
from semid.models.boundary import train_boundary

def die(values, epoch):
    if epoch == 2: os.kill(os.getpid(), signal.SIGKILL)
train_boundary("samples.json", "model", **json.loads(sys.argv[1]), log=die)
"""


def test_a_killed_training_ends_as_a_whole_one(tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps(sample_moments(60)))
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(SMALL)], cwd=tmp_path, timeout=120)
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "model").iterdir()] == [CHECKPOINT]
    train_boundary(tmp_path / "samples.json", tmp_path / "model", **SMALL, resume=True)
    train_boundary(tmp_path / "samples.json", tmp_path / "whole", **SMALL)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                  for name in ("model", "whole"))
    assert one == other and {*one} == {"metadata.json", "model.safetensors", "training.png"}


def test_only_its_own_checkpoint_is_removed(tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps(sample_moments(60)))
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(SMALL)], cwd=tmp_path, timeout=120)
    assert done.returncode == -9
    mark = (tmp_path / "model" / CHECKPOINT).read_bytes()
    train_boundary(tmp_path / "samples.json", tmp_path / "model", checkpoint=tmp_path / "elsewhere", **SMALL)
    assert (tmp_path / "model" / CHECKPOINT).read_bytes() == mark


def test_windows_of_a_real_model_fit_better(tmp_path):
    "A fifth of the videos of QVHighlights' validation split, which the regressor does not know."
    rows = pq.read_table(real_data("qvhighlights_val.parquet")).to_pylist()
    videos = [row["vid"].rsplit("_", 2)[0] for row in rows]
    aside = {*np.random.default_rng(1).permutation(sorted({*videos}))[:95]}
    samples = []
    for video, row in zip(videos, rows):
        proposed = np.array(row["predicted_windows"])
        proposed[:, :2] = proposed[:, :2].clip(0, row["duration"])
        samples.append(moment_sample(video, row["query"], proposed, row["predicted_saliency"],
                                     row["duration"], row["relevant_windows"]))
    asked = [i for i, video in enumerate(videos) if video in aside]
    known = [sample for sample in samples if sample["video_id"] not in aside]
    train_boundary(known, tmp_path / "model", device="cpu", progress=False)
    segments = [samples[i] for i in asked]
    regressor = BoundaryRegressor(tmp_path / "model")
    refined, stayed = regressor.refine(segments, [one["features"] for one in segments])
    iou = [np.mean([temporal_iou([one["start"], one["end"]], rows[i]["relevant_windows"]).max()
                    for i, one in zip(asked, some)]) for some in (segments, refined)]
    assert len(stayed) < 5 and iou[1] - iou[0] > 0.01
