"Can the captions of the rendered collection be told apart by who reads them, and is what they say drawn?"
import json
import re
from collections import defaultdict

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, label

from semid.quality.degradations import random_damage
from semid.scenes import (_OTHER_WAY, BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, _ground, random_scene,
                          render, scenes)

NUMBERS = {"one": 1, "a": 1, "an": 1, "a single": 1, "two": 2, "three": 3, "four": 4}


def either(words): return "|".join(sorted(words, key=len, reverse=True))


def meaning(table): return {word: name for name, words in table.items() for word in words}


SIZE, SHAPE, RELATION, GROUND = map(meaning, (SIZES, SHAPES, RELATIONS, BACKGROUNDS))
THINGS = re.compile(rf"\b({either(NUMBERS)}) (?:({either(SIZE)}) )?({either(COLOURS)}) "
                    rf"({either(SHAPE)})(?:e?s)?\b")
RELATED = re.compile(rf"\b({either(RELATION)})( it| them)?\b")


def read(caption):
    "What a caption says: two kinds of things, their relation and the background, None where it is silent."
    text = caption.lower()
    ground = next((GROUND[phrase] for phrase in GROUND if re.search(rf"\b{phrase}\b", text)), None)
    text = re.sub(rf"\b({either(GROUND)})\b", "", text)
    first, second = ((NUMBERS[n], SIZE.get(size), colour, SHAPE[shape])
                     for n, size, colour, shape in THINGS.findall(text))
    found = RELATED.search(text)
    relation = found and RELATION[found[1]]
    return first, _OTHER_WAY[relation] if found and found[2] else relation, second, ground


def fits(told, seen): return all(a in (None, b) for a, b in zip(told, seen))


def both_ways(scene):
    facts = "count", "size", "colour", "shape"
    one, other = (tuple(scene[key][fact] for fact in facts) for key in ("first", "second"))
    yield one, scene["relation"], other, scene["background"]
    yield other, _OTHER_WAY[scene["relation"]], one, scene["background"]


@pytest.fixture(scope="module")
def collection(): return list(scenes(2400, damage=random_damage))


def test_a_reader_finds_the_picture_of_a_caption(collection):
    "Recall@1 of one who reads captions and sees what is in pictures; copies of a picture are as good."
    by_kind = defaultdict(list)
    for record in collection:
        for a, relation, b, ground in both_ways(json.loads(record["scene"])):
            by_kind[a[2:], b[2:]].append((a, relation, b, ground, record["group"]))
    right = []
    for record in collection:
        for caption in record["captions"]:
            first, relation, second, ground = read(caption)
            groups = {group for a, r, b, g, group in by_kind[first[2:], second[2:]]
                      if fits(first, a) and fits(second, b) and fits((relation, ground), (r, g))}
            assert record["group"] in groups, (caption, record["scene"])
            right.append((record["group"] in groups) / len(groups))
    recall = sum(right) / len(right)
    assert recall >= 0.95, recall


def test_the_background_does_not_give_pictures_away(collection):
    "Two captions of five are silent about it, and each background is that of many pictures."
    silent = [sum(read(c)[3] is None for c in record["captions"]) for record in collection]
    assert set(silent) == {2}
    counts = defaultdict(int)
    for record in collection: counts[json.loads(record["scene"])["background"]] += 1
    assert len(counts) == len(BACKGROUNDS) and min(counts.values()) > 300


def test_truth_is_beside_the_pictures(collection):
    "Copies name what they copy, in the same group; damage has a family and a severity."
    by_id = {record["id"]: record for record in collection}
    for record in collection:
        original = by_id[record["group"]]
        assert original["copy_kind"] is None and original["damage"] is None or original is record
        assert (record["damage"] is None) == (record["severity"] == 0)
    assert 150 < sum(bool(r["copy_kind"]) for r in collection) < 240
    assert 190 < sum(bool(r["damage"]) for r in collection) < 290


@pytest.mark.parametrize("seed", range(120))
def test_what_is_drawn_is_what_is_said(seed):
    "Things are blobs that were not on the background: so many, of this colour and size, on this side."
    scene, side = random_scene(seed), 192
    picture = np.asarray(render(scene, side, seed)).astype(int)
    ground = np.asarray(_ground(scene.background, side, np.random.default_rng(seed))).astype(int)
    there = abs(picture - ground).max(2) > 0
    blobs, _ = label(binary_erosion(there, iterations=2))  # corners of squares may just touch
    sizes = np.bincount(blobs.ravel())[1:]
    of = [np.argwhere(blobs == i + 1) for i in np.flatnonzero(sizes > 100)]
    axis, low = {"left": (1, True), "right": (1, False),
                 "above": (0, True), "below": (0, False)}[scene.relation]
    is_first = [(where[:, axis].mean() < side / 2) == low for where in of]
    palette = np.array([*COLOURS.values()])
    for things, wanted in ((scene.first, True), (scene.second, False)):
        found = [where for where, first in zip(of, is_first) if first == wanted]
        assert len(found) == things.count
        rim = "white" if things.colour == "black" else "black"
        for where in found:
            inside = picture[where[:, 0], where[:, 1]]
            names = np.array([*COLOURS])[abs(inside[:, None] - palette).sum(2).argmin(1)]
            kinds, counts = np.unique(names[names != rim], return_counts=True)
            assert kinds[counts.argmax()] == things.colour
            assert (np.ptp(where, axis=0).max() > 0.14 * side) == (things.size == "large")
