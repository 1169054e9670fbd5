"""Settings: what is accepted, what is refused and in which words. The limits of recorded machines."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from runtime import config, limits

TREES = Path(__file__).parent / "data" / "cgroup"
CAPS = {
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
}


class Index:
    """What numpy's integers are to Python."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


# settings()


def test_defaults():
    found = config.settings()
    assert found == config.Settings(
        max_workers=config.default_workers(),
        threads=1,
        initializer=None,
        initargs=(),
        max_tasks_per_child=None,
        preload=(),
        start_method="exec",
        region_size=4 << 20,
        region_max=None,
        retries=0,
        retry_on=(),
        timeout=None,
        drain_timeout=30.0,
        max_worker_rss=None,
        state_max_items=None,
        state_max_bytes=None,
        forward_logs=True,
        name=None,
    )


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("max_workers", 1, 1),
        ("max_workers", 2000, 2000),
        ("max_workers", Index(3), 3),
        ("threads", 4, 4),
        ("initializer", print, print),
        ("initargs", [1, 2], (1, 2)),
        ("max_tasks_per_child", 1, 1),
        ("preload", "numpy", ("numpy",)),
        ("preload", ["a.b", "c", "a.b"], ("a.b", "c")),
        ("preload", iter(("a",)), ("a",)),
        ("start_method", "fork", "fork"),
        ("region_size", 1 << 16, 1 << 16),
        ("region_size", "1.5 GiB", 3 << 29),
        ("region_max", "4MiB", 4 << 20),
        ("retries", 3, 3),
        ("retry_on", OSError, (OSError,)),
        ("retry_on", (OSError, KeyboardInterrupt), (OSError, KeyboardInterrupt)),
        ("timeout", 5, 5.0),
        ("timeout", 0.001, 0.001),
        ("timeout", Fraction(1, 2), 0.5),
        ("timeout", Decimal("0.5"), 0.5),
        ("timeout", Index(2), 2.0),
        ("drain_timeout", 0, 0.0),
        ("max_worker_rss", "1GiB", 1 << 30),
        ("state_max_items", 10, 10),
        ("state_max_bytes", "1M", 1 << 20),
        ("forward_logs", 0, False),
        ("name", "etl-2.night_run", "etl-2.night_run"),
        ("name", "x" * 64, "x" * 64),
    ],
)
def test_accepts(argument, value, expected):
    found = getattr(config.settings(**{argument: value}), argument)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("max_workers", 0, ValueError, "max_workers must be greater than 0"),
        ("max_workers", -1, ValueError, "max_workers must be greater than 0"),
        ("max_workers", 2001, ValueError, "max_workers must be at most 2,000, not 2,001"),
        ("max_workers", 10_000, ValueError, "2,000"),
        ("max_workers", True, TypeError, "max_workers must be an int, not bool True"),
        ("max_workers", 2.0, TypeError, "max_workers must be an int, not float 2.0"),
        ("max_workers", "2", TypeError, "max_workers must be an int, not str '2'"),
        ("threads", 0, ValueError, "threads must be >= 1"),
        ("threads", 65, ValueError, "threads must be at most 64"),
        ("threads", None, TypeError, "threads must be an int, not NoneType"),
        ("initializer", 3, TypeError, "initializer must be a callable"),
        ("initargs", 3, TypeError, "initargs must be a tuple of arguments, not int 3"),
        ("max_tasks_per_child", 0, ValueError, "max_tasks_per_child must be >= 1"),
        ("max_tasks_per_child", -3, ValueError, "max_tasks_per_child must be >= 1"),
        ("max_tasks_per_child", 1.5, TypeError, "max_tasks_per_child must be an int"),
        ("max_tasks_per_child", True, TypeError, "max_tasks_per_child must be an int"),
        ("max_tasks_per_child", 1 << 40, ValueError, "max_tasks_per_child must be at most"),
        ("preload", 3, TypeError, "preload must be a module name or several, not int 3"),
        ("preload", b"numpy", TypeError, "preload must be a module name or several, not bytes b'numpy'"),
        ("preload", ["os", os], TypeError, "preload must hold module names as str, not module"),
        ("preload", "numpy,scipy", ValueError, "'numpy,scipy' is not a module name"),
        ("preload", "", ValueError, "'' is not a module name"),
        ("preload", [".relative"], ValueError, "'.relative' is not a module name"),
        ("start_method", "spawn", ValueError, """start_method must be "exec" or "fork", not 'spawn'"""),
        ("start_method", None, ValueError, "start_method must be"),
        ("region_size", "4 bananas", ValueError, "region_size: str '4 bananas' is not a size"),
        ("region_size", 0, ValueError, "region_size must be greater than 0"),
        ("region_size", -1, ValueError, "region_size: a size must not be negative: -1"),
        ("region_size", 4.5, TypeError, "region_size: a size must be an int (bytes) or a str"),
        ("region_size", None, TypeError, "region_size: a size must be an int"),
        ("region_size", "65TiB", ValueError, "region_size must be at most 64 TiB"),
        ("region_max", "1MiB", ValueError, "region_max (1,048,576 bytes) must not be less than region_size"),
        ("retries", -1, ValueError, "retries must be >= 0"),
        ("retries", True, TypeError, "retries must be an int"),
        ("retries", 1 << 31, ValueError, "retries must be at most 2,147,483,647"),
        ("retry_on", "OSError", TypeError, "retry_on must be an exception type or a tuple of them, not str"),
        ("retry_on", (OSError, int), TypeError, "retry_on must be an exception type"),
        ("retry_on", None, TypeError, "retry_on must be an exception type"),
        ("retry_on", OSError(), TypeError, "retry_on must be an exception type"),
        ("timeout", 0, ValueError, "timeout must be greater than 0"),
        ("timeout", -1.0, ValueError, "timeout must be greater than 0"),
        ("timeout", float("nan"), ValueError, "not nan; None means no limit"),
        ("timeout", float("inf"), ValueError, "not inf; None means no limit"),
        ("timeout", 10**400, ValueError, "timeout must be greater than 0 and at most 1,000,000,000 s"),
        ("timeout", True, TypeError, "timeout must be a number of seconds, not bool True"),
        ("timeout", "5", TypeError, "timeout must be a number of seconds, not str '5'"),
        ("timeout", 1j, TypeError, "timeout must be a number of seconds, not complex"),
        ("drain_timeout", -1, ValueError, "drain_timeout must be >= 0"),
        ("drain_timeout", float("nan"), ValueError, "drain_timeout must be >= 0"),
        ("drain_timeout", None, TypeError, "drain_timeout must be a number of seconds"),
        ("max_worker_rss", 0, ValueError, "max_worker_rss must be greater than 0"),
        ("state_max_items", 0, ValueError, "state_max_items must be >= 1"),
        ("state_max_bytes", "much", ValueError, "state_max_bytes: str 'much' is not a size"),
        ("name", "", ValueError, "name must be 1 to 64 of"),
        ("name", "x" * 65, ValueError, "name must be 1 to 64 of"),
        ("name", "a/b", ValueError, "name must be 1 to 64 of"),
        ("name", "a\n", ValueError, "name must be 1 to 64 of"),
        ("name", "..", ValueError, "not only dots"),
        ("name", 7, TypeError, "name must be a str, not int 7"),
    ],
)
def test_refuses(argument, value, error, message):
    with pytest.raises(error) as caught:
        config.settings(**{argument: value})
    assert message in str(caught.value)
    assert caught.type is error


