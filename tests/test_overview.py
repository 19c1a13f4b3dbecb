"The page in a browser: it fits a phone, runs nothing, fetches nothing, and is read without its pictures too."
import shutil

import numpy as np
import pytest

from semid.overview.funnel import Funnel
from semid.overview.galleries import Search, Shown, vector_thumbnails
from semid.overview.page import write_page
from semid.overview.tree import Node

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>" + "without-any-space" * 12


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A page on which all texts are long and hostile, and every second item has no picture."
    shown = [Shown(f"{EVIL}{i}", f"{EVIL}{i}", good=i == 1) for i in range(9)]
    node = Node("1-2", 12_345, 64, shown[:6], [Node("1-2-3", 123, 9, shown[:4])])
    values = {"recall@1": 0.5, "recall@5": 0.75, "recall@10": 1.0, "mrr": 0.6, "median_rank": 1.0}
    metrics = {"pictures": 1234, "split": "test", "by kind": {EVIL: values},
               **{f"{side}_{name}": value for side in ("t2i", "i2t") for name, value in values.items()}}
    model = {"name": EVIL, "is_pinned": True, "baseline_model": EVIL, "average_ap": 0.5, "description": EVIL,
             "training_slices": {"a": 12}, "validation_slices": {}}
    found = {
        "funnels": [Funnel("pictures", 2_400_000, {"unreadable": 3, "damaged": 399_997}, 2_000_000)],
        "pictures": vector_thumbnails({one.id: np.arange(9.0) for one in shown[::2]}),
        "figures": {}, "as_vectors": True,
        "quality": {"refined": {"rejected": 9, "pictures": 99, "thresholds": {"score": 0.6}},
                    "rejected": shown, "nearly": shown, "measured": None,
                    "found": {"precision": 0.97, "recall": 0.96}},
        "duplicates": {"pairs": [*zip(shown, shown[1:])], "leaks": 3,
                       "about": {"counts": {"removed": 8, "rows_in": 99}, "threshold": 0.99}},
        "retrieval": {"metrics": metrics, "searches": [Search(EVIL, 7, shown[:5])], "onnx": None},
        "ids": {"tree": Node("", 24_690, 2, [], [node, node]), "shared": {"1-2": (9, shown[:6])},
                "about": {"n_suffixed": 7}, "measured": None},
        "sweep": {"reasons": [EVIL, EVIL], "point": {"n_levels": 3, "n_clusters": 64},
                  "rows": [{f"column_{i}": f"{i}.5" for i in range(20)} | {"implementation": EVIL}]},
        "models": [model]}
    runs = [{"stage": "collect", "seconds": 12.3, "peak_memory_mb": 456.7, "started": "2026-01-01 12:00",
             "commit": "0" * 40, "pipeline": EVIL}]
    path = tmp_path_factory.mktemp("a page") / "index.html"
    write_page(path, found, runs=runs, environment={"platform": EVIL}, settings={"name": EVIL})
    return path


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_and_runs_nothing(page, width):
    from playwright.sync_api import sync_playwright
    said, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.on("console", lambda message: said.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        for summary in tab.locator("summary").all(): summary.click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator("script, main img:not([src^='data:'])").count() == 0
        assert tab.locator("img.shot").count() > 20 < tab.locator("span.missing").count()
        assert all(tab.locator(f"h2#{link.get_attribute('href')[1:]}").count() == 1
                   for link in tab.locator("nav a").all())
        assert tab.locator("img.shot").first.evaluate("image => image.naturalWidth") >= 64
        browser.close()
    assert not said and {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == 1
