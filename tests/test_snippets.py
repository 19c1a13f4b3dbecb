"The snippets of semantic-id's documents run on semid with only their imports changed."
import json, re, warnings
from pathlib import Path

import numpy as np
import pytest

from semid import RQVAE, CollisionStore, RQKMeans, SemanticIdEngine, UniqueIdResolver


def python_blocks(readme):
    "The Python code blocks, those in quotations too."
    text = re.sub(r"^> ?", "", readme, flags=re.M)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def for_semid(block):
    "The block as a user of semid writes it."
    # the document abridges the list of keys with a literal ..., but there is one key a vector
    keys = 'db_keys = [f"SKU{i:03}" for i in range(len(X))]'
    block = re.sub(r"^db_keys = .*\.\.\.\]$", keys, block, flags=re.M)
    return re.sub(r"^from semantic_id import", "from semid import", block, flags=re.M)


def test_the_readme_of_semantic_id(semantic_id_sdist, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.random.seed(0)  # noqa: NPY002  (the snippets draw from the global generator)
    blocks = python_blocks((semantic_id_sdist / "README.md").read_text())
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Device 'cuda' is not available")
        for block in blocks: exec(for_semid(block), names)
    assert len(blocks) == 11
    assert names["codes"].shape == (100, 3)
    assert re.fullmatch(r"(<[abc]_\d+>){3}", names["token_ids"][0])
    assert names["ids"][0].startswith("[item_L0_")
    assert len(set(names["unique_ids"])) == len(set(names["uids"])) == 100
    assert "-" in names["uids"][0]  # an item keeps the ID it got first, whatever the second call's sep
    assert (names["loaded"].encode(names["X"]) == names["model"].encode(names["X"])).all()
    encoders = [names[engine].encoder for engine in ("engine", "loaded_engine")]
    assert all(type(encoder) is RQVAE for encoder in encoders)
    assert encoders[0].fingerprint() == encoders[1].fingerprint()
    again = names["loaded_engine"].unique_ids(names["X"], item_ids=names["db_keys"], sep="/")
    assert again == names["uids"]
    assert "Semantic ID: " in capsys.readouterr().out


def test_a_missing_gpu_is_said_and_changes_nothing():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    X, model = np.random.default_rng(0).normal(size=(100, 16)), RQKMeans(3, 10, random_state=0)
    with pytest.warns(UserWarning, match="running on the CPU"): codes = model.fit(X, device="cuda").encode(X)
    assert (RQKMeans(3, 10, random_state=0).fit(X).encode(X) == codes).all()


class JSONCollisionStore(CollisionStore):
    "A store of one's own needs a single method."
    def __init__(self, path): self.path = Path(path)
    def next_suffix(self, key):
        counts = json.loads(self.path.read_text()) if self.path.exists() else {}
        counts[key] = counts.get(key, -1) + 1
        self.path.write_text(json.dumps(counts))
        return counts[key]


def test_a_store_of_ones_own(tmp_path):
    X = np.random.default_rng(0).normal(size=(30, 4))
    store = JSONCollisionStore(tmp_path / "counts.json")
    engine = SemanticIdEngine(encoder=RQKMeans(2, [2, 3]), unique_resolver=UniqueIdResolver(store=store))
    first = engine.fit(X).unique_ids(X)
    engine.save(tmp_path / "engine")
    loaded = SemanticIdEngine.load(tmp_path / "engine", store=JSONCollisionStore(tmp_path / "counts.json"))
    assert len({*first, *loaded.unique_ids(X)}) == 60


def test_levels_of_different_size(tmp_path):
    X = np.random.default_rng(0).normal(size=(100, 16))
    model = RQKMeans(n_levels=3, n_clusters=[10, 20, 50], random_state=42).fit(X)
    assert [len(book) for book in model.codebooks_] == [10, 20, 50]
    assert (model.encode(X).max(0) == [9, 19, 49]).all()


def test_train_once_save_load_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, new = np.random.default_rng(0).normal(size=(2, 300, 16))
    model = RQKMeans(n_levels=3, n_clusters=10).fit(train)
    model.save("production_model")
    elsewhere = RQKMeans.load("production_model", device="cpu")
    assert (elsewhere.encode(new, device="cpu") == model.encode(new)).all()
    assert elsewhere.semantic_id(elsewhere.encode(new)) == model.semantic_id(model.encode(new))