def test_exact_words_of_the_standard_library():
    for value in (0, -1):
        with pytest.raises(ValueError, match=r"^max_workers must be greater than 0$"):
            config.settings(value)
    with pytest.raises(TypeError, match=r"^initializer must be a callable$"):
        config.settings(initializer="x")
    with pytest.raises(ValueError, match=r"^max_tasks_per_child must be >= 1$"):
        config.settings(max_tasks_per_child=0)


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        config.settings().max_workers = 5


def test_mp_context_warns_once_in_a_process_and_names_the_caller(monkeypatch):
    monkeypatch.setattr(config, "_mp_context_warned", False)

    def constructor():  # stands for Runtime.__init__, whose caller is to blame
        return config.settings(mp_context=object())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        constructor()
        constructor()
    assert [w.category for w in caught] == [UserWarning]
    assert "mp_context is ignored" in str(caught[0].message)
    assert caught[0].filename == __file__


# override()


def test_override_inherits_what_is_not_said():
    base = config.settings(timeout=5, retries=2, retry_on=OSError)
    assert config.override(base) == config.TaskOptions(5.0, 2, (OSError,), 0)


def test_override_tells_none_from_inherit():
    base = config.settings(timeout=5, retries=2, retry_on=OSError)
    found = config.override(base, timeout=None, retries=0, retry_on=(), priority=-7)
    assert found == config.TaskOptions(None, 0, (), -7)


