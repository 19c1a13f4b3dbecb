"Ranking: figures as torchmetrics has them, a killed run ends as a whole one, commands, encoders of others."
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import kill_once_there, semid
from semid.collection import collect
from semid.features import read_features
from semid.ranking.encoders import open_encoder
from semid.ranking.metrics import retrieval_metrics
from semid.training import CHECKPOINT

TRAIN = "ranking train --collection scenes --epochs 4 --side 48 --batch-size 32 -q --output-path".split()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A small collection, and a model that was trained on it for a moment."
    folder = tmp_path_factory.mktemp("ranking")
    collect("scenes", folder / "scenes", n=200, side=48, progress=False)
    semid(*TRAIN, "model", cwd=folder)
    return folder


def torchmetrics_says(images, texts, owner, k):
    "The same figures by torchmetrics, where there are no ties; to it a score below zero is never right."
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR
    scores = torch.from_numpy(images @ texts.T)
    scores += 1 - scores.min()
    right = torch.from_numpy(owner == np.arange(len(images))[:, None])
    found = {}
    for side, s, r in (("t2i", scores.T, right.T), ("i2t", scores, right)):
        query = torch.arange(len(s))[:, None].expand_as(s).reshape(-1)
        flat = s.reshape(-1), r.reshape(-1), query
        found[f"{side}_recall@{k}"] = RetrievalHitRate(top_k=k)(*flat[:2], indexes=flat[2]).item()
        found[f"{side}_mrr"] = RetrievalMRR()(*flat[:2], indexes=flat[2]).item()
    return found


@pytest.mark.parametrize("n, each, dim, noise", [(40, 5, 16, 0.5), (7, 1, 3, 1.0), (60, 3, 8, 3.0)])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_the_figures_are_those_of_torchmetrics(n, each, dim, noise, k):
    rng = np.random.default_rng(n + k)
    images, owner = rng.normal(size=(n, dim)), rng.permutation(np.repeat(np.arange(n), each))
    texts = images[owner] + noise * rng.normal(size=(n * each, dim))
    ours = retrieval_metrics(images, texts, owner, ks=(k,))
    for name, value in torchmetrics_says(images, texts, owner, k).items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


@settings(max_examples=50, deadline=None)
@given(arrays(np.int8, st.tuples(st.integers(2, 6), st.just(2)), elements=st.integers(-1, 1)),
       st.integers(1, 3), st.integers(0, 99), st.integers(1, 4))
def test_ties_count_as_the_mean_of_all_orders(images, each, seed, k):
    "Few distinct vectors, so that ties are everywhere; the mean over many orders is what is promised."
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(images)), each)
    texts = rng.integers(-1, 2, (len(owner), 2))
    ours = retrieval_metrics(images, texts, owner, ks=(k,))
    right = owner == np.arange(len(images))[:, None]
    scores = images.astype(int) @ texts.T
    for side, s, r in (("t2i", scores.T, right.T), ("i2t", scores, right)):
        drawn = rng.random((4000, *s.shape))
        order = np.lexsort((drawn, np.broadcast_to(-s, drawn.shape)), axis=-1)
        place = np.take_along_axis(np.broadcast_to(r, drawn.shape), order, -1).argmax(-1) + 1
        assert ours[f"{side}_recall@{k}"] == pytest.approx((place <= k).mean(), abs=0.05)
        assert ours[f"{side}_mrr"] == pytest.approx((1 / place).mean(), abs=0.05)


def test_a_killed_training_ends_as_a_whole_one(project):
    words = [*TRAIN, "killed"]
    last = project / "killed" / CHECKPOINT
    kill_once_there(last, *words, cwd=project)
    assert last.exists() and not (project / "killed" / "model.safetensors").exists()
    assert "resume" in semid(*words, cwd=project, check=False).stderr
    words += ["--resume", last]
    assert "batch_size=32" in semid(*words, "--batch-size", 16, cwd=project, check=False).stderr
    semid(*words, cwd=project)
    weights = [(project / name / "model.safetensors").read_bytes() for name in ("killed", "model")]
    assert weights[0] == weights[1] and not last.exists()
    assert "no checkpoint" in semid(*words, "--resume", "killed/first", cwd=project, check=False).stderr


def test_the_commands_evaluate_and_embed(project):
    words = "ranking evaluate --collection scenes --encoder model -o found.json -q".split()
    said = semid(*words, cwd=project).stdout
    found = json.loads((project / "found.json").read_text())
    assert "t2i_recall@10" in said and 0 <= found["t2i_recall@1"] <= found["t2i_recall@10"] <= 1
    semid("embed", "scenes", "-o", "vectors", "--encoder", "model", "--rows-per-shard", 90, "-q", cwd=project)
    ids, vectors = read_features(project / "vectors" / "images")
    captions = read_features(project / "vectors" / "captions")[0]
    assert len(ids) == 200 and len(captions) == 1000 and vectors.shape[1] == 256
    assert len([*(project / "vectors" / "images").iterdir()]) == 3
    table = pa.table({"id": ["a", "b"], "title": ["a heart", "two rings"]})
    pq.write_table(table, project / "titles.parquet")
    semid(*"embed titles.parquet -o titles --encoder model --text-column title -q".split(), cwd=project)
    assert read_features(project / "titles")[1].shape == (2, 256)
    wrong = semid("embed", "scenes", "-o", "vectors", "--encoder", "scenes", "-q", cwd=project, check=False)
    assert wrong.returncode == 1 and "no DualEncoder" in wrong.stderr


def test_batches_do_not_change_a_vector(project):
    encoder = open_encoder(project / "model", device="cpu")
    texts = ["a heart", "two small red circles to the left of three large blue squares, in the sky", "star"]
    together = encoder.encode_texts(texts)
    alone = np.concatenate([encoder.encode_texts(text) for text in texts])
    assert np.abs(together - alone).max() < 1e-6


def test_sentence_transformers_reads_texts(tmp_path):
    "A tiny model of random weights, written as any other is."
    models = pytest.importorskip("sentence_transformers.models")
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizerFast
    (tmp_path / "vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a red heart".split()))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    small = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, max_position_embeddings=32)
    BertModel(small).save_pretrained(tmp_path / "bert")
    words = models.Transformer(str(tmp_path / "bert"))
    model = SentenceTransformer(modules=[words, models.Pooling(16)], device="cpu")
    model.save(str(tmp_path / "model"))
    encoder = open_encoder(f"sentence-transformers:{tmp_path / 'model'}", device="cpu")
    expected = model.encode(["a red heart", "red"], normalize_embeddings=True)
    assert np.abs(encoder.encode_texts(["a red heart", "red"]) - expected).max() < 1e-5
    with pytest.raises(ValueError, match="texts only"): encoder.encode_images([b""])
    missing = f"sentence-transformers:{tmp_path}/none"
    with pytest.raises(ValueError, match="can't be loaded"): open_encoder(missing)
