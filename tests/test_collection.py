"Collections of real photographs and of folders: every picture is there, or listed with the reason."
import datetime
import io
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import real_data
from PIL import Image

from semid.collection import collect, open_collection
from semid.config import DataError
from semid.images import image_bytes, read_image
from semid.picture_sources import pictures_at


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