def test_override_of_an_override():
    first = config.override(config.settings(timeout=5), retries=1)
    assert config.override(first, priority=3) == config.TaskOptions(5.0, 1, (), 3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": 0}, ValueError),
        ({"timeout": True}, TypeError),
        ({"retries": -1}, ValueError),
        ({"retry_on": 3}, TypeError),
        ({"priority": 1.5}, TypeError),
        ({"priority": True}, TypeError),
        ({"priority": 1 << 31}, ValueError),
    ],
)
def test_override_refuses(options, error):
    with pytest.raises(error, match=next(iter(options))):
        config.override(config.settings(), **options)


def test_inherit_is_one_object():
    assert pickle.loads(pickle.dumps(config.INHERIT)) is config.INHERIT
    assert copy.deepcopy(config.INHERIT) is config.INHERIT
    assert repr(config.INHERIT) == "INHERIT"


# parse_size()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (123, 123),
        (Index(5), 5),
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("1K", 1024),
        ("1KiB", 1024),
        ("512KB", 512_000),
        ("4MiB", 4 << 20),
        ("4mib", 4 << 20),
        (" 4 MiB ", 4 << 20),
        ("1.5 GiB", 3 << 29),
        ("2G", 2 << 30),
        ("2GB", 2_000_000_000),
        ("0.5T", 1 << 39),
        ("1.0001K", 1024),
        ("18446744073709551615", 2**64 - 1),
    ],
)
def test_parse_size(text, size):
    assert config.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "-1MiB",
        "1.",
        ".5G",
        "1e6",
        "0x10",
        "1_000",
        "4 MiB extra",
        "4Q",
        "٤",
        "9" * 21,
        "nan",
    ],
)
def test_parse_size_refuses_text(text):
    with pytest.raises(ValueError, match="is not a size: write a number of bytes or, for example"):
        config.parse_size(text)


@pytest.mark.parametrize("value", [None, 1.5, True, b"4MiB", [4]])
def test_parse_size_refuses_types(value):
    with pytest.raises(TypeError, match=r"a size must be an int \(bytes\) or a str"):
        config.parse_size(value)


# The machine


def planted(name: str, folder: Path) -> str:
    """Lays a recorded tree out below `folder`."""
    file = None
    for line in (TREES / f"{name}.txt").read_text().splitlines(keepends=True):
        if line.startswith("== "):
            file = folder / line[3:].strip()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        else:
            with file.open("a") as out:
                out.write(line)
    return str(folder)


@pytest.mark.parametrize(
    ("tree", "cpus", "memory"),
    [
        ("v2-container", 1.5, 512 << 20),
        ("v2-nested", 2.0, 2 << 30),
        ("v2-unlimited", None, None),
        ("v2-mounted-above", 2.5, 1 << 30),
        ("v2-other-group", 4.0, None),
        ("v2-outside-namespace", None, None),
        ("v2-deleted", 3.0, 3 << 30),
        ("v1-container", 0.5, 1 << 30),
        ("v1-nested", 2.5, 256 << 20),
        ("v1-unlimited", None, None),
        ("hybrid", 3.5, 768 << 20),
        ("escaped", 1.2, 64 << 20),
        ("garbage", None, None),
        ("zero", 0.01, 0),
    ],
)
def test_cgroup_trees(tree, cpus, memory, tmp_path):
    root = planted(tree, tmp_path)
    assert config.cpu_quota(root) == cpus
    assert config.memory_limit(root) == memory


