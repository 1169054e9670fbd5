"""Log records and warnings of tasks, replayed in the host; and what comes when they are malformed."""

from __future__ import annotations

import importlib
import json
import logging
import os
import socket
import sys
import threading
import warnings

import evil
import pytest
from watching import all_ready, output

import runtime
from runtime import channels, logrecords, relay
from runtime.wire import WireError

# ---- what tasks do -------------------------------------------------------------------------------


class Own(UserWarning):
    """A category that the host has, too."""


def log_one(level, text, *args, name="some.module", **kwargs):
    logging.getLogger(name).log(level, text, *args, **kwargs)
    return runtime.current().task


def log_exception():
    try:
        raise evil.Refused("deep inside")
    except evil.Refused:
        logging.getLogger("some.module").exception("it went wrong")


def log_many(count):
    logger = logging.getLogger("some.module")
    for i in range(count):
        logger.warning("%d", i)


def log_in_thread():
    thread = threading.Thread(target=log_one, args=(logging.WARNING, "from a thread"), name="a thread")
    thread.start()
    thread.join()


def warn(text, category=UserWarning):
    warnings.warn(text, category, stacklevel=1)


def set_levels():
    logging.getLogger("loud").setLevel(logging.DEBUG)
    logging.getLogger("quiet").setLevel(logging.ERROR)
    for name in ("loud", "quiet"):
        logging.getLogger(name).info("info")
        logging.getLogger(name).error("error")


def own_handlers():
    logging.basicConfig(level=logging.INFO, format="own: %(message)s")
    logging.getLogger("some.module").info("once")


def fork_and_log():
    pid = os.fork()
    if pid == 0:
        logging.getLogger("some.module").warning("from a child")
        os._exit(0)
    os.waitpid(pid, 0)


class BadText:
    def __str__(self):
        raise evil.Refused("no text")


@pytest.fixture
def messages(caplog):
    """What came out of these calls, each (fn, *args), in a Runtime that has ended."""

    def run(*calls, **options):
        with runtime.Runtime(1, **options) as rt:
            for future in [rt.submit(*call) for call in calls]:
                assert future.exception(30) is None
        return [record for record in caplog.records if record.name != "runtime"]

    return run


# ---- records -------------------------------------------------------------------------------------


def test_a_record_is_the_same_in_the_host(caplog):
    with runtime.Runtime(1) as rt:
        pid = all_ready(rt)[0]
        task = rt.submit(log_one, logging.WARNING, "%s and %d", "text", 3, stack_info=True).result(30)
    (record,) = caplog.records
    assert (record.name, record.levelno, record.levelname) == ("some.module", logging.WARNING, "WARNING")
    assert record.getMessage() == "text and 3"
    assert (record.worker, record.task, record.process) == (0, task, pid)
    assert (record.processName, record.threadName) == ("worker-0", "MainThread")
    assert record.pathname == __file__ and record.filename == "test_logs.py"
    assert record.funcName == "log_one"
    assert record.lineno == log_one.__code__.co_firstlineno + 1
    assert "log_one" in record.stack_info
    assert abs(record.created - __import__("time").time()) < 60


def test_percent_signs_are_no_format_any_more(messages):
    assert [record.getMessage() for record in messages((log_one, 30, "100 %d %%"))] == ["100 %d %%"]


def test_an_exception_brings_its_traceback(messages, caplog):
    (record,) = messages((log_exception,))
    assert record.exc_info is None
    assert "Refused: deep inside" in record.exc_text and "in log_exception" in record.exc_text
    assert "Refused: deep inside" in caplog.text


def test_extra_attributes(messages):
    extra = {"user": "é\ud800", "n": 3, "x": 0.5, "on": True, "no": None, "list": [1], "huge": 1 << 70}
    (record,) = messages((log_with, extra))
    got = {key: getattr(record, key) for key in extra if hasattr(record, key)}
    assert got == {"user": "é\ud800", "n": 3, "x": 0.5, "on": True, "no": None}


def log_with(extra):
    logging.getLogger("some.module").warning("with", extra=extra)


