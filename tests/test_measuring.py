"What the benchmarks share: who is compared with whom, and what is said of it."
import importlib.util
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

FILE = Path(__file__).parents[1] / "experiments" / "benchmarks" / "measuring.py"


@pytest.fixture(scope="module")
def measuring():
    spec = importlib.util.spec_from_file_location("measuring", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_runs_once_a_round_and_each_round_begins_with_another(measuring):
    ran = []
    candidates = {name: lambda name=name: ran.append(name) for name in "abc"}
    turns = measuring.in_turn(candidates, 4, lambda work: (1., work()))
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {who: len(some) for who, some in turns.seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_two_times_of_one_round_are_compared(measuring):
    "A machine that becomes ten times slower after each round changes no ratio."
    clock, took = count(), {"ours": 1., "theirs": 3.}
    turns = measuring.in_turn({who: lambda who=who: who for who in took}, 4,
                              lambda work: (took[work()] * 10. ** (next(clock) // 2), work()))
    assert turns.ratios("theirs", "ours").tolist() == [3.] * 4 and turns.results == {w: w for w in took}
    row, = (row for row in turns.rows("ours") if row["candidate"] == "theirs")
    assert row["times ours"] == "3.00 (3.00 to 3.00)"


def test_what_a_call_prints_is_not_shown(measuring, capsys):
    seconds, found = measuring.timed(lambda: print("loud") or 7, pause=0)
    assert found == 7 and 0 <= seconds < 60 and capsys.readouterr().out == ""


def test_an_exponent_is_that_of_the_upper_half(measuring):
    sizes = np.array([1, 2, 4, 8, 16, 32])
    assert measuring.exponent(sizes, 3. * sizes**1.5) == pytest.approx(1.5)
    assert measuring.exponent(sizes, np.maximum(sizes, 4)**2.) == pytest.approx(2)  # fixed costs below
    assert measuring.exponent(sizes[::-1], 1. * sizes[::-1]) == pytest.approx(1)


def test_a_page_has_what_was_measured(measuring, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "root", lambda: tmp_path)
    folder = tmp_path / "experiments" / "benchmarks"
    folder.mkdir(parents=True)
    turns = measuring.Turns({"semid": [1., 2.], "slow": [3., 6.], "quick": [.5, 1.]}, {})
    figure = measuring.plot_ratios({"one": turns, "two": turns})
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "one\nslow", "one\nquick", "two\nslow", "two\nquick"]
    measuring.write_page("speed", "How fast", measuring.about("numpy"),
                         {"Speed": ["Lower is better.", pd.DataFrame(turns.rows())]}, figure)
    page = (folder / "speed.md").read_text()
    assert page.startswith("# How fast\n\n") and f"numpy {np.__version__}" in page
    assert "| slow        |      4.5  | 3.00 (3.00 to 3.00) |" in page and "![How fast](speed.png)" in page
    assert (folder / "speed.png").read_bytes()[1:4] == b"PNG"
