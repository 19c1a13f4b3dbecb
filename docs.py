"""README.md and the site, from the notebooks.

python docs.py            write README.md, and the site into site/
python docs.py readme     only README.md
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent
HIDDEN = re.compile(r"^#\s*\|\s*(hide|default_exp)\b", re.M)
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)


def reader(path: Path) -> nbformat.NotebookNode:
    "The notebook as its reader should see it: no plumbing, no directives."
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if c.source.strip() and not HIDDEN.search(c.source)]
    for c in nb.cells:
        c.source = DIRECTIVE.sub("", c.source)
    nb.metadata.language_info = {"name": "python"}
    return nb


def readme_text() -> str:
    "README.md as nbs/index.ipynb has it; its pictures are files in docs/."
    text, _ = MarkdownExporter().from_notebook_node(reader(ROOT / "nbs" / "index.ipynb"))
    return re.sub(r"\n{3,}", "\n\n", text.replace("../docs/", "docs/")).strip() + "\n"


def pages() -> list[Path]:
    "The notebooks in reading order: index, the hall, the rooms, the door."
    rooms = ["", "quality", "ranking", "clustering", "semantic_ids", "serving", "models", "registry", "cli"]
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    found = [p for p in found if not p.name.startswith("_") and ".ipynb_checkpoints" not in p.parts]
    room = lambda p: rooms.index(p.parent.name.replace("nbs", ""))
    return sorted(found, key=lambda p: (p.stem != "index", room(p), p.name))


def site() -> None:
    "The site in site/, made by mkdocs."
    source = ROOT / "_site_src"
    shutil.rmtree(source, ignore_errors=True)
    for path in pages():
        copy = source / path.relative_to(ROOT / "nbs")
        copy.parent.mkdir(parents=True, exist_ok=True)
        nb = reader(path)
        for c in nb.cells:
            c.source = c.source.replace("../docs/", "docs/")
        nbformat.write(nb, copy)
    shutil.copytree(ROOT / "docs", source / "docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(ROOT / "mkdocs.yml")]
    subprocess.run(command, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    shutil.rmtree(source)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text())
    if sys.argv[1:] != ["readme"]:
        site()
        print(f"README.md and {ROOT / 'site' / 'index.html'}")