def test_from_an_initializer_a_thread_and_a_forked_child(messages):
    found = messages(
        (log_in_thread,), (fork_and_log,), initializer=log_one_at_start, initargs=("at the start",)
    )
    assert [(r.getMessage(), r.threadName) for r in found] == [
        ("at the start", "MainThread"),
        ("from a thread", "a thread"),
        ("from a child", "MainThread"),
    ]
    assert found[0].task is None


def log_one_at_start(text):
    logging.getLogger("some.module").warning(text)


def test_a_flood_arrives_whole_and_in_order(messages):
    found = messages((log_many, 20_000))
    assert [record.getMessage() for record in found] == [str(i) for i in range(20_000)]


def test_what_was_logged_before_a_death(caplog):
    with runtime.Runtime(1) as rt:
        assert type(rt.submit(log_and_die).exception(30)) is runtime.WorkerDied
    assert [r.getMessage() for r in caplog.records if r.name == "some.module"] == [str(i) for i in range(500)]


def log_and_die():
    log_many(500)
    evil.misbehave("kill")


def test_a_long_text_is_cut(messages):
    plain, escaped = messages((log_one, 30, "x" * 10_000_000), (log_one, 30, "é" * 10_000_000))
    assert plain.getMessage().startswith("x" * 40_000) and "more characters" in plain.getMessage()
    assert escaped.getMessage().startswith("é" * 1000) and "more characters" in escaped.getMessage()


def test_a_message_that_cannot_be_formatted_is_reported_where_it_was_logged(capsys):
    with runtime.Runtime(1) as rt:
        assert rt.submit(log_one, 30, "%d", "x").exception(30) is None
        assert rt.submit(log_bad_text).exception(30) is None
    err = capsys.readouterr().err
    assert "--- Logging error ---" in err and "no text" in err


def log_bad_text():
    logging.getLogger("some.module").warning(BadText())


# ---- levels and handlers -------------------------------------------------------------------------


def test_the_level_of_the_hosts_root_decides(messages, caplog):
    caplog.set_level(logging.INFO)
    found = messages((log_one, logging.DEBUG, "debug"), (log_one, logging.INFO, "info"))
    assert [record.getMessage() for record in found] == ["info"]


def test_a_worker_sends_nothing_in_vain(rt):
    def enabled():
        return [logging.getLogger("x.y").isEnabledFor(n) for n in (logging.INFO, logging.WARNING)]

    assert rt.submit(enabled).result(30) == [False, True]


def test_levels_of_the_hosts_loggers(messages, caplog):
    caplog.set_level(logging.DEBUG, logger="some")
    found = messages((log_one, logging.DEBUG, "below"), (log_elsewhere, logging.DEBUG))
    assert [record.getMessage() for record in found] == ["below"]


def log_elsewhere(level):
    logging.getLogger("other").log(level, "elsewhere")


def test_levels_that_a_task_sets(messages, caplog):
    found = messages((set_levels,))
    # The host's own configuration has the last word: its root does not take the info.
    assert [(r.name, r.getMessage()) for r in found] == [("loud", "error"), ("quiet", "error")]
    caplog.clear()
    caplog.set_level(logging.DEBUG, logger="loud")
    found = messages((set_levels,))
    assert [(r.name, r.getMessage()) for r in found][:2] == [("loud", "info"), ("loud", "error")]


def test_what_a_task_shows_by_itself_is_not_sent_twice(messages, capsys, caplog):
    caplog.set_level(logging.INFO)
    assert messages((own_handlers,)) == []
    assert capsys.readouterr().err == "own: once\n"


def test_names_from_workers_make_no_loggers_here(messages):
    name = "never.seen.before"
    (record,) = messages((log_named, name))
    assert record.name == name
    assert not {"never", "never.seen", name} & logging.Logger.manager.loggerDict.keys()


def log_named(name):
    logging.getLogger(name).warning("x")


def test_a_handler_of_the_host_that_raises_stops_nothing(rt):
    class Raises(logging.Handler):
        def emit(self, record):
            raise SystemExit(record.getMessage())

    handler = Raises()
    logging.getLogger("some.module").addHandler(handler)
    try:
        assert rt.submit(log_many, 100).exception(30) is None
        assert rt.submit(evil.square, 3).result(30) == 9
        rt.shutdown()
        assert rt._core.relay.refused == 100
    finally:
        logging.getLogger("some.module").removeHandler(handler)
        del logging.Logger.manager.loggerDict["some.module"]


