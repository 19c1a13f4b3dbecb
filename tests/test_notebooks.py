"Notebooks run and are clean, stages read what they are given; rooms import only from rooms above them."
import ast, configparser, importlib.util, json, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import semid
from forked import forked

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
STAGES = sorted((ROOT / "experiments").glob("[0-9]*.ipynb"))
EXPLORATIONS = sorted({*(ROOT / "experiments").glob("*.ipynb")} - {*STAGES})
BENCHMARKS = sorted((ROOT / "experiments" / "benchmarks").glob("*.ipynb"))

# in this order: each may import from itself and from those before it
ROOMS = """config feature_files features sources images scenes picture_sources collection tracking sql
    training networks onnx_file ray_cluster backbone classifier quality ranking clustering semantic_ids
    serving models registry overview cli""".split()


def name_of(path): return path.relative_to(ROOT).as_posix()
def of(paths): return pytest.mark.parametrize("path", paths, ids=name_of)
def cells_of(path): return json.loads(path.read_text())["cells"]
def source_of(cell): return "".join(cell["source"])
def is_parameters(cell): return "parameters" in cell["metadata"].get("tags", [])


def tree_of(cell):
    "The syntax tree of a code cell, without IPython's own lines."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", source_of(cell), flags=re.M))


def names_in(cell, context):
    return {n.id for n in ast.walk(tree_of(cell)) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def as_nbdev_tests_it(path):
    from nbdev.test import test_nb
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    passed, _ = test_nb(path, settings["DEFAULT"]["tst_flags"].split(), basepath=ROOT)
    sys.exit(not passed)


def files():
    passing = {"__pycache__", ".ipynb_checkpoints"}
    return {path for path in (ROOT / "nbs").rglob("*") if not passing & {*path.parts}}


@pytest.fixture(scope="module")
def runs(request):
    "The runs of the notebooks that were asked for, two at a time; and the files that were there before."
    items = [item for item in request.session.items if item.originalname == "test_it_runs"]
    asked = [item.callspec.params["path"] for item in items if item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        run = lambda path: forked(as_nbdev_tests_it, path, cwd=path.parent, timeout=600)
        yield {path: pool.submit(run, path) for path in asked}, files()


@of(NOTEBOOKS)
def test_it_runs(path, runs):
    run = runs[0][path].result()
    assert run.returncode == 0, run.stderr[-5000:]


def test_runs_leave_no_files(runs):
    for run in runs[0].values(): run.result()
    assert files() - runs[1] == set()


@of(NOTEBOOKS + STAGES + EXPLORATIONS + BENCHMARKS)
def test_it_is_clean(path):
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) <= {"kernelspec"}
    assert len(notebook["cells"]) <= 150
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        assert cell.get("execution_count") is None
        for output in cell.get("outputs", []):
            assert output.get("execution_count") is None and output.get("name") != "stderr"
            shown = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
            text = json.dumps([shown, output.get("text"), output.get("traceback")])
            assert not re.search(r"(?<!\w)/(home|tmp|work|root)\b", text), text[:300]


@of(NOTEBOOKS)
def test_what_is_expected_to_fail_is_run(path):
    "`expect_fail` is a context manager: called like a function it runs nothing, and passes."
    code = [tree_of(cell) for cell in cells_of(path) if cell["cell_type"] == "code"]
    calls = [n for tree in code for n in ast.walk(tree) if isinstance(n, ast.Call)
             and isinstance(n.func, ast.Name) and n.func.id == "expect_fail"]
    entered = [item.context_expr for tree in code for n in ast.walk(tree) if isinstance(n, ast.With)
               for item in n.items]
    assert not [ast.unparse(call) for call in calls if call not in entered]


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs", ROOT / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts_of(path):
    "What a page says in Markdown."
    if path.suffix == ".md": return [path.read_text()]
    return [source_of(cell) for cell in cells_of(path) if cell["cell_type"] == "markdown"]


@of([*sorted(ROOT.glob("*.md")), *NOTEBOOKS])
def test_links_lead_somewhere(path, docs):
    links = [link.partition("#")[0] for text in texts_of(path) for link in docs.LINK.findall(text)]
    folder = path.parent.relative_to(ROOT).as_posix()
    assert not [link for link in links if not (ROOT / docs.linked(link, folder)).exists()]


def test_the_index_has_all_chapters_in_reading_order(docs):
    text = "\n".join(texts_of(ROOT / "nbs" / "index.ipynb")).partition("## Chapters")[2]
    links = [link for link in docs.LINK.findall(text) if link.endswith(".ipynb") and link != "scale.ipynb"]
    there = [name_of(path) for path in docs.pages() if path.stem not in ("index", "scale")]
    assert [f"nbs/{link}" for link in links] == there
    assert {*docs.pages()} == {*NOTEBOOKS}


def test_addresses_in_the_site(docs):
    assert docs.address("experiments/benchmarks/nearest.md", "nbs/index.ipynb") == "benchmarks/nearest/"
    assert docs.address("experiments/benchmarks/nearest.md", "nbs/scale.ipynb") == "../benchmarks/nearest/"
    assert docs.address("nbs/index.ipynb", "nbs/cli/00_options.ipynb") == "../../"
    assert docs.address("CHANGELOG.md", "nbs/index.ipynb") == "changelog/"
    assert docs.address("docs/prefixes.png", "nbs/index.ipynb") == "docs/prefixes.png"


def commands():
    "Of every stage in dvc.yaml: the notebook it runs, and the names that are given to it."
    if not (ROOT / "dvc.yaml").exists(): return
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        command = stage.get("do", stage)["cmd"]
        for line in [command] if isinstance(command, str) else command:
            if ".ipynb" not in line: continue
            notebook = next(word for word in line.split() if word.endswith(".ipynb"))
            yield Path(notebook).name, re.findall(r"\s(?:-p|-r|--parameters|--parameters_raw)\s+(\w+)", line)


def test_there_are_stages_and_they_are_used():
    if not (ROOT / "dvc.yaml").exists(): pytest.skip("there is no dvc.yaml yet")
    assert STAGES and {path.name for path in STAGES} == {name for name, _ in commands()}


@of(STAGES + EXPLORATIONS)
def test_outside_the_library_there_are_no_outputs_and_no_functions(path):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    assert not [source_of(cell) for cell in code if cell["outputs"]]
    assert not [n.name for cell in code for n in ast.walk(tree_of(cell)) if isinstance(n, definitions)]


@of(EXPLORATIONS)
def test_an_exploration_writes_nothing_and_has_small_cells(path):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    modules = {name for cell in code for name in imported(tree_of(cell))}
    assert modules and "semid.tracking" not in modules
    assert not any(map(is_parameters, cells_of(path)))
    calls = [n.func for cell in code for n in ast.walk(tree_of(cell)) if isinstance(n, ast.Call)]
    called = {getattr(function, "attr", getattr(function, "id", "")) for function in calls}
    writers = """open write_text write_bytes to_csv to_parquet save save_figure write_json write_page
        start_run unlink rename mkdir"""
    assert not called & set(writers.split())
    assert not [source_of(cell) for cell in code[1:] if source_of(cell).count("\n") > 8]
    assert any(path.name in name for name in (ROOT / "tests" / "test_pipeline.py").read_text().split("\""))


@of(STAGES)
def test_a_stage_is_given_only_what_it_reads(path):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert sum(map(is_parameters, cells_of(path))) == sum(map(is_parameters, code)) == 1
    at = next(i for i, cell in enumerate(code) if is_parameters(cell))
    coordinates = names_in(code[at], ast.Store)
    read_later = set().union(*(names_in(cell, ast.Load) for cell in code[at + 1:]))
    given = {name for notebook, names in commands() if notebook == path.name for name in names}
    assert given <= coordinates & read_later
    assert not coordinates & set(yaml.safe_load((ROOT / "params.yaml").read_text()))


def room_of(module): return (module.split(".") + [""])[1]


def file_of(module): return ROOT / f"{module.replace('.', '/')}.py"


def imports(file):
    "The modules of semid that a module imports, also inside functions."
    package = ["semid", *file.relative_to(ROOT / "semid").parent.parts]
    yield from imported(ast.parse(file.read_text()), package)


def imported(tree, package=()):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found = [module, *(f"{module}.{alias.name}" for alias in node.names
                               if file_of(f"{module}.{alias.name}").exists())]
            if module == "semid":
                found = [semid._MODULE_OF.get(alias.name, f"semid.{alias.name}") for alias in node.names]
        else: continue
        yield from (name for name in found if name.partition(".")[0] == "semid")


def test_no_module_is_too_long():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in (ROOT / "semid").rglob("*.py")}
    assert not {name: n for name, n in lengths.items() if n > 420 and name != "semid/_modidx.py"}  # split it


