"Processes that begin at once: forked from one that has imported the large packages, and done nothing else."
import atexit, multiprocessing, os, subprocess, tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload("""matplotlib.pyplot mlflow nbdev.test numba pandas pyarrow.parquet scipy.sparse
    sklearn.cluster sqlalchemy torch typer""".split())


def _begin(target, args, cwd, environment, said):
    for stream, path in enumerate(said, 1): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try: target(*args)
    finally: atexit._run_exitfuncs()  # which multiprocessing leaves out


def forked(target, *args, cwd, timeout=300):
    "Call `target(*args)` in such a process; how it ended and what it said, as `subprocess.run` tells it."
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stdout", Path(folder) / "stderr"
        process = FORKS.Process(target=_begin, args=(target, args, cwd, dict(os.environ), said))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([target.__name__, *args], timeout)
        return subprocess.CompletedProcess(args, process.exitcode, *(path.read_text() for path in said))
