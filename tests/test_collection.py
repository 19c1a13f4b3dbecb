"Collections of real photographs and of folders: every picture is there, or listed with the reason."
import datetime
import io
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import real_data
from PIL import Image

from semid.collection import collect, open_collection, write_collection
from semid.config import ConfigError, DataError
from semid.images import image_bytes, read_image
from semid.picture_sources import pictures_at
from semid.quality.examples import clean_pictures, degraded_examples
from semid.quality.model import QualityAssessmentInference, train_quality
from semid.quality.refiner import (
    KEPT, QUARANTINED, REJECTED, Refined, VisualDegradationsRefiner, _pieces, _Scorer, check_output)


def pictures(folder, *names, size=(40, 40)):
    "Pictures of different colours under some names."
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i * 37 % 256, 90, 200 - i)).save(folder / name)


def test_flickr8k_from_a_folder(tmp_path):
    folder = real_data("flickr8k_1000/train.parquet").parent
    found = collect("flickr8k", tmp_path / "flickr", folder, progress=False)
    rows = {split: pq.read_metadata(folder / f"{split}.parquet").num_rows
            for split in ("train", "validation", "test")}
    assert found.counts == rows and sum(rows.values()) == 1000
    first = next(found.records("train"))
    given = pq.read_table(folder / "train.parquet").slice(0, 1).to_pylist()[0]
    assert first["captions"] == [given[f"caption_{i}"] for i in range(5)]
    assert first["image"]["bytes"] == given["image"]["bytes"]


def test_folders_are_classes_and_splits(tmp_path):
    folders = [f"{split}/{label}" for split in ("train", "test") for label in ("cat", "dog")]
    names = [f"{folder}/{i}.png" for folder in folders for i in (1, 2)]
    pictures(tmp_path / "pets", *names)
    found = collect("imagefolder", tmp_path / "out", tmp_path / "pets", progress=False)
    assert {r["id"]: (r["split"], r["label"]) for r in found.records()} == {
        name: tuple(name.split("/")[:2]) for name in names}


def test_no_picture_of_a_folder_is_passed_over(tmp_path):
    pictures(tmp_path / "shop", "a.png", "b.png", "c.png")
    (tmp_path / "shop" / "metadata.csv").write_text("file_name,text\na.png,A\nb.png,B\ngone.png,C\n")
    (tmp_path / "shop" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match="3 of 5 pictures"):
        collect("imagefolder", tmp_path / "out", tmp_path / "shop", progress=False)
    found = collect("imagefolder", tmp_path / "out", tmp_path / "shop", max_bad_fraction=0.6, progress=False)
    assert {r["id"]: r["captions"] for r in found.records()} == {"a.png": ["A"], "b.png": ["B"]}
    aside = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {line["id"] for line in aside} == {"c.png", "gone.png", "phone.heic"}
    assert all(line["reason"] for line in aside)


def test_links_out_of_a_folder_are_followed(tmp_path):
    pictures(tmp_path / "store", "one.png")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(tmp_path / "store" / "one.png")
    found = collect("imagefolder", tmp_path / "out", tmp_path / "linked", progress=False)
    assert [r["id"] for r in found.records()] == ["a.png"]