def test_forward_logs_false(messages, capsys, recwarn):
    assert messages((log_one, 30, "a text"), (warn, "a warning"), forward_logs=False) == []
    err = capsys.readouterr().err
    assert "a text\n" in err and "UserWarning: a warning\n" in err, "as in any process: on its stderr"
    assert len(recwarn) == 0


def test_without_any_configuration_a_warning_shows_once():
    code = """if True:
        import sys, logging, runtime, test_logs
        sys.stderr = sys.stdout
        with runtime.Runtime(2) as rt:
            rt.submit(test_logs.log_one, 30, "shown").result()
            rt.submit(test_logs.log_one, 20, "hidden").result()
    """
    assert output(code) == ["shown"]


# ---- warnings ------------------------------------------------------------------------------------


def test_a_warning_is_one_of_the_host():
    with pytest.warns(Own, match="^mine$") as caught, runtime.Runtime(1) as rt:
        rt.submit(warn, "mine", Own).result(30)
    (one,) = caught
    assert (one.filename, one.lineno) == (__file__, warn.__code__.co_firstlineno + 1)


@pytest.mark.parametrize("category", [DeprecationWarning, RuntimeWarning, UserWarning])
def test_builtin_categories(category):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with runtime.Runtime(1) as rt:
            rt.submit(warn, "text", category).result(30)
    assert [(w.category, str(w.message)) for w in caught] == [(category, "text")]


def test_a_category_that_the_host_does_not_have():
    def own_category():
        class Foreign(UserWarning):
            pass

        warnings.warn("text", Foreign, stacklevel=1)

    with pytest.warns(UserWarning, match="^text$") as caught, runtime.Runtime(1) as rt:
        rt.submit(own_category).result(30)
    assert [w.category for w in caught] == [UserWarning]


