"The registry against a dict, other processes, a kill and harm, on SQLite and PostgreSQL."
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from semid import (ClassAP, ConflictError, DataError, ModelService, ModelsFilter, ModelsFilterOptions,
                   ModelTrainClass, NotFoundError, Undefined)
from semid.config import SemidError
from semid.registry.tables import CLASSES as ROWS
from semid.registry.tables import COPIED, MODELS, TABLES


def server():
    "The folder of PostgreSQL's programs, or None."
    beside = [Path(found).resolve().parent for found in [shutil.which("pg_config")] if found]
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in (*known, *beside) if (folder / "initdb").exists()), None)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="session")
def postgres():
    "The URL of a PostgreSQL server of our own."
    programs = server()
    if not programs: pytest.skip("PostgreSQL's initdb is not here")
    folder, port = Path(tempfile.mkdtemp()), free_port()  # pytest's own folders are for its user alone
    as_user: dict = {}
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        import pwd
        try: user = pwd.getpwnam("postgres")
        except KeyError: pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    run = lambda *words: subprocess.run(words, cwd=folder, capture_output=True, text=True, **as_user)
    made = run(programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "semid", "-E", "UTF8")
    if made.returncode: pytest.skip(f"PostgreSQL can't be set up: {made.stderr.strip()[-300:]}")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    started = run(programs / "pg_ctl", "-D", folder / "data", "-l", folder / "log", "-w", "-o", options,
                  "start")
    if started.returncode: pytest.skip(f"PostgreSQL can't be started: {started.stdout.strip()[-300:]}")
    yield f"postgresql+psycopg://semid@127.0.0.1:{port}/postgres"
    run(programs / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    "An empty database."
    if request.param == "sqlite": return f"sqlite:///{tmp_path / 'registry.db'}"
    found = request.getfixturevalue("postgres")
    engine = sa.create_engine(found)
    TABLES.drop_all(engine)
    engine.dispose()
    return found


@pytest.fixture
def service(url):
    made = ModelService(url, user="ada", mirror=None)
    made.create_dataset("d")
    made.create_slice("d", "train", data_count=100)
    made.create_slice("d", "val", data_count=10)
    return made


# against a dict

NAMES = st.text("aAbBäß%_/'\" -0", min_size=1, max_size=6)
APS = st.sampled_from([None, 0.0, 0.25, 0.5, 0.75, 1.0])
TYPES = st.sampled_from([None, "box", "mask"])
KINDS = st.tuples(st.sampled_from(["car", "bus", "Car", "100%"]), TYPES)
CLASSES = st.dictionaries(KINDS, APS, max_size=3).map(
    lambda aps: [ModelTrainClass(class_name=name, annotation_type=type, ap=ap)
                 for (name, type), ap in aps.items()])
LEAVES = st.sampled_from([None, True, 1, 1.5, "1", [1, 2], {}])
VALUES = LEAVES | st.dictionaries(st.just("z"), LEAVES)
META = st.none() | st.dictionaries(st.sampled_from("xy"), VALUES, max_size=2)
PARTS = st.text("aB%_ß/", min_size=1, max_size=2)
SLICES = st.sampled_from([[], ["train"], ["val", "train"]])
HELD = st.booleans() | st.none()
BOUND = st.none() | st.sampled_from([0.25, 0.5, 0.75])
CLASS_AP = st.builds(ClassAP, class_name=st.sampled_from(["car", "bus"]), annotation_type=TYPES,
                     least=st.sampled_from([0, 0.5]), most=st.sampled_from([0.5, 1]))
ONE = st.builds(
    ModelsFilterOptions, name=st.none() | NAMES, name_contains=st.none() | PARTS,
    is_trained=HELD, is_pinned=HELD, baseline_model=st.none() | st.sampled_from(["net", "Net"]),
    average_ap_least=BOUND, average_ap_most=BOUND, class_ap=st.none() | st.lists(CLASS_AP, max_size=2),
    meta=st.none() | st.dictionaries(st.sampled_from("xy"), LEAVES, max_size=1))
CONDITIONS = {
    "name_contains": PARTS, "is_trained": st.booleans(), "is_pinned": st.booleans(),
    "average_ap_least": BOUND, "average_ap_most": BOUND, "class_ap": st.lists(CLASS_AP, max_size=2),
    "baseline_model": st.sampled_from(["net", "Net"]),
    "meta": st.dictionaries(st.sampled_from("xy"), LEAVES, max_size=1)}
SINGLE = st.one_of(*(st.builds(ModelsFilterOptions, **{name: some}) for name, some in CONDITIONS.items()))
OPTIONS = st.recursive(SINGLE | ONE, lambda some: st.builds(
    ModelsFilterOptions, all=st.none() | st.lists(some, min_size=1, max_size=2),
    any=st.none() | st.lists(some, min_size=1, max_size=3)), max_leaves=5)
FILTERS = st.none() | st.builds(ModelsFilter, must_filter=st.none() | OPTIONS, not_filter=st.none() | OPTIONS)


def holds(asked, said):
    "Does a meta say this, among other things?"
    if isinstance(asked, dict) and asked:
        return isinstance(said, dict) and all(k in said and holds(asked[k], said[k]) for k in asked)
    return type(asked) is type(said) and asked == said


def average(model):
    known = [one.ap for one in model["training_classes"] if one.ap is not None]
    return sum(known) / len(known) if known else None


def in_range(one, model):
    return any(c.class_name == one.class_name and c.ap is not None and one.least <= c.ap <= one.most
               and one.annotation_type in (None, c.annotation_type) for c in model["training_classes"])


def fits(options, model):
    "Whether a model of the dict fits, condition by condition."
    o, ap = options, average(model)
    return all([
        o.name is None or model["name"] == o.name,
        o.name_contains is None or o.name_contains.casefold() in model["name"].casefold(),
        o.is_trained is None or model["is_trained"] == o.is_trained,
        o.is_pinned is None or model["is_pinned"] == o.is_pinned,
        o.baseline_model is None or model["baseline_model"] == o.baseline_model,
        o.average_ap_least is None or ap is not None and ap >= o.average_ap_least,
        o.average_ap_most is None or ap is not None and ap <= o.average_ap_most,
        all(in_range(one, model) for one in o.class_ap or []),
        not o.meta or holds(o.meta, model["meta"]),
        all(fits(one, model) for one in o.all or []),
        not o.any or any(fits(one, model) for one in o.any)])


def is_empty(options):
    "Whether there is no condition in it."
    plain = options.model_dump(exclude={"all", "any"}, exclude_none=True).values()
    return all(value in ([], {}) for value in plain) and all(
        map(is_empty, [*(options.all or []), *(options.any or [])]))


def text(meta): return json.dumps(meta, sort_keys=True)  # in which 1 is not True


def kept(models_filter, model):
    if models_filter is None: return True
    must, unwanted = models_filter.must_filter, models_filter.not_filter
    if must and not fits(must, model): return False
    return not (unwanted and not is_empty(unwanted) and fits(unwanted, model))


class Registry(RuleBasedStateMachine):
    "Whatever is done in whatever order, the registry is what a dict would be."
    models = Bundle("models")
    gone = Bundle("gone")
    url = None

    @initialize()
    def begin(self):
        path = sa.make_url(self.url).database
        if self.url.startswith("sqlite"):
            for end in "", "-wal", "-shm": Path(path + end).unlink(missing_ok=True)
        else:
            engine = sa.create_engine(self.url)
            TABLES.drop_all(engine)
            engine.dispose()
        self.service = ModelService(self.url, user="ada", mirror=None)
        self.service.create_dataset("d")
        for name, n in {"train": 100, "val": 10}.items(): self.service.create_slice("d", name, data_count=n)
        self.live, self.deleted, self.actions = {}, {}, {}

    @rule(target=models, name=NAMES, base=st.sampled_from(["net", "Net"]), classes=CLASSES, meta=META,
          slices=SLICES, is_trained=st.booleans(), is_pinned=st.booleans())
    def create(self, name, base, classes, meta, slices, is_trained, is_pinned):
        made = self.service.create_model("d", name, base, slices, training_classes=classes, meta=meta,
                                         is_trained=is_trained, is_pinned=is_pinned)
        assert (made.trained_at is not None) == is_trained
        self.live[made.id] = dict(name=name, baseline_model=base, training_classes=classes, meta=meta,
                                  slices=slices, is_trained=is_trained, is_pinned=is_pinned, description=None)
        self.actions[made.id] = ["create"]
        return made.id

    @rule(id=models, name=NAMES | st.just(Undefined), base=st.sampled_from(["net", "Net", Undefined]),
          classes=CLASSES | st.just(Undefined),
          meta=META | st.just(Undefined), slices=SLICES | st.just(Undefined),
          is_trained=st.booleans() | st.just(Undefined), description=st.sampled_from([None, "a", Undefined]))
    def update(self, id, name, base, classes, meta, slices, is_trained, description):
        before = self.service.get_model("d", id)
        given = {"name": name, "baseline_model": base, "training_classes": classes, "meta": meta,
                 "slices": slices, "is_trained": is_trained, "description": description}
        self.live[id] |= {key: value for key, value in given.items() if value is not Undefined}
        after = self.service.update_model("d", id, name=name, baseline_model=base, training_classes=classes,
                                          meta=meta, training_slice_ids=slices, is_trained=is_trained,
                                          description=description, revision=before.revision)
        differs = after != before or text(after.meta) != text(before.meta)
        assert after.revision - before.revision == differs
        if differs:
            self.actions[id].append("update")
            with pytest.raises(ConflictError):
                self.service.update_model("d", id, meta=7, revision=before.revision)

    @rule(id=models, pinned=st.booleans())
    def pin(self, id, pinned):
        if self.live[id]["is_pinned"] != pinned: self.actions[id].append("pin" if pinned else "unpin")
        self.live[id]["is_pinned"] = pinned
        (self.service.pin_model if pinned else self.service.unpin_model)("d", id)

    @rule(target=gone, id=consumes(models))
    def delete(self, id):
        if self.live[id]["is_pinned"]:
            with pytest.raises(ConflictError, match="pinned"): self.service.delete_model("d", id)
        self.service.delete_model("d", id, force=self.live[id]["is_pinned"])
        self.deleted[id] = self.live.pop(id)
        self.actions[id].append("delete")
        with pytest.raises(NotFoundError, match="deleted"): self.service.update_model("d", id, meta=7)
        return id

    @rule(target=models, id=consumes(gone))
    def restore(self, id):
        self.service.restore_model("d", id)
        self.live[id] = self.deleted.pop(id)
        self.actions[id].append("restore")
        return id

    @rule(asked=FILTERS, length=st.integers(1, 5), deleted=st.booleans(),
          order=st.sampled_from(["created_at", "-name", "average_ap", "-updated_at", "-trained_at"]))
    def ask(self, asked, order, length, deleted):
        found, cursor, pages = [], None, 0
        while cursor or not pages:
            models, cursor, total = self.service.get_models("d", asked, cursor, length, order, deleted)
            found, pages = found + models, pages + 1
        wanted = {id for id, one in (self.deleted if deleted else self.live).items() if kept(asked, one)}
        assert total == len(found) == len(wanted) and {one.id for one in found} == wanted
        column = order.removeprefix("-")
        values = [getattr(one, column) for one in found]
        low = {"average_ap": -1.0}.get(column, "")
        plain = [low if value is None else value for value in values]
        assert plain == sorted(plain, reverse=order.startswith("-"))

    @invariant()
    def is_the_dict(self):
        if not hasattr(self, "live"): return
        for id, said in self.live.items():
            model = self.service.get_model("d", id)
            assert {key: getattr(model, key) for key in said if key != "slices"} == {
                key: value for key, value in said.items() if key != "slices"}
            assert text(model.meta) == text(said["meta"])
            assert [one.id for one in model.training_slices] == said["slices"]
            assert model.average_ap == pytest.approx(average(said))
            history = self.service.get_history("d", id)
            assert [one.action for one in history] == self.actions[id]
            assert [one.revision for one in history] == [*range(1, model.revision + 1)]
        with self.service.database.transaction() as connection:  # what classes repeat of their models
            both = sa.select(ROWS, MODELS).join(MODELS, ROWS.c.model == MODELS.c.key)
            rows = [row._mapping for row in connection.execute(both)]
        assert all(row[ROWS.c[name]] == row[MODELS.c[name]] for row in rows for name in COPIED)


FEW = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_it_is_a_dict(tmp_path):
    class Here(Registry): url = f"sqlite:///{tmp_path / 'r.db'}"
    Here.TestCase.settings = settings(max_examples=25, stateful_step_count=25, **FEW)
    Here.TestCase().runTest()


def test_it_is_a_dict_on_postgresql(postgres):
    class There(Registry): url = postgres
    There.TestCase.settings = settings(max_examples=6, stateful_step_count=20, **FEW)
    There.TestCase().runTest()


# pages while others write

WRITER = """
import sys
from semid import ModelService
service = ModelService(sys.argv[1], user=sys.argv[2], mirror=None)
print("ready", flush=True)
for n in range(int(sys.argv[3])):
    made = service.create_model("d", f"{sys.argv[2]} {n}", "net", ["train"], meta={"n": n})
    print(made.id, flush=True)
    if n % 3 == 2: service.delete_model("d", made.id)
"""


def writing(url, name, n):
    words = [sys.executable, "-c", WRITER, url, name, str(n)]
    found = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert found.stdout.readline() == "ready\n"
    return found


def rest(running):
    "What `running` prints until it ends; communicate() forgets what readline() had read ahead."
    with running.stdout: found = running.stdout.read()
    running.wait(timeout=60)
    return found


@pytest.mark.parametrize("order", ["created_at", "-created_at", "name"])
def test_each_model_comes_once_while_others_come_and_go(service, url, order):
    old = {service.create_model("d", f"old {n:03}", "net").id for n in range(60)}
    others = writing(url, "new", 60)
    found, cursor = [], None
    while cursor or not found:
        models, cursor, total = service.get_models("d", None, cursor, 3, order)
        assert total >= 60
        found += [model.id for model in models]
    assert rest(others) and others.returncode == 0
    assert len({*found}) == len(found) and old <= {*found}
    assert service.get_models("d")[2] == 60 + 40


def test_two_processes_write_at_once(service, url):
    both = [writing(url, name, 40) for name in ("bob", "eve")]
    ids = [id for one in both for id in rest(one).split()]
    assert [one.returncode for one in both] == [0, 0] and len({*ids}) == 80
    made = [*service.iter_models("d"), *service.iter_models("d", deleted=True)]
    assert {model.id for model in made} == {*ids}
    for name in "bob", "eve": assert sum(model.created_by == name for model in made) == 40
    assert all([one.id for one in model.training_slices] == ["train"] for model in made)


UPDATER = """
import sys
from semid import ModelService, ModelTrainClass
service, n = ModelService(sys.argv[1], mirror=None), 0
print("ready", flush=True)
while True:
    n += 1
    classes = [ModelTrainClass(class_name=str(i), ap=0.5) for i in range(n % 7)]
    service.update_model("d", sys.argv[2], description=str(n % 7), training_classes=classes)
"""


def test_a_model_is_read_as_it_was_at_one_time(service, url):
    model = service.create_model("d", "a", "net", description="0")
    words = [sys.executable, "-c", UPDATER, url, model.id]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        try:
            seen = set()
            for _ in range(300):
                now = service.get_model("d", model.id)
                assert now.description == str(len(now.training_classes))
                (now,), _, _ = service.get_models("d")
                assert now.description == str(len(now.training_classes))
                seen.add(now.revision)
        finally: other.kill()
    assert len(seen) > 3


def test_two_who_want_the_same_id(url, service):
    from concurrent.futures import ThreadPoolExecutor
    def tried(n):
        try: return service.create_model("d", "a", "net", model_id=f"m{n // 4}").id
        except ConflictError: return None
    with ThreadPoolExecutor(4) as pool: made = [*pool.map(tried, range(40))]
    assert sorted(filter(None, made)) == sorted(f"m{n}" for n in range(10))
    assert service.get_models("d")[2] == 10


def test_one_of_two_who_saw_the_same_revision_loses(service, url):
    model = service.create_model("d", "a", "net")
    other = ModelService(url, user="bob", mirror=None)
    other.update_model("d", model.id, meta=1, revision=1)
    with pytest.raises(ConflictError, match="changed by bob"):
        service.update_model("d", model.id, meta=2, revision=1)
    assert service.get_model("d", model.id).meta == 1


# kill -9

@pytest.mark.parametrize("after", [0.0, 0.013, 0.05, 0.11])
def test_a_kill_loses_nothing_that_was_told(service, url, after):
    one = writing(url, "bob", 10_000)
    told = [one.stdout.readline().strip() for _ in range(5)]
    time.sleep(after)
    one.send_signal(signal.SIGKILL)
    told += [line for line in rest(one).split("\n") if len(line) == len(told[0])]
    found = {model.id: model for gone in (False, True) for model in service.iter_models("d", deleted=gone)}
    assert {*told} <= {*found} and len(found) <= len(told) + 1
    for id, model in found.items():  # none is half there
        assert len(model.training_slices) == 1 and set(model.meta) == {"n"}
        history = [change.action for change in service.get_history("d", id)]
        assert history == (["create", "delete"] if model.deleted_at else ["create"])
    assert service.create_model("d", "after", "net").revision == 1
    if url.startswith("sqlite"):
        with sqlite3.connect(sa.make_url(url).database) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# harm

EVIL = ["'; DROP TABLE registry_models; --", '" OR 1=1 --', "%", "_", "\\",
        "a' UNION SELECT value FROM registry_settings --", "../../etc/passwd", "{{7*7}}", "$(touch x)",
        "<script>", "\u202e", "💥" * 60, "a\nb"]


@pytest.mark.parametrize("evil", EVIL)
def test_texts_are_only_texts(service, evil):
    service.create_model("d", "harmless", "net", training_classes=[ModelTrainClass(class_name="a", ap=0.5)])
    classes = [ModelTrainClass(class_name=evil, annotation_type=evil, ap=0.5)]
    made = service.create_model("d", evil, evil, description=evil, training_classes=classes,
                                meta={evil: evil}, training_parameters={evil: [evil]})
    assert service.get_model("d", made.id) == made
    for options in (dict(name=evil), dict(name_contains=evil), dict(baseline_model=evil),
                    dict(meta={evil: evil}), dict(class_ap=[ClassAP(class_name=evil)]),
                    dict(any=[ModelsFilterOptions(name=evil)])):
        models, _, total = service.get_models("d", ModelsFilter(must_filter=ModelsFilterOptions(**options)))
        assert (models, total) == ([made], 1)
        unwanted = ModelsFilter(not_filter=ModelsFilterOptions(**options))
        assert [one.name for one in service.get_models("d", unwanted)[0]] == ["harmless"]
    assert service.get_models("d", ModelsFilter(must_filter=ModelsFilterOptions(id_in=[evil])))[2] == 0
    for call in (lambda: service.get_model("d", evil), lambda: service.get_model(evil, "a"),
                 lambda: service.get_slice("d", evil), lambda: service.create_model("d", "a", "b", [evil])):
        with pytest.raises(NotFoundError): call()
    with pytest.raises(DataError): service.get_models("d", order_by=evil)
    with pytest.raises(DataError): service.get_models("d", cursor=evil)
    with pytest.raises(DataError): service.create_slice("d", f"/{evil}")


def test_a_cursor_is_of_its_registry(service, tmp_path):
    for n in range(3): service.create_model("d", str(n), "net")
    _, cursor, _ = service.get_models("d", length=1)
    other = ModelService(tmp_path / "other.db", mirror=None)
    other.create_dataset("d")
    with pytest.raises(DataError, match="no cursor of this registry"): other.get_models("d", cursor=cursor)
    for at in range(0, len(cursor), 7):
        changed = cursor[:at] + ("A" if cursor[at] != "A" else "B") + cursor[at + 1:]
        with pytest.raises(DataError): service.get_models("d", cursor=changed)


def test_what_can_not_be_a_model_leaves_nothing(service):
    nan = float("nan")
    for bad in (dict(name=""), dict(name="a\0"), dict(name="x" * 256), dict(meta={"a": nan}),
                dict(meta="\ud800"), dict(training_parameters=[1]), dict(description=7),
                dict(trained_at="2026-11-20"),
                dict(is_trained=True, trained_at="soon"), dict(training_classes=[{"class": "a", "ap": nan}]),
                dict(training_classes=[{"class": "a", "ap": 1.01}]), dict(training_slice_ids="train"),
                dict(training_slice_ids=["train", "train"])):
        given = dict(dataset_id="d", name="a", baseline_model="b") | bad
        with pytest.raises(DataError): service.create_model(**given)
    for length in 0, 201, -1, None, 1.0, "5", True:
        with pytest.raises(DataError, match="1 to 200"): service.get_models("d", length=length)
    assert service.get_models("d") == ([], None, 0)
    for dataset in None, "", 7:
        with pytest.raises(DataError, match="dataset_id is required"): service.get_models(dataset)


def test_what_was_read_and_spoilt_is_refused(service):
    car = ModelTrainClass(class_name="car", ap=0.5)
    model = service.create_model("d", "a", "net", training_classes=[car])
    with pytest.raises(ValueError, match="less than or equal to 1"): model.training_classes[0].ap = 7.5
    model.training_classes[0].__dict__["ap"] = 7.5
    with pytest.raises(DataError, match="less than or equal to 1"):
        service.update_model("d", model.id, training_classes=model.training_classes)
    with pytest.raises(DataError, match="2\\^63"): service.update_model("d", model.id, meta={"a": 10**5000})
    with pytest.raises(DataError, match="128"): service.update_model("d", model.id, run_id="x" * 200)
    with pytest.raises(DataError, match="trained_at"):
        service.update_model("d", model.id, is_trained=True, trained_at=None)
    many = ModelsFilter(must_filter=ModelsFilterOptions(meta={str(n): n for n in range(1100)}))
    with pytest.raises(DataError, match="300 conditions"): service.get_models("d", many)
    whole = dict.fromkeys(("name", "name_contains", "baseline_model"), "a") | dict.fromkeys(
        ("is_trained", "is_pinned"), True) | {"average_ap_least": 0.1, "average_ap_most": 0.9}
    for n, part in (60, whole), (20, {"id_in": ["a"] * 1000}), (8, {"id_in": ["a"] * 1000}), (30, whole):
        nested = {"all": [{"any": [part] * (n // 2)}, {"all": [part] * (n // 2)}]}
        asked = ModelsFilter(must_filter=nested, not_filter=None)
        if n * len(part.get("id_in", part)) <= 10_000 and n * len(part) < 280:
            assert service.get_models("d", asked)[2] == 0
        else:
            with pytest.raises(DataError, match="ask in parts"): service.get_models("d", asked)
    for odd in "\ud800", "a\0", {}, 7:
        with pytest.raises((DataError, NotFoundError)): service.create_model("d", "a", "net", [odd])
        with pytest.raises((DataError, NotFoundError)):
            service.create_model("d", "a", "net", model_content_id=odd)
    assert service.get_model("d", model.id).revision == 1


def test_a_password_is_not_told():
    with pytest.raises(SemidError, match=r"registry postgresql\+psycopg://127.0.0.1:1/db can't") as told:
        ModelService("postgresql+psycopg://127.0.0.1:1/db?user=me&password=s3cret")
    assert "s3cret" not in str(told.value)


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "registry.db"
    path.write_text("not a database, but long enough to look like one " * 40)
    with pytest.raises(ValueError, match="no database"): ModelService(path)
    assert path.read_text().startswith("not a database")
    with pytest.raises(ValueError, match="no driver"): ModelService("nosuch://host/db")