def test_what_parquet_holds_is_kept(tmp_path):
    "Ids are whole paths, whole-number groups stay together, late values keep their type, dates are text."
    colours = [(i % 256, i // 256, 9) for i in range(900)]
    data = [{"bytes": image_bytes(Image.new("RGB", (40, 40), colour)), "path": f"{i % 3}/{i}.png"}
            for i, colour in enumerate(colours)]
    table = pa.table({"image": data, "group": [i // 30 for i in range(900)],
                      "stars": pa.array([None] * 800 + [5] * 100, pa.int64()),
                      "taken": [datetime.date(2024, 5, 1 + i % 28) for i in range(900)]})
    pq.write_table(table, tmp_path / "some.parquet")
    found = collect("parquet", tmp_path / "out", tmp_path / "some.parquet", progress=False)
    records = {r["id"]: r for r in found.records(images=False)}
    assert len(records) == 900 and "2/899.png" in records
    assert records["2/899.png"]["stars"] == 5 and records["0/0.png"]["taken"] == "2024-05-01"
    splits = {}
    for r in records.values(): splits.setdefault(r["group"], set()).add(r["split"])
    assert {len(s) for s in splits.values()} == {1}


def different(n):
    "Pictures that are different, as a column of Parquet."
    return [image_bytes(Image.new("RGB", (32, 32), (i % 256, i // 256, 9)), "PNG") for i in range(n)]


def test_the_schema_of_parquet_tells_of_late_captions(tmp_path):
    texts = {"caption_0": ["One."] * 600, "caption_1": pa.array([None] * 599 + ["Late."], pa.string())}
    pq.write_table(pa.table({"image": different(600), **texts}), tmp_path / "some.parquet")
    found = collect("parquet", tmp_path / "out", tmp_path / "some.parquet", progress=False)
    assert found.caption_columns == ["caption_0", "caption_1"]
    assert [r["captions"] for r in found.records() if r["id"] == "some-000599"] == [["One.", "Late."]]


def test_columns_of_any_name_and_tables_beside_pictures(tmp_path):
    own = {"from": ["a shop", "a shop"], "problem": ["none", None], "stars": pa.array([None, 5], pa.int64())}
    for split, data in zip(("train", "test"), different(2)):
        (tmp_path / "hub" / split).mkdir(parents=True)
        table = pa.table({"image": [data, data + b" "], **own})
        pq.write_table(table, tmp_path / "hub" / split / "0000.parquet")
    beside = {"stars": ["many"], "caption_0": ["A list."], "from": [1.5]}
    pq.write_table(pa.table(beside), tmp_path / "hub" / "prices.parquet")
    found = collect("parquet", tmp_path / "out", tmp_path / "hub", progress=False)
    assert found.types == {"stars": "int64"} and found.columns == ["from", "problem", "stars"]
    assert not found.caption_columns and found.counts == {"train": 2, "validation": 0, "test": 2}
    assert {r["id"]: r["problem"] for r in found.records("test")} == {
        "test/0000-000000": "none", "test/0000-000001": None}


def test_names_of_splits(tmp_path):
    "The usual ones are understood, others are refused, and the only one there is stays."
    names = ["training", "Valid", "val", "dev", "testing", "test", None, ""]
    pq.write_table(pa.table({"image": different(8), "split": names}), tmp_path / "some.parquet")
    found = collect("parquet", tmp_path / "out", tmp_path / "some.parquet", progress=False)
    rows = {r["id"][-1]: r["split"] for r in found.records()}
    assert [rows[str(i)] for i in range(6)] == ["train", *["validation"] * 3, "test", "test"]
    pq.write_table(pa.table({"image": different(1), "split": ["holdout"]}), tmp_path / "some.parquet")
    with pytest.raises(DataError, match="has the split 'holdout': use train, validation, test, or none"):
        collect("parquet", tmp_path / "out", tmp_path / "some.parquet", progress=False)
    for split, counts in ("validation", [0, 20, 0]), ("test", [0, 0, 20]):
        pictures(tmp_path / split, *(f"{split}/{i}.png" for i in range(20)))
        found = collect("imagefolder", tmp_path / f"{split}-out", tmp_path / split, progress=False)
        assert [*found.counts.values()] == counts
        (tmp_path / "hub" / split).mkdir(parents=True)
        pq.write_table(pa.table({"image": different(20)}), tmp_path / "hub" / split / "0000.parquet")
        found = collect("parquet", tmp_path / f"{split}-hub", tmp_path / "hub" / split, progress=False)
        assert [*found.counts.values()] == counts
    lines = ["file_name,split", *(f"{i}.png,{names[i % 6]}" for i in range(12))]
    pictures(tmp_path / "told", *(f"{i}.png" for i in range(12)))
    (tmp_path / "told" / "metadata.csv").write_text("\n".join(lines) + "\n")
    found = collect("imagefolder", tmp_path / "told-out", tmp_path / "told", progress=False)
    assert found.counts == {"train": 2, "validation": 6, "test": 4}


def test_parquet_that_dresses_as_a_folder_of_pictures(tmp_path):
    pictures(tmp_path / "shots", "a.png")
    pq.write_table(pa.table({"score": [1.0]}), tmp_path / "shots" / "scores.parquet")
    assert [Path(name).name for name, _ in pictures_at([tmp_path / "shots"])] == ["a.png"]
    links = pa.table({"image": [{"bytes": None, "path": "../secret.png"}]})
    pq.write_table(links, tmp_path / "shots" / "links.parquet")
    pictures(tmp_path, "secret.png")
    assert dict(pictures_at([tmp_path / "shots"]))["../secret.png"] == b""


def test_a_folder_without_splits_is_split_by_picture(tmp_path):
    pictures(tmp_path / "many", *(f"{i}.png" for i in range(200)))
    found = collect("imagefolder", tmp_path / "out", tmp_path / "many", progress=False)
    again = collect("imagefolder", tmp_path / "again", tmp_path / "many", progress=False)
    assert found.counts == again.counts and found.fingerprint == again.fingerprint
    assert 130 < found.counts["train"] < 185 and min(found.counts.values()) > 5


@pytest.mark.parametrize("make, says", [
    (lambda good: good[:len(good) // 2], "truncated"),
    (lambda good: b"", "no bytes"),
    (lambda good: b"GIF89a", "picture|decoded"),
    (lambda good: b"<svg/>", "no whole picture"),
    (lambda good: good[:20] + b"\0" * 400 + good[420:], "picture|decoded"),
])
def test_broken_files_have_a_reason(make, says):
    good = image_bytes(Image.effect_noise((200, 200), 90).convert("RGB"))
    with pytest.raises(DataError, match=says): read_image(make(good))


def test_a_bomb_is_not_unpacked():
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    assert len(file.getvalue()) < 50_000
    with pytest.raises(DataError, match="81,000,000 pixels"): read_image(file.getvalue())


def test_a_collection_of_scenes_is_the_same_bytes_again(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders: collect("scenes", folder, n=60, side=48, seed=4, progress=False)
    for file in ("train", "validation", "test"):
        assert (folders[0] / f"{file}.parquet").read_bytes() == (folders[1] / f"{file}.parquet").read_bytes()
    assert Counter(open_collection(folders[0]).counts) == Counter(open_collection(folders[1]).counts)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "Rendered pictures, and a model that was trained on them for a moment."
    folder = tmp_path_factory.mktemp("judged")
    collection = collect("scenes", folder / "scenes", n=120, side=64, progress=False)
    train, validation = (clean_pictures(collection, split) for split in ("train", "validation"))
    train_quality(degraded_examples(train, validation, per_epoch=64), folder / "model", epochs=1, width=4,
                  device="cpu", progress=False)
    return folder, collection


def verdicts(collection, **status):
    "What a refiner might say of a collection: kept, but for the ids that are named."
    rows = [{"id": r["id"], "status": status.get(r["id"], KEPT), "reason": None, "family": None}
            for r in collection.records(images=False)]
    for row in rows:
        if row["status"] != KEPT: row["reason"] = "it is broken"
    kinds = pa.schema([(name, pa.string()) for name in ("id", "status", "reason", "family")])
    return Refined(pa.Table.from_pylist(rows, kinds), collection, {})


def test_what_is_kept_has_the_columns_of_the_collection(tmp_path):
    "Types of values that come late, or never; the number of captions; and pictures that broke since."
    kinds = {"stars": "int64", "price": "float64", "sold": "bool", "old": "int64"}
    late = {"stars": 5, "price": 2.5, "sold": True}
    records = [{"id": f"p{i}", "image": {"bytes": data, "path": None}, "captions": [], "split": "train",
                **(late if i >= 560 else dict.fromkeys(late))} for i, data in enumerate(different(600))]
    given = write_collection(records, tmp_path / "all", types=kinds, n_captions=2, progress=False)
    assert given.types == kinds
    status = {"p0": REJECTED, "p1": QUARANTINED, "p599": QUARANTINED}
    kept = verdicts(given, **status).save(tmp_path / "kept")
    assert (kept.types, kept.caption_columns, len(kept)) == (kinds, given.caption_columns, 597)
    aside = pq.read_table(tmp_path / "kept" / "quarantine.parquet").to_pylist()
    assert [(line["file"], line["row"], line["id"], line["reason"]) for line in aside] == [
        ("train.parquet", 1, "p1", "it is broken"), ("train.parquet", 599, "p599", "it is broken")]
    few = verdicts(given, **{f"p{i}": REJECTED for i in range(560, 600)}).save(tmp_path / "few")
    assert few.types == kinds


def test_verdicts_appear_with_what_is_kept_or_not_at_all(judged, tmp_path, monkeypatch):
    _, collection = judged
    refined = verdicts(collection)
    monkeypatch.setattr("semid.quality.refiner.write_collection", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError): refined.save(tmp_path / "kept")
    assert not [*(tmp_path / "kept").iterdir()]


def test_where_nothing_can_be_saved(judged, tmp_path):
    folder, collection = judged
    (tmp_path / "file").write_text("")
    (tmp_path / "odd" / "test.parquet").mkdir(parents=True)
    for name in ("file", "file/below", "odd"):
        with pytest.raises(ConfigError, match="is a f"): check_output(tmp_path / name, collection)
    with pytest.raises(ConfigError, match="is what is read"): check_output(folder / "scenes", collection)
    check_output(tmp_path / "new", collection)
    assert not (tmp_path / "new").exists()


def test_a_worker_on_ray_judges_as_this_process_does(judged):
    "By the device and the largest size of the model that was given."
    folder, collection = judged
    model = QualityAssessmentInference(folder / "model", "cpu", 16, max_pixels=64 * 64 - 1)
    refiner, n = VisualDegradationsRefiner(model, progress=False), torch.get_num_threads()
    try: worker = _Scorer(*refiner._scorer_args())
    finally: torch.set_num_threads(n)
    pieces = pa.Table.from_pylist(_pieces(collection))
    here = refiner.refine(collection)
    assert worker(pieces).drop_columns(["piece"]).equals(here.table)
    assert here.counts()["quarantined"] > 100 and worker.model.device == "cpu"