def test_filters_of_the_worker_decide_first():
    def ignoring():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.warn("ignored", stacklevel=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn("recorded", stacklevel=1)
        return [str(w.message) for w in caught]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with runtime.Runtime(1) as rt:
            assert rt.submit(ignoring).result(30) == ["recorded"]
    assert caught == []


@pytest.fixture
def late(tmp_path, monkeypatch):
    """A module with a category of its own, that the host has imported and nobody else."""
    text = "class Late(UserWarning): pass\ndef warn(): warnings.warn('late', Late, stacklevel=1)\n"
    (tmp_path / "has_a_category.py").write_text(f"import warnings\n{text}")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("has_a_category")
    del sys.modules["has_a_category"]


def test_no_module_is_imported_for_a_filter(late):
    """numpy makes one for a category of its own, and would come with threads and 20 MB."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", late.Late)
        with runtime.Runtime(1) as rt:
            assert not rt.submit(lambda: "has_a_category" in sys.modules).result(30)


@pytest.mark.parametrize("preload", [(), ("has_a_category",)])
@pytest.mark.parametrize("action", ["error", "ignore", "always"])
def test_filters_of_a_category_that_comes_late(late, action, preload):
    """They hold as soon as the module is imported, by a task, too; in the order of the host."""

    def warn_late():
        import has_a_category

        has_a_category.warn()
        return [f[0] for f in warnings.filters if issubclass(f[2], UserWarning)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        warnings.simplefilter("default", UserWarning)
        warnings.simplefilter(action, late.Late)
        warnings.simplefilter("once", UnicodeWarning)
        with runtime.Runtime(1, preload=preload) as rt:
            future = rt.submit(warn_late)
            if action == "error":
                assert type(future.exception(30)).__name__ == "Late"
            else:
                assert future.result(30) == [action, "default"]
                assert rt.submit(warn_late).result(30) == [action, "default"]
    assert {str(w.message) for w in caught} == ({"late"} if action == "always" else set())


def test_filters_of_the_host_decide_next():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with runtime.Runtime(1) as rt:
            all_ready(rt)
            warnings.simplefilter("ignore", RuntimeWarning)
            rt.submit(warn, "ignored", RuntimeWarning).result(30)
            rt.submit(warn, "seen", UserWarning).result(30)
    assert [str(w.message) for w in caught] == ["seen"]


def test_an_error_filter_of_the_host_only_shows_it(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with runtime.Runtime(1) as rt:
            all_ready(rt)
            warnings.simplefilter("error")
            warnings.showwarning = lambda message, *rest, **_: print("shown:", message)
            assert rt.submit(warn, "late").exception(30) is None
    assert capsys.readouterr().out == "shown: late\n"


def test_the_same_place_is_shown_once_for_all_workers():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with runtime.Runtime(2) as rt:
            list(rt.map(warn, ["the same"] * 50, chunksize=1))
    assert [str(w.message) for w in caught] == ["the same"]


def test_captured_warnings_are_records(messages, caplog):
    def captured():
        logging.captureWarnings(True)
        warnings.warn("as a record", stacklevel=1)

    (record,) = messages((captured,))
    assert record.name == "py.warnings" and "as a record" in record.getMessage()


# ---- the codec -----------------------------------------------------------------------------------


def record_of(text="text", **extra):
    return logging.makeLogRecord({"name": "a.b", "levelno": 30, "levelname": "WARNING", "msg": text, **extra})


def changed(**fields):
    message = json.loads(logrecords.encode_log(record_of(), 1, 2))
    message["fields"].update(fields)
    return json.dumps(message).encode()


def test_round_trip():
    got = logrecords.decode(logrecords.encode_log(record_of(color="red"), 1, None))
    assert (got.getMessage(), got.color, got.worker, got.task) == ("text", "red", 1, None)
    warning = logrecords.decode(logrecords.encode_warning("text", Own, "f.py", 3))
    assert [getattr(warning, name) for name in ("text", "home", "category", "filename", "lineno")] == [
        "text", Own.__module__, "Own", "f.py", 3,
    ]  # fmt: skip


def test_a_record_made_by_hand():
    odd = logging.makeLogRecord({"msg": "odd", "name": None, "lineno": None, "created": 5, "levelno": "x"})
    got = logrecords.decode(logrecords.encode_log(odd, 0, None))
    assert (got.getMessage(), got.lineno, got.levelno) == ("odd", 0, 0)


MALFORMED = [
    b"\0",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b'{"what": "log"}',
    b'{"what": "log", "fields": {}, "extras": {}}',
    b'{"what": "log", "fields": [], "extras": []}',
    b'{"what": "warning", "fields": {"text": 3}, "extras": {}}',
    b"\xff\xfe",
    b"[" * 100_000,
    b"1" * 100_000,
    changed(levelno="30"),
    changed(levelno=True),
    changed(levelno=1 << 80),
    changed(name=None),
    changed(msg=["x"]),
    changed(lineno=1.5),
    changed(unknown=1),
    changed().replace(b'"extras": {}', b'"extras": {"args": 1}'),
    changed().replace(b'"extras": {}', b'"extras": {"x": [1]}'),
    changed().replace(b'"extras": {}', b'"extras": {"worker": 9}'),
    b"cos\nsystem\n(S'touch /nothing'\ntR.",
]


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_messages_are_refused(data):
    with pytest.raises(WireError):
        logrecords.decode(data)


def test_malformed_messages_are_counted_and_dropped(caplog):
    made = channels.Channels()
    fds = [os.dup(fd) for fd in made.host]
    worker = socket.socket(fileno=os.dup(made._worker[2]))
    made.close()
    one, ends = relay.Relay(), channels.HostEnds(0, fds)
    thread = threading.Thread(target=one.run)
    thread.start()
    one.begin(ends)
    for data in MALFORMED:
        worker.send(data)
    worker.send(logrecords.encode_log(record_of("good"), 0, None))
    one.end(ends)
    one.finish(thread)
    worker.close()
    os.close(ends.stack)
    assert one.malformed == len(MALFORMED)
    assert [record.getMessage() for record in caplog.records] == ["good"]


def test_a_task_that_forges_a_category_imports_nothing():
    def category(home, name):
        return relay._category(logrecords.RemoteWarning("text", home, name, "f.py", 1))

    assert category("antigravity", "Whatever") is UserWarning
    assert "antigravity" not in sys.modules
    for home, name in (("os", "system"), ("builtins", "dict"), ("builtins", "Warning.__class__"), ("", "")):
        assert category(home, name) is UserWarning
    assert category("builtins", "FutureWarning") is FutureWarning
