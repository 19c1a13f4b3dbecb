"""README.md and the site, from the notebooks.

python docs.py            write README.md, and the site into site/
python docs.py readme     only README.md
"""
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent
HIDDEN = re.compile(r"^#\s*\|\s*(hide|default_exp)\b", re.M)
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)\s]+(?=\))")  # to a file of the project
CHAPTERS = {"nbs": "The hall", "quality": "Quality", "ranking": "Ranking", "clustering": "Clustering",
            "semantic_ids": "Semantic IDs", "serving": "Serving", "models": "Models", "registry": "Registry",
            "overview": "Overview", "cli": "The door"}  # folders in reading order
BENCHMARKS = "experiments/benchmarks"


def reader(path: Path) -> nbformat.NotebookNode:
    "The notebook as its reader should see it: no plumbing, no directives."
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if c.source.strip() and not HIDDEN.search(c.source)]
    for c in nb.cells:
        c.source = DIRECTIVE.sub("", c.source)
    nb.metadata.language_info = {"name": "python"}
    return nb


def linked(link: str, folder: str) -> str:
    "What a link in a file of `folder` leads to, seen from the project's folder."
    return posixpath.normpath(posixpath.join(folder, link))


def readme_text() -> str:
    "README.md as nbs/index.ipynb has it, its links seen from the project's folder."
    text, _ = MarkdownExporter().from_notebook_node(reader(ROOT / "nbs" / "index.ipynb"))
    text = LINK.sub(lambda found: linked(found[0], "nbs"), text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def pages() -> list[Path]:
    "The notebooks in reading order: index, the hall, the rooms, the door, and scale."
    found = [p for p in (ROOT / "nbs").rglob("*.ipynb")
             if not p.name.startswith("_") and ".ipynb_checkpoints" not in p.parts]
    room = lambda p: [*CHAPTERS].index(p.parent.name)
    return sorted(found, key=lambda p: (p.stem != "index", p.stem == "scale", room(p), p.name))


def title(path: Path) -> str:
    "What a page is called."
    cells = nbformat.read(path, 4).cells if path.suffix == ".ipynb" else []
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown") or path.read_text()
    return re.search(r"^# ([^:\n]+)", text, re.M)[1].strip()


def in_site(path: str) -> str:
    "Where a file of the project is among the sources of the site."
    if path.startswith("nbs/"): return path.removeprefix("nbs/")
    return path.replace(BENCHMARKS, "benchmarks") if path.startswith(BENCHMARKS) else path.lower()


def address(path: str, seen_from: str) -> str:
    "The address of a file of the project, in the page that another one becomes."
    def page(name): return re.sub(r"(^|/)index$", "", re.sub(r"\.(ipynb|md)$", "", in_site(name)))
    found = posixpath.relpath(page(path) or ".", page(seen_from) or ".")
    return f"{found}/" if path.endswith((".ipynb", ".md")) else found


def copy_notebook(path: Path, to: Path) -> None:
    "A notebook among the sources of the site; its links become addresses, for mkdocs leaves them alone."
    nb, name = reader(path), path.relative_to(ROOT).as_posix()
    folder = posixpath.dirname(name)
    for c in nb.cells:
        if c.cell_type != "markdown": continue
        c.source = LINK.sub(lambda found: address(linked(found[0], folder), name), c.source)
    to.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, to)


def navigation() -> list[dict]:
    "The chapters in reading order, each with its pages."
    def entry(path): return {title(path): in_site(path.relative_to(ROOT).as_posix())}
    notebooks = pages()
    inside = [p for p in notebooks if p.stem not in ("index", "scale")]
    chapters = [{name: [entry(p) for p in inside if p.parent.name == folder]}
                for folder, name in CHAPTERS.items()]
    scale = [entry(p) for p in notebooks if p.stem == "scale"]
    tables = sorted((ROOT / BENCHMARKS).glob("*.md"))
    benchmarks = {"Benchmarks": [{p.stem: in_site(f"{BENCHMARKS}/{p.name}")} for p in tables]}
    about = [entry(ROOT / name) for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
    return [{"semid": "index.ipynb"}, *chapters, *scale, benchmarks, *about]


def site() -> None:
    "The site in site/, made by mkdocs."
    source = ROOT / "_site_src"
    shutil.rmtree(source, ignore_errors=True)
    for path in pages(): copy_notebook(path, source / "pages" / path.relative_to(ROOT / "nbs"))
    shutil.copytree(ROOT / "docs", source / "pages" / "docs")
    tables = shutil.ignore_patterns("*.ipynb", ".ipynb_checkpoints")
    shutil.copytree(ROOT / BENCHMARKS, source / "pages" / "benchmarks", ignore=tables)
    for name in "CONTRIBUTING.md", "CHANGELOG.md": shutil.copy(ROOT / name, source / "pages" / name.lower())
    config = {"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": "pages", "site_dir": str(ROOT / "site"),
              "nav": navigation()}
    (source / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict",
               "--config-file", str(source / "mkdocs.yml")]
    subprocess.run(command, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    shutil.rmtree(source)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text())
    if sys.argv[1:] != ["readme"]:
        site()
        print(f"README.md and {ROOT / 'site' / 'index.html'}")
