"What several tests share."
import os, subprocess, sys, tarfile, time
from pathlib import Path

import numpy as np
import pytest

from forked import forked
from semid.ray_cluster import start_ray

SDIST = "semantic-id==0.2.5"
DATA = Path(os.environ.get("SEMID_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SEMID = str(Path(sys.executable).with_name("semid"))


def pytest_collection_modifyitems(items):
    "The longest files first, so that no worker is left alone with one."
    items.sort(key=lambda item: item.path.name not in ("test_pipeline.py", "test_notebooks.py"))


def _command(*words):
    from semid.cli.main import main
    sys.argv = [SEMID, *words]
    main()


def semid(*words, cwd, check=True):
    "Run the command line; what it says, and how it ends."
    done = forked(_command, *map(str, words), cwd=cwd)
    assert not check or done.returncode == 0, done.stderr
    return done


def kill_once_there(path, *words, cwd):
    "Run the command line, and kill it as soon as a file is there."
    running = subprocess.Popen([SEMID, *map(str, words)], cwd=cwd, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not path.exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.kill()
    running.wait()


def real_data(name):
    "The path of a file of real vectors; where it is not there, the test is skipped."
    if not (DATA / name).is_file(): pytest.skip(f"{name} is not here: set SEMID_DATA")
    return DATA / name


@pytest.fixture(scope="session")
def local_ray():
    "One small Ray for all tests that use it."
    pytest.importorskip("ray")
    ray, _ = start_ray(2, 1, None, 2**28)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def semantic_id_sdist(tmp_path_factory):
    "The unpacked source distribution of the PyPI package semantic-id: its README and its tests."
    folder = tmp_path_factory.mktemp("sdist")
    options = "-q --no-deps --no-build-isolation --no-binary :all: --retries 1 --timeout 20".split()
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), SDIST]
    try: done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired: pytest.skip(f"{SDIST} was not fetched within 3 minutes")
    if done.returncode:
        why = ([line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip failed"])[-1]
        pytest.skip(f"{SDIST} can't be fetched from a registry: {why}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive: archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def blobs(seed, n=1500, dim=9, k=12, spread=0.5):
    "Points around k centres, float32."
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(k, dim))
    return (centres[rng.integers(0, k, n)] + rng.normal(0, spread, (n, dim))).astype(np.float32)


def residual_codes(X, codebooks):
    "Greedy residual codes by plain float64 distances."
    rest, codes = np.asarray(X, np.float32).astype(np.float64), []
    for book in codebooks:
        book = book.astype(np.float64)
        codes.append(np.array([((row - book) ** 2).sum(1).argmin() for row in rest]))
        rest = rest - book[codes[-1]]
    return np.stack(codes, axis=1)