def test_every_recorded_tree_is_tested():
    (mark,) = test_cgroup_trees.pytestmark
    assert {case[0] for case in mark.args[1]} == {file.stem for file in TREES.glob("*.txt")}


def test_no_proc_at_all(tmp_path):
    assert config.cpu_quota(str(tmp_path)) is None
    assert config.memory_limit(str(tmp_path)) is None
    assert config.memory_total(str(tmp_path)) is None


def test_quota_of_another_process(tmp_path):
    root = planted("v2-container", tmp_path)
    (tmp_path / "proc" / "self").rename(tmp_path / "proc" / "41")
    assert config.cpu_quota(root) is None
    assert config.cpu_quota(root, pid=41) == 1.5


@pytest.mark.parametrize(
    ("tree", "affinity", "cpus"),
    [
        ("v2-container", 8, 2),  # 1.5 is rounded up
        ("v2-container", 1, 1),
        ("v2-nested", 8, 2),
        ("v2-unlimited", 8, 8),
        ("v1-container", 8, 1),
        ("v1-nested", 8, 3),
        ("zero", 8, 1),  # 0.01 of a CPU
    ],
)
def test_available_cpus(tree, affinity, cpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    assert limits.available_cpus(planted(tree, tmp_path)) == cpus


def test_affinity_of_this_process_counts():
    assert 1 <= config.default_workers() <= len(os.sched_getaffinity(0))


def test_default_workers_respect_the_limit(monkeypatch):
    monkeypatch.setattr(config, "available_cpus", lambda: 4096)
    assert config.default_workers() == config.MAX_WORKERS
    assert config.settings().max_workers == config.MAX_WORKERS


def test_a_worker_has_one_worker_by_default(monkeypatch):
    monkeypatch.setattr(config, "available_cpus", lambda: 8)
    monkeypatch.setattr(limits, "in_worker", True)
    assert config.default_workers() == 1
    assert config.settings().max_workers == 1
    assert config.settings(3).max_workers == 3


@pytest.mark.parametrize(
    ("tree", "size"),
    [
        ("v2-container", 256 << 20),
        ("v2-unlimited", 8_000_000 * 512),
        ("v2-nested", 1 << 30),
        ("v1-unlimited", 4_000_000 * 512),
        ("garbage", 1 << 45),  # nothing is known: only the address space limits it
    ],
)
def test_default_region_max(tree, size, tmp_path):
    assert config.default_region_max(planted(tree, tmp_path)) == size


# thread_caps()


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr(config, "available_cpus", lambda: 8)
    for name in CAPS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("workers", "share"), [(1, "8"), (2, "4"), (3, "2"), (8, "1"), (20, "1")])
def test_thread_caps_share_the_cpus(eight, workers, share):
    assert config.thread_caps(workers) == dict.fromkeys(CAPS, share)


def test_thread_caps_leave_what_the_user_set(eight, monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "")  # set to nothing is not set
    assert config.thread_caps(2) == dict.fromkeys(CAPS - {"MKL_NUM_THREADS"}, "4")


def test_thread_caps_do_not_overrule_the_users_omp_setting(eight, monkeypatch):
    # OpenBLAS, MKL, BLIS and numexpr take their own variable before OMP_NUM_THREADS.
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert config.thread_caps(2) == {"VECLIB_MAXIMUM_THREADS": "4", "NUMBA_NUM_THREADS": "4"}


def test_import_is_cheap():
    heavy = ("psutil", "numpy", "rich", "asyncio", "multiprocessing", "zmq", "cloudpickle")
    # Without the package's __init__: only what this floor needs itself.
    code = (
        "import sys, types; package = types.ModuleType('runtime'); package.__path__ = sys.argv[1:2]\n"
        "sys.modules['runtime'] = package\n"
        "import runtime.config\n"
        "print([name for name in sys.argv[2:] if name in sys.modules])"
    )
    folder = os.path.dirname(config.__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, folder, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
