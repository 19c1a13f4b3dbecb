"Rerankers: orders of all kinds, cross-encoders of other families, threads, and exports that break off."
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.config import ModelFormatError
from semid.models.question_pairs import of_questions, rank_metrics
from semid.models.reranker import PAIRS, Reranker, export_reranker, new_order, quiet_libraries

QUESTION = PAIRS[0][0]
TEXTS = [text for _, text in PAIRS[::3]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-3, 3))))
def test_new_order(scores):
    order = new_order(scores)
    assert sorted(order) == [*range(len(scores))]
    assert all(order[i] == i for i, score in enumerate(scores) if score is None)
    ranked = [i for i in order if scores[i] is not None]
    assert ranked == sorted(ranked, key=lambda i: (-scores[i], i))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
def test_metrics_don_t_depend_on_the_order_of_rows(rows):
    labels, scores, groups = map(list, zip(*rows))
    if not any(labels): return
    found = rank_metrics(labels, scores, groups)
    again = rank_metrics(labels[::-1], scores[::-1], groups[::-1])
    assert found == pytest.approx(again)
    assert 0 < found["map"] <= 1 and 0 < found["mrr"] <= 1
    assert found["questions"] == len(of_questions(labels, scores, groups)[0])


def texts():
    return sorted({text for pair in PAIRS for text in pair})


def distilbert():
    from semid.models.reranker_training import train_wordpiece
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast
    config = DistilBertConfig(vocab_size=300, dim=32, n_layers=2, n_heads=2, hidden_dim=64, num_labels=1,
                              max_position_embeddings=64, initializer_range=0.3)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return DistilBertForSequenceClassification(config), PreTrainedTokenizerFast(
        tokenizer_object=train_wordpiece(texts(), 300), model_max_length=64,
        model_input_names=["input_ids", "attention_mask"], **names)


def roberta():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    inner.train_from_iterator(texts(), trainer)
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    config = RobertaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=64, num_labels=1, max_position_embeddings=66,
                           initializer_range=0.3, pad_token_id=1, bos_token_id=0, eos_token_id=2,
                           type_vocab_size=1)
    return RobertaForSequenceClassification(config), PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=64, cls_token="<s>", pad_token="<pad>", sep_token="</s>",
        unk_token="<unk>", model_input_names=["input_ids", "attention_mask"])


@pytest.fixture(scope="module", params=[distilbert, roberta])
def exported(request, tmp_path_factory):
    "A cross-encoder of another family, and its export."
    torch = pytest.importorskip("torch")
    CrossEncoder = pytest.importorskip("sentence_transformers").CrossEncoder
    folder = tmp_path_factory.mktemp(request.param.__name__)
    with torch.random.fork_rng([]), quiet_libraries():
        torch.manual_seed(0)
        for part in request.param(): part.save_pretrained(folder / "model")
        network = CrossEncoder(str(folder / "model"), device="cpu", local_files_only=True)
    export_reranker(folder / "model", folder / "onnx")
    return network, folder


def test_other_families(exported):
    network, folder = exported
    reranker = Reranker(folder / "onnx", batch_size=3)
    expected = network.predict([(QUESTION, text) for text in TEXTS])
    assert np.abs(reranker.score(QUESTION, TEXTS) - expected).max() < 1e-4
    assert np.ptp(expected) > 0.01
    found = reranker.rerank(QUESTION, [{"text": text, "id": i} for i, text in enumerate(TEXTS)])
    assert [one.candidate["id"] for one in found] == [int(i) for i in np.argsort(-expected, kind="stable")]


def test_threads(exported):
    _, folder = exported
    reranker, expected = Reranker(folder / "onnx", cache=5), Reranker(folder / "onnx").score(QUESTION, TEXTS)
    shuffled = [np.random.default_rng(seed).permutation(len(TEXTS)) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda order: reranker.score(QUESTION, [TEXTS[i] for i in order]), shuffled)]
    for order, scores in zip(shuffled, found): assert np.abs(scores - expected[order]).max() < 1e-5
    assert len(reranker._kept) == 5
    reader = Reranker(folder / "onnx", cache=0)
    with ThreadPoolExecutor(8) as pool: [*pool.map(lambda _: reader.score(QUESTION, TEXTS), range(40))]
    assert reader.n_read == 40 * len(TEXTS)


def test_weights_that_are_pickled_are_refused(exported, tmp_path):
    torch = pytest.importorskip("torch")
    network, folder = exported
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(network.model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match="safetensors"):
        export_reranker(tmp_path / "model", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_an_export_that_breaks_off_is_known(exported, tmp_path, monkeypatch):
    "The network is replaced first and reranker.json last: between them the folder is refused, not mistaken."
    _, folder = exported
    shutil.copytree(folder / "onnx", tmp_path / "onnx")
    monkeypatch.setattr("semid.models.reranker.PAIRS", PAIRS[:9])
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"half of another")
    with pytest.raises(ModelFormatError, match="export it again"): Reranker(tmp_path / "onnx")
    export_reranker(folder / "model", tmp_path / "onnx")
    assert Reranker(tmp_path / "onnx").about["files"] == Reranker(folder / "onnx").about["files"]