def test_rooms_import_from_rooms_above_them():
    below = []
    for file in sorted((ROOT / "semid").rglob("*.py")):
        own = room_of(f"semid.{'.'.join(file.relative_to(ROOT / 'semid').with_suffix('').parts)}")
        if own in ("__init__", "_modidx"): continue
        for name in imports(file):
            if name in ("semid", "semid.__version__"): continue
            if ROOMS.index(room_of(name)) > ROOMS.index(own): below.append(f"{file.name} imports {name}")
    assert not below


def needed(modules):
    "The files of these modules of semid and of all that they import."
    found, waiting = set(), list(modules)
    while waiting:
        file = file_of(waiting.pop())
        if not file.exists() or file in found: continue
        found.add(file)
        waiting += imports(file)
    return {name_of(file) for file in found}


@of(STAGES)
def test_a_stage_depends_on_the_code_that_it_runs(path):
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    deps = next(stage["deps"] for stage in stages if name_of(path) in stage["cmd"])
    code = [tree_of(cell) for cell in cells_of(path) if cell["cell_type"] == "code"]
    modules = needed(name for tree in code for name in imported(tree))
    assert modules - {"semid/tracking.py"} == {dep for dep in deps if dep.startswith("semid/")}
    assert name_of(path) in deps


def test_the_lock_is_of_this_graph():
    "dvc.lock names the same commands and dependencies as dvc.yaml: nobody forgot to commit it."
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    assert {name.partition("@")[0] for name in locked} == set(stages)
    for name, stage in locked.items():
        assert {dep["path"] for dep in stage["deps"]} == set(stages[name.partition("@")[0]]["deps"]), name


def loaded_by(statement, heavy):
    code = f"{statement}\nimport sys\nprint(*set(sys.modules) & {set(heavy.split())!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_import_semid_is_light():
    assert not loaded_by("import semid", "torch ray mlflow numba numpy pandas sklearn matplotlib pyarrow")


def test_the_command_line_is_light():
    assert not loaded_by("import semid.cli.main", "torch ray mlflow pandas sklearn matplotlib numba")


def test_every_public_name_is_there():
    assert all(getattr(semid, name) is not None for name in semid.__all__)
