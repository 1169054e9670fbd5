"""What crosses between processes: by reference, by value, with buffers outside, and what goes wrong with it.

The receiving side is a fresh interpreter that does nothing but load and call (`Peer`). The sender's
`__main__` is played by modules made of source text that no import can find (`script`), and twice by a
real script.
"""

from __future__ import annotations

import builtins
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import math
import multiprocessing
import operator
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import threading
import traceback
import types
import weakref

import pytest
from handlers import strike_everywhere
from watching import run_script

from runtime import serializer, versions
from runtime.errors import RemoteError, WorkerDied
from runtime.serializer import FunctionCache, FunctionTable, pack_call, unpack_call

np = pytest.importorskip("numpy")

BIG = serializer.OUT_OF_BAND_MIN


# ------------------------------------------------------------------------------------- the peer

PEER = """
import os, pickle, struct, sys
from runtime import serializer
out, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
cache = serializer.FunctionCache()
while head := sys.stdin.buffer.read(8):
    fn_id, fn_data, data, buffers = pickle.loads(sys.stdin.buffer.read(*struct.unpack("<Q", head)))
    try:
        fn, args, kwargs = serializer.unpack_call(cache, fn_id, fn_data, data, buffers)
        answer = True, serializer.dumps(fn(*args, **kwargs))
        fn = args = kwargs = None
    except BaseException as error:
        answer = False, serializer.dump_exception(error)
    raw = pickle.dumps((answer[0], answer[1].joined(), [bytearray(b) for b in answer[1].buffers]))
    out.write(struct.pack("<Q", len(raw)) + raw)
    out.flush()
"""


class Peer:
    """A fresh interpreter in the role of a worker. `submit` packs now, `run` makes it run what was packed."""

    def __init__(self, **env: str) -> None:
        paths = [p for p in sys.path if p]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PEER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | env,
        )
        self.table = FunctionTable()
        self._known: set[int] = set()

    def submit(self, fn, *args, **kwargs):
        return pack_call(self.table, fn, args, kwargs)

    def run(self, call):
        ref, payload = call
        data = None if ref.id in self._known else ref.data
        self._known.add(ref.id)
        raw = pickle.dumps((ref.id, data, payload.joined(), [bytearray(b) for b in payload.buffers]))
        self._process.stdin.write(struct.pack("<Q", len(raw)) + raw)
        self._process.stdin.flush()
        (size,) = struct.unpack("<Q", self._process.stdout.read(8))
        done, data, buffers = pickle.loads(self._process.stdout.read(size))
        if not done:
            raise serializer.load_exception(data, buffers)
        return serializer.loads(data, buffers)

    def __call__(self, fn, *args, **kwargs):
        return self.run(self.submit(fn, *args, **kwargs))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture
def fresh_peer():
    it = Peer()
    yield it
    it.close()


@pytest.fixture(scope="module")
def peer():
    """One for all: their modules have different names, so the tests do not see each other."""
    it = Peer()
    yield it
    it.close()


_names = itertools.count()


@pytest.fixture
def script():
    """Makes a module that cannot be imported elsewhere, like __main__, from source text."""
    made = []

    def make(source: str) -> types.ModuleType:
        module = types.ModuleType(f"script_{next(_names)}")
        sys.modules[module.__name__] = module
        made.append(module.__name__)
        exec(compile(textwrap.dedent(source), f"<{module.__name__}>", "exec"), module.__dict__)
        return module

    yield make
    for name in made:
        sys.modules.pop(name, None)


def there_and_back(obj):
    payload = serializer.dumps(obj)
    return serializer.loads(payload.joined(), [bytearray(b) for b in payload.buffers])


# importable things of this module


def add(a, b=0, *, c=0):
    return a + b + c


class Account:
    def __init__(self, balance=0):
        self.balance = balance

    def deposit(self, n):
        self.balance += n
        return self.balance

    @classmethod
    def named(cls, n):
        return cls(n).balance

    @staticmethod
    def double(n):
        return 2 * n

    def __call__(self, n):
        return self.balance + n


@functools.lru_cache
def cached(n):
    return n + 1


_setting = None


def set_setting(value):
    global _setting
    _setting = value


# ------------------------------------------------------------------------------------- payloads


@pytest.mark.parametrize(
    "obj", [None, 1, "x", (1, [2, {3: {4}}]), b"", b"x" * 100_000, Account, print, 1e300]
)
def test_ordinary_objects_survive(obj):
    assert there_and_back(obj) == obj
    payload = serializer.dumps(obj)
    assert payload.buffers == payload.readonly == ()
    assert payload.nbytes == len(payload.joined())


def test_import_is_cheap():
    code = (
        "import sys; import runtime.serializer; "
        "print(sorted({'numpy', 'multiprocessing', 'cloudpickle', 'hashlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])},
    )
    assert done.stdout.strip() == "[]"


def test_large_buffers_stay_outside():
    array = np.arange(BIG, dtype="u1").reshape(-1, 64)
    payload = serializer.dumps({"a": array, "small": array[0].copy()})
    (view,) = payload.buffers
    assert (view.nbytes, view.format, view.ndim, view.contiguous) == (BIG, "B", 1, True)
    assert payload.readonly == (False,)
    assert payload.nbytes == len(payload.data) + BIG
    assert len(payload.data) < 1000
    again = serializer.loads(payload.joined(), payload.buffers)
    assert (again["a"] == array).all()
    assert np.shares_memory(again["a"], array)


@pytest.mark.parametrize("nbytes, outside", [(0, 0), (1, 0), (BIG - 1, 0), (BIG, 1), (BIG + 1, 1)])
def test_threshold(nbytes, outside):
    array = np.zeros(nbytes, "u1")
    payload = serializer.dumps(array)
    assert len(payload.buffers) == outside
    assert (serializer.loads(payload.joined(), payload.buffers) == array).all()


@pytest.mark.parametrize("order, outside", [("C", 1), ("F", 1), ("strided", 0)])
def test_memory_layouts(order, outside):
    array = np.arange(2 * BIG, dtype="f8").reshape(4, -1)
    array = array[:, ::2] if order == "strided" else np.asarray(array, order=order)
    payload = serializer.dumps(array)
    again = serializer.loads(payload.joined(), payload.buffers)
    assert (again == array).all()
    assert len(payload.buffers) == outside or order == "strided"  # numpy copies a strided one first
    assert again.flags.f_contiguous == array.flags.f_contiguous or order == "strided"


def test_writable_follows_the_buffer_given():
    array = np.zeros(BIG, "u1")
    payload = serializer.dumps(array)
    assert serializer.loads(payload.joined(), [bytearray(BIG)]).flags.writeable
    assert not serializer.loads(payload.joined(), [memoryview(bytearray(BIG)).toreadonly()]).flags.writeable


def test_readonly_is_told():
    array = np.zeros(BIG, "u1")
    array.flags.writeable = False
    payload = serializer.dumps([array, np.ones(BIG)])
    assert payload.readonly == (True, False)
    locked, free = serializer.loads(payload.joined(), [bytearray(b) for b in payload.buffers])
    assert not locked.flags.writeable
    assert free.flags.writeable


def test_frozen_does_not_see_later_changes():
    array = np.zeros(BIG, "u1")
    live, frozen = serializer.dumps((array,)), serializer.dumps_frozen((array,))
    array[:] = 7
    assert serializer.loads(live.data, live.buffers)[0][0] == 7
    assert serializer.loads(frozen.data, frozen.buffers)[0][0] == 0
    assert frozen.readonly == (False,)


def test_frozen_by_value_too(script):
    mod = script("class Box:\n    def __init__(self, a): self.a = a")
    array = np.zeros(BIG, "u1")
    frozen = serializer.dumps_frozen((mod.Box(array), array))
    assert [b.nbytes for b in frozen.buffers] == [BIG]  # the same array twice is one buffer
    array[:] = 7
    box, again = serializer.loads(frozen.data, [bytearray(b) for b in frozen.buffers])
    assert again[0] == 0
    assert box.a is again
    assert again.flags.writeable


def test_wrong_number_of_buffers():
    payload = serializer.dumps(np.zeros(BIG))
    with pytest.raises(pickle.UnpicklingError):
        serializer.loads(payload.data)


@pytest.mark.parametrize("data", [b"", b"\x80", b"junk", b"\x80\x05", b"\x80\x05."])
def test_damaged_data(data):
    with pytest.raises((pickle.UnpicklingError, EOFError, IndexError, ValueError)):
        serializer.loads(data)


# ------------------------------------------------------------- what cannot be pickled, arguments


class Raises:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        TypeError("a Runtime cannot be pickled"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        MemoryError("big"),
        AttributeError("mine"),
        pickle.PicklingError("mine too"),
    ],
)
def test_errors_of_the_object_come_through(error):
    with pytest.raises(type(error)) as info:
        serializer.dumps([Raises(error)])
    assert info.value is error


class Deep:
    def __reduce__(self):
        return Deep, (Deep(),)


def test_endless_recursion():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for obj in (Deep(), deep):
        with pytest.raises((RecursionError, pickle.PicklingError)):
            serializer.dumps(obj)
    while deep:
        deep = deep.pop()


def test_the_informative_error_is_raised():
    lock = threading.Lock()
    with pytest.raises(TypeError, match="lock") as info:
        serializer.dumps(lambda: lock)
    assert any("rt.state.lock" in note for note in info.value.__notes__)
    assert info.value.__cause__ is not None  # what C pickle said about the lambda


@pytest.mark.parametrize("make", ["Lock", "RLock", "Queue", "Event", "Semaphore"])
@pytest.mark.parametrize("wrap", [False, True])
def test_multiprocessing_objects_name_the_cure(make, wrap):
    thing = getattr(multiprocessing.get_context("spawn"), make)()
    obj = (thing, lambda: 1) if wrap else thing
    with pytest.raises(TypeError, match=re.escape("rt.state.lock")):
        serializer.dumps_frozen((obj,))
    if make == "Queue":
        thing.close()
        thing.join_thread()


@pytest.mark.parametrize(
    "thing", [(i for i in ()), threading.local(), sys._getframe()], ids=["generator", "local", "frame"]
)
def test_other_unpicklables(thing):
    with pytest.raises((TypeError, pickle.PicklingError)):
        serializer.dumps(thing)


def test_unpicklable_global_is_named(script):
    mod = script("import threading\ndb = threading.Lock()\ndef f(): return db")
    with pytest.raises(TypeError) as info:
        FunctionTable().ref(mod.f)
    notes = " ".join(info.value.__notes__)
    assert "'db'" in notes
    assert "f cannot be sent" in notes


def test_module_that_the_receiver_lacks(peer, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def f(): return 1\nclass C: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    for call in (lambda: peer(only_here.f), lambda: peer(add, only_here.C())):
        with pytest.raises(ModuleNotFoundError, match="only_here") as info:
            call()
        assert "sys.path" in info.value.__notes__[0]
    sys.modules.pop("only_here")


def test_name_that_the_receiver_lacks(peer, monkeypatch):
    late = types.FunctionType(add.__code__, globals(), "late")
    late.__qualname__ = "late"
    monkeypatch.setattr(sys.modules[__name__], "late", late, raising=False)
    with pytest.raises(AttributeError) as info:
        peer(late, 1)
    assert "no such name" in info.value.__notes__[0]


# ------------------------------------------------------------------------------- by reference


@pytest.mark.parametrize(
    "fn",
    [
        add,
        len,
        math.sin,
        os.getpid,
        Account,
        int,
        cached,
        Account.double,
        Account.deposit,
        os.path.join,
        contextlib.contextmanager,
    ],
)
def test_importable_goes_by_reference(fn):
    table = FunctionTable()
    ref = table.ref(fn)
    assert not ref.by_value
    assert len(ref.data) < 200
    assert table.ref(fn) is ref
    assert pickle.loads(ref.data) is fn
    assert pack_call(table, fn, (1,))[0] is ref


def test_calls(peer):
    assert peer(add, 1) == 1
    assert peer(add, 1, 2, c=3) == 6
    assert peer(len, "abc") == 3
    assert peer(Account, 5).balance == 5
    assert peer(Account(5).deposit, 2) == 7
    assert peer(Account.named, 4) == 4
    assert peer(Account(5), 1) == 6
    assert peer(cached, 1) == 2
    assert peer(functools.partial(add, 1, c=2), 3) == 6
    assert peer(functools.partial(functools.partial(add, 1), 2), c=3) == 6
    assert peer(functools.partial(Account(1).deposit, 2)) == 3
    assert peer(types.MethodType(functools.partial(add, 1), 2)) == 3
    assert peer([3, 1, 2].index, 2) == 2
    assert peer(str.upper, "a") == "A"
    assert peer(operator.itemgetter(1), "abc") == "b"
    assert peer(np.add, 1, 2) == 3
    with pytest.raises(TypeError, match="not callable"):
        peer(5)


def test_bound_arguments_travel_per_call(peer):
    account = Account(1)
    first = peer.submit(account.deposit, 1)
    account.balance = 10
    second = peer.submit(account.deposit, 1)
    assert first[0] is second[0]
    assert (peer.run(first), peer.run(second)) == (2, 11)
    base = [1]
    one = peer.submit(functools.partial(operator.add, base), [9])
    base.append(2)
    two = peer.submit(functools.partial(operator.add, base), [9])
    assert one[0] is two[0]
    assert (peer.run(one), peer.run(two)) == ([1, 9], [1, 2, 9])


def test_names_for_messages():
    table = FunctionTable()
    assert pack_call(table, Account().deposit, ())[0].name == "Account.deposit"
    assert pack_call(table, functools.partial(add, 1), ())[0].name == "add"
    assert pack_call(table, Account(), ())[0].name == "Account"
    assert pack_call(table, lambda: 1, ())[0].name.endswith("<lambda>")
    assert "add" in repr(table.ref(add))


def test_split_callable():
    fn, layers = serializer.split_callable(functools.partial(Account(3).deposit, 1))
    assert fn is Account.deposit
    assert layers[0] == ((1,), {})
    assert layers[1][0].balance == 3
    assert serializer.split_callable(add) == (add, ())


def test_ref_of_whole_callables(peer):
    """A map packs its function once, whatever is bound to it."""
    for fn, want in [(Account(5).deposit, 6), (functools.partial(add, 2), 3), (Account(7), 8)]:
        ref = peer.table.ref(fn)
        assert peer.table.ref(fn) is ref  # equal content
        assert peer.run((ref, serializer.dumps_frozen(((1,), None)))) == want


def test_monkeypatched_function_is_not_what_its_name_says(peer, monkeypatch):
    original, table = add, peer.table
    assert not table.ref(original).by_value
    monkeypatch.setattr(sys.modules[__name__], "add", lambda a: -a)
    assert table.ref(original).by_value
    assert peer(original, 1, 2) == 3
    monkeypatch.undo()
    assert not pack_call(table, original, ())[0].by_value


def test_registered_by_value(peer, tmp_path):
    import cloudpickle

    mod = types.ModuleType("late_by_value")
    mod.__spec__ = sys.modules[__name__].__spec__
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        assert FunctionTable().ref(add).by_value
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert not FunctionTable().ref(add).by_value


# ------------------------------------------------------------------------- by value: what travels


def test_lambdas_and_closures(peer):
    factor = 3
    assert peer(lambda x: x * factor, 2) == 6
    assert peer(map_list, lambda x: x + factor, [1, 2]) == [4, 5]


def map_list(fn, items):
    return [fn(item) for item in items]


def test_all_parts_of_a_function(peer, script):
    mod = script(
        """
        import functools
        def mark(fn):
            @functools.wraps(fn)
            def wrapper(*args, **kwargs):
                return fn(*args, **kwargs)
            wrapper.extra = [1]
            return wrapper
        @mark
        def f(a: int, b=2, *, c=3) -> str:
            "doc"
            return a + b + c
        def look(fn):
            return (fn.__name__, fn.__qualname__, fn.__module__, fn.__doc__, fn.extra, fn.__annotations__,
                    fn.__wrapped__.__defaults__, fn.__wrapped__.__kwdefaults__)
        def via_global():
            return look(f)
        def gen(n):
            yield from range(n)
        async def co():
            return 1
        """
    )
    assert peer(mod.f, 1) == 6
    assert peer(mod.look, mod.f) == mod.look(mod.f)
    assert peer(mod.via_global) == mod.look(mod.f)
    assert peer(list, [*mod.gen(3)]) == [0, 1, 2]
    assert peer(lambda: list(mod.gen(3))) == [0, 1, 2]
    assert peer(types.FunctionType, (lambda: 1).__code__, {})() == 1


def test_recursion(peer, script):
    mod = script(
        """
        def fact(n): return 1 if n < 2 else n * fact(n - 1)
        def even(n): return n == 0 or odd(n - 1)
        def odd(n): return n != 0 and even(n - 1)
        def outer(n):
            def fib(k): return k if k < 2 else fib(k - 1) + fib(k - 2)
            return fib
        """
    )
    assert peer(mod.fact, 5) == 120
    assert peer(mod.even, 10)
    assert peer(mod.odd, 7)
    assert peer(mod.outer(0), 10) == 55
    assert peer(mod.outer, 0)(10) == 55  # a result: comes back by value


def test_closures_that_share_a_cell(peer):
    def counter():
        n = 0

        def up():
            nonlocal n
            n += 1
            return n

        def get():
            return n

        return up, get

    def use(up, get):
        up()
        up()
        return get()

    assert peer(use, *counter()) == 2
    up, get = peer(counter)
    up()
    assert get() == 1


def test_cell_rebound_and_empty(peer):
    n = 1

    def get():
        return n

    def late():
        return never

    if False:
        never = 0
    assert peer(get) == 1
    n = 2
    assert peer(get) == 2
    items = [1]
    call = peer.submit(lambda: items)
    items.append(2)
    assert peer.run(call) == [1]
    assert peer(lambda: items) == [1, 2]
    with pytest.raises(NameError, match="never"):
        peer(late)


def test_classes(peer, script):
    mod = script(
        """
        import abc, collections, dataclasses, enum, typing
        class Base:
            made = 0
            def __init__(self, x): self.x = x
            def who(self): return "base"
        class Child(Base):
            def who(self): return "child of " + super().who()
            @property
            def twice(self): return 2 * self.x
            @classmethod
            def of(cls, x): return cls(x)
        class Slots:
            __slots__ = ("a", "b", "__hidden")
            def __init__(self): self.a, self.__hidden = 1, 2
            def get(self): return self.__hidden, hasattr(self, "__dict__")
        class Shape(abc.ABC):
            @abc.abstractmethod
            def area(self): ...
        class Square(Shape):
            def area(self): return 4
        class Colour(enum.Enum):
            RED = 1
            BLUE = "b"
            def low(self): return self.name.lower()
        Point = collections.namedtuple("Point", "x y")
        class Pair(typing.NamedTuple):
            a: int
            b: str = "x"
        @dataclasses.dataclass
        class Data:
            n: int
            tags: list = dataclasses.field(default_factory=list)
        @dataclasses.dataclass(frozen=True, order=True)
        class Frozen:
            n: int = 3
        class Meta(type):
            def __call__(cls, *a): return super().__call__(*a)
        class WithMeta(metaclass=Meta):
            pass
        T = typing.TypeVar("T")
        class Box(typing.Generic[T]):
            def __init__(self, v): self.v = v
        class Linked: pass
        Linked.other = Linked()
        def same(x): return type(x), x
        def check(child, data):
            return isinstance(child, Child) and child.who() == "child of base" and data.tags == [] and data.n
        """
    )
    values = [
        mod.Child(2),
        mod.Slots(),
        mod.Square(),
        mod.Colour.BLUE,
        mod.Point(1, 2),
        mod.Pair(1),
        mod.Data(4),
        mod.Frozen(),
        mod.WithMeta(),
        mod.Box(3),
        mod.Linked(),
        mod.Child,
    ]
    for value in values:
        kind, again = peer(mod.same, value)
        assert kind is type(value)  # the sender's own class came back, not a copy
        assert type(again) is type(value)
    assert peer(mod.same, mod.Colour.RED)[1] is mod.Colour.RED
    assert peer(mod.Slots().get) == (2, False)
    assert peer(mod.same, mod.Data(4))[1] == mod.Data(4)
    assert peer(mod.same, mod.Pair(1))[1] == (1, "x")
    assert peer(mod.check, mod.Child(1), mod.Data(7)) == 7
    assert peer(mod.Child.of, 3).twice == 6
    assert peer(mod.Child(1).who) == "child of base"
    assert peer(mod.Colour.BLUE.low) == "blue"
    assert peer(mod.Data, 9) == mod.Data(9)


def test_what_scripts_contain(peer, script):
    """Things that cloudpickle alone refuses, or sends as names that the receiver lacks."""
    mod = script(
        """
        import abc, asyncio, contextlib, dataclasses, enum, functools, logging, typing
        class Reg: pass
        class A(abc.ABC): pass
        A.register(Reg)
        class Number(enum.IntEnum):
            X = 1
        class Flags(enum.Flag):
            P = 1
            Q = 2
        @functools.singledispatch
        def kind(x): return "object"
        @kind.register
        def _(x: int): return "int"
        class Base:
            def __init_subclass__(cls, tag=None): cls.tag = tag
            @functools.cached_property
            def c(self): return 5
            @functools.lru_cache
            def cached(self, x): return x
            @property
            def v(self): return self._v
            @v.setter
            def v(self, n): self._v = n
        class Sub(Base, tag=3): pass
        class Meta(type):
            def __new__(m, name, bases, ns, **kw): return super().__new__(m, name, bases, ns)
        class WithMeta(metaclass=Meta, flag=1): pass
        @dataclasses.dataclass(slots=True, frozen=True)
        class Data:
            a: int
            b: list = dataclasses.field(default_factory=list)
        Id = typing.NewType("Id", int)
        S = typing.ParamSpec("S")
        class TD(typing.TypedDict):
            a: int
        class Proto(typing.Protocol):
            def m(self): ...
        log = logging.getLogger("x")
        class Deco:
            def __init__(self, f): self.f = f; functools.update_wrapper(self, f)
            def __call__(self, *a): return self.f(*a)
        @Deco
        def deco(x): return x + 1
        @contextlib.contextmanager
        def manager(): yield 7
        async def co(): return 3
        class Single:
            one = None
            def __new__(cls):
                cls.one = cls.one or super().__new__(cls)
                return cls.one
        class Outer:
            class Inner:
                z = 1
            def make(self): return Outer.Inner()
        def run():
            sub = Sub()
            sub.v = 4
            with manager() as seven:
                pass
            return [isinstance(Reg(), A), Number.X + 1, (Flags.P | Flags.Q).value, kind(1), kind(""), sub.c,
                    sub.v, sub.cached(2), Sub.tag, type(WithMeta).__name__, Data(1).b, S.__name__, TD(a=1),
                    hasattr(Data(1), "__dict__"), Id(4), issubclass(Proto, typing.Generic), log.name, deco(1),
                    seven, asyncio.run(co()), Single() is Single(), Outer().make().z]
        def back(x): return x
        """
    )
    assert peer(mod.run) == mod.run()
    for value in (
        mod.Reg(),
        mod.Number.X,
        mod.Flags.P | mod.Flags.Q,
        mod.Sub(),
        mod.WithMeta(),
        mod.Data(1),
        mod.deco,
        mod.Id,
        mod.TD,
        mod.Proto,
        mod.Single(),
        mod.Outer.Inner(),
        mod.Outer().make,
        mod.log,
        mod.kind,
    ):
        assert type(peer(mod.back, value)) is type(value)


def test_portable_messages_hold_whole_classes(peer, fresh_peer, script):
    """What a worker stores for all: its reader may never have seen the class."""
    mod = script(
        """
        class P:
            def __init__(self, x): self.x = x
            def twice(self): return 2 * self.x
        def store(p):
            from runtime import serializer
            return serializer.dumps_portable(p).data, serializer.dumps(p).data
        def fetch(data):
            from runtime import serializer
            return serializer.loads(data).twice()
        """
    )
    portable, result = peer(mod.store, mod.P(4))
    assert len(result) < 200 < len(portable)
    assert type(serializer.loads(portable)) is mod.P
    with pytest.raises(LookupError, match=r"\.P"):
        fresh_peer(mod.fetch, result)
    assert fresh_peer(mod.fetch, portable) == 8


def test_large_global_arrays(peer, script):
    mod = script(
        """
        import numpy as np
        data, n = np.zeros(100_000), 1
        def f(): return float(data.sum()) + n, data.flags.writeable
        """
    )
    ref = peer.table.ref(mod.f)
    assert peer.table.ref(mod.f) is ref
    assert len(ref.data) < 810_000
    assert peer(mod.f) == (1, True)
    mod.data[:] = 1
    assert peer(mod.f) == (100_001, True)
    mod.n = 2
    assert peer(mod.f) == (100_002, True)
    assert pickle.dumps(ref.data)  # not a view of the live array
    payload = serializer.dumps_frozen((lambda f: f(), mod.f))
    assert payload.buffers == ()  # a global outlives the message, and must not keep its blocks in use
    mod.data[:] = 5
    _fn, f = serializer.loads(payload.data)
    assert f() == (100_002, True)


class Proxy:
    """Like a proxy outside of its context: whatever one asks raises."""

    def __getattribute__(self, name):
        if name in ("__reduce_ex__", "__reduce__"):
            return lambda *_: (Proxy, ())
        raise RuntimeError("out of context: " + name)

    def __call__(self, x):
        return x


def test_hostile_proxies(peer, script):
    mod = script("p = None\ndef f(x): return type(x).__name__, type(p).__name__")
    mod.p = Proxy()
    assert peer(mod.f, (Proxy(), lambda: 1)[0]) == ("Proxy", "Proxy")
    assert peer(Proxy(), 3) == 3


def test_class_is_one_class_over_many_messages(peer, script):
    mod = script(
        """
        class Thing:
            limit = 1
        kept = None
        def keep(thing):
            global kept
            kept = thing
        def compare(thing): return type(thing) is type(kept) and isinstance(thing, Thing)
        def limit(thing): return thing.limit
        def raise_limit(thing): type(thing).limit = 50
        """
    )
    peer(mod.keep, mod.Thing())
    assert peer(mod.compare, mod.Thing())
    assert peer(mod.limit, mod.Thing()) == 1
    peer(mod.raise_limit, mod.Thing())
    assert peer(mod.limit, mod.Thing()) == 50  # the sender has not touched it
    assert mod.Thing.limit == 1  # nor did anything come back
    mod.Thing.limit = 2
    assert peer(mod.limit, mod.Thing()) == 2
    old = mod.Thing
    exec("class Thing:\n    limit = 'new'", mod.__dict__)
    assert peer(mod.limit, mod.Thing()) == "new"
    assert peer(mod.limit, old()) == 2


def test_results_do_not_touch_the_senders_class(peer, script):
    mod = script(
        """
        total = 0
        class Adder:
            def add(self, n):
                global total
                total += n
                return total
        def make(): return Adder()
        """
    )
    method = mod.Adder.add
    adder = peer(mod.make)
    assert mod.Adder.__dict__["add"] is method
    assert adder.add(2) == 2
    assert mod.total == 2


def test_class_with_globals_that_cannot_come_back(peer, script):
    """The worker's own lock, in a global that a method names, must not keep instances from being results."""
    mod = script(
        """
        import threading
        lock = None
        class Job:
            def run(self):
                with lock: return 1
        def init():
            global lock
            lock = threading.Lock()
        def make():
            job = Job()
            job.run()
            return job
        """
    )
    peer(mod.init)
    assert type(peer(mod.make)) is mod.Job


def test_classes_made_by_the_receiver(peer):
    def make(n):
        class Local:
            value = n

            def get(self):
                return self.value

        return Local()

    one, two = peer(make, 1), peer(make, 2)
    assert (one.get(), two.get()) == (1, 2)
    assert type(one) is not type(two)


def test_lru_cache_keeps_its_entries(peer, script):
    mod = script(
        """
        import functools
        calls = 0
        @functools.lru_cache(maxsize=7)
        def slow(n):
            global calls
            calls += 1
            return n
        def via(n): return slow(n), calls, slow.cache_parameters()["maxsize"]
        """
    )
    assert peer(mod.slow, 1) == 1
    assert peer(mod.slow, 1) == 1
    assert peer(mod.via, 1) == (1, 1, 7)


def test_submodules_come_along(peer, script):
    mod = script(
        "import concurrent.futures\nimport xml.dom.minidom\n"
        "def f(): return xml.dom.minidom.Node.TEXT_NODE, concurrent.futures.wait.__name__"
    )
    assert peer(mod.f) == (3, "wait")


def test_functions_without_a_module(peer):
    space: dict = {}
    exec("n = 1\ndef f():\n    global n\n    n += 1\n    return n\ndef g(): return n", space)
    assert peer(space["f"]) == 2
    assert peer(space["g"]) == 2  # one dict, also without a name
    copied = dict(space)
    exec("def g(): return n", copied)
    assert peer(copied["g"]) == 1  # a copied dict is another one
    assert pickle.loads(pickle.dumps(space["__runtime_out__"])) is None


def test_global_made_in_a_class_body(peer, script):
    mod = script("LIMIT = 5\ndef f():\n    class A:\n        x = LIMIT\n    return A.x")
    assert peer(mod.f) == 5


def test_by_value_in_containers_and_arguments(peer, script):
    mod = script(
        """
        def one(): return 1
        def two(): return 2
        table = {"one": one, "two": [two]}
        def call(): return table["one"]() + table["two"][0](), table["one"] is one
        class P:
            def __init__(self, f): self.f = f
        def use(p, fs): return p.f() + sum(f() for f in fs)
        """
    )
    assert peer(mod.call) == (3, True)
    assert peer(mod.use, mod.P(mod.one), [mod.two, lambda: 3]) == 6


@pytest.mark.parametrize("text", ["__main__", "if __name__ == '__main__': main()", "x" * 8, "__mp_main__"])
def test_text_about_main_is_just_text(text):
    assert there_and_back([text, (text, 1)]) == [text, (text, 1)]


# ------------------------------------------------------------------------- by value: globals


def test_functions_of_a_module_share_globals(peer, script):
    mod = script(
        """
        counter = 0
        def up():
            global counter
            counter += 1
            return counter
        def read(): return counter
        """
    )
    assert [peer(mod.up), peer(mod.up), peer(mod.read)] == [1, 2, 2]
    assert peer(lambda f: f(), mod.read) == 2
    assert mod.counter == 0


@pytest.mark.parametrize("declared", ["model = None", "model = {}", ""])
def test_initializer_pattern(peer, script, declared):
    mod = script(
        declared
        + """
def init(n):
    global model
    model = [n]
def work(x): return model[0] + x
def other(x): return model[0] * x + scale
scale = 1
"""
    )
    peer(mod.init, 10)
    assert peer(mod.work, 1) == 11
    assert peer(mod.other, 2) == 21
    mod.scale = 5  # another global is rebound: the model stays
    assert peer(mod.other, 2) == 25
    assert peer(mod.work, 1) == 11
    assert peer(lambda f: f(1), mod.work) == 11
    mod.model = [100]  # now the sender has rebound it
    assert peer(mod.work, 1) == 101
    assert peer(mod.other, 2) == 205


def test_initializer_that_fills_a_container(peer, script):
    mod = script(
        "state = {}\ndef init(): state['m'] = 5\ndef work(): return state['m']\n"
        "def work2(): return state['m'] + n\nn = 1"
    )
    peer(mod.init)
    assert (peer(mod.work), peer(mod.work2)) == (5, 6)
    mod.n = 2
    assert peer(mod.work2) == 7


def test_rebinding_rule(peer, fresh_peer, script):
    mod = script("x = 1\ndef f(): return x")
    one = peer.submit(mod.f)
    mod.x = 2
    two = peer.submit(mod.f)
    mod.x = 1
    three = peer.submit(mod.f)
    assert [peer.run(call) for call in (one, two, three)] == [1, 2, 1]
    assert [peer.run(call) for call in (two, one, three, one, two)] == [2, 1, 1, 1, 2]  # in any order
    assert [fresh_peer.run(call) for call in (three, two, one)] == [1, 2, 1]


def test_rebinding_through_helpers_and_mutation(peer, script):
    mod = script(
        """
        x = [1]
        def helper(): return x
        def f(): return helper()
        """
    )
    assert peer(mod.f) == [1]
    mod.x.append(2)
    assert peer(mod.f) == [1, 2]
    mod.x = (3,)
    assert peer(mod.f) == (3,)
    exec("def helper(): return 'new'", mod.__dict__)
    assert peer(mod.f) == "new"
    mod.helper.__defaults__ = None
    mod.helper.__code__ = (lambda: "patched").__code__
    assert peer(mod.f) == "patched"


def test_what_the_receiver_assigned_survives_an_excursion(peer, script):
    """Version 1 (rebound by the initializer), version 2, then an old call of version 1 again."""
    mod = script("m = None\ndef init():\n    global m\n    m = 'init'\ndef f(): return m")
    peer(mod.init)
    old = peer.submit(mod.f)
    mod.m = "host"
    new = peer.submit(mod.f)
    assert [peer.run(call) for call in (old, new, old, new)] == ["init", "host", "init", "host"]


def test_older_functions_get_their_classes_back(peer, script):
    mod = script("class C:\n    n = 1\nobj = C()\ndef f(): return obj.n, type(obj) is C")
    one = peer.submit(mod.f)
    mod.C.n = 2
    two = peer.submit(mod.f)
    mod.obj = None
    mod.C = type("D", (), {"n": 3})
    mod.obj = mod.C()
    three = peer.submit(mod.f)
    for _ in range(2):
        assert [peer.run(call) for call in (three, one, two)] == [(3, True), (1, True), (2, True)]


def test_deleted_global_is_left_alone(peer, script):
    mod = script("x = 1\ndef f(): return x")
    assert peer(mod.f) == 1
    del mod.x
    assert peer(mod.f) == 1
    mod.x = 3
    assert peer(mod.f) == 3


def test_redefinition_under_one_name(peer, script):
    mod = script("def f(): return 1")
    old = mod.f
    assert peer(old) == 1
    exec("def f(): return 2", mod.__dict__)
    assert peer(mod.f) == 2
    assert peer(old) == 1


def test_sentinels_keep_their_identity(peer, script):
    mod = script(
        """
        MISSING = object()
        registry = []
        DEFAULTS = {"a": MISSING}
        class Marker: pass
        MARK = Marker()
        class Holder:
            mark = MARK
        def f(x=MISSING, *, y=MISSING): return x is MISSING and y is MISSING
        def g(seen=registry): return seen is registry
        def via(x=MISSING): return inner(x)
        def inner(x): return x is MISSING
        def table(): return DEFAULTS["a"] is MISSING
        def attribute(): return Holder.mark is MARK
        def make():
            kept = registry
            return lambda: kept is registry
        """
    )
    for fn in (mod.f, mod.g, mod.via, mod.table, mod.attribute, mod.make()):
        assert peer(fn), fn
    assert peer(lambda f: f(), mod.via)


def test_arguments_are_fresh_copies(peer, script):
    """An argument that happens to be a global must not be the receiver's global."""
    mod = script(
        "config = {'n': 0}\nclass C: n = 0\nobj = C()\n"
        "def bump(c, o): c['n'] += 1; o.n += 1; return c['n'], o.n, config['n'], obj.n"
    )
    for _ in range(2):
        assert peer(mod.bump, mod.config, mod.obj) == (1, 1, 0, 0)


def test_globals_that_refer_to_each_other(peer, script):
    mod = script(
        """
        class Node: pass
        a, b = Node(), Node()
        a.next, b.next = b, a
        def f(): return a.next.next.next is a.next
        """
    )
    assert peer(mod.f)


def test_importable_module_with_a_by_value_function(fresh_peer):
    """The initializer goes by reference, the task by value: it sees what the initializer has set."""
    fresh_peer(set_setting, 42)
    assert fresh_peer(lambda: _setting) == 42


def test_rebinding_in_an_importable_module(fresh_peer):
    global _setting
    try:
        _setting = 1
        assert fresh_peer(lambda: _setting) == 1
        _setting = 2
        assert fresh_peer(lambda: _setting) == 2
    finally:
        _setting = None


def test_results_are_snapshots(peer, script):
    mod = script("n = 1\ndef up():\n    global n\n    n += 1\n    return lambda: n")
    one, two = peer(mod.up), peer(mod.up)
    assert (one(), two(), mod.n) == (2, 3, 1)


def test_real_main(tmp_path):
    out = run_script(
        tmp_path,
        """
        import dataclasses, enum, functools
        from test_serializer import Peer
        model = None
        MISSING = object()
        @dataclasses.dataclass
        class Point:
            x: int
            tags: list = dataclasses.field(default_factory=list)
        class Kind(enum.Enum):
            A = 1
        def init(n):
            global model
            model = Point(n)
        def work(p, kind=MISSING):
            assert isinstance(p, Point)
            return Point(model.x + p.x), kind is MISSING, kind
        @functools.lru_cache
        def cached(n): return n
        x = 1
        def read(): return x
        peer = Peer()
        peer(init, 10)
        print(peer(work, Point(1)))
        print(peer(work, Point(1), Kind.A)[2] is Kind.A)
        print(type(peer(work, Point(1))[0]) is Point)
        print(type(peer(map, len, ["ab"])).__name__, peer(cached, 4), peer(sorted, [1, 2], key=lambda v: -v))
        calls = [peer.submit(read)]
        x = 2
        calls.append(peer.submit(read))
        print([peer.run(call) for call in calls])
        def fail(): raise Custom("odd")
        class Custom(Exception): pass
        try:
            peer(fail)
        except Custom as error:
            print("caught", error, "fail()" in str(error.__cause__) or "in fail" in str(error.__cause__))
        peer.close()
        """,
    )
    first, second, third, fourth, fifth, sixth = out.splitlines()
    assert first.startswith("(Point(x=11, tags=[]), True, <object object")
    assert (second, third) == ("True", "True")
    assert fourth == "map 4 [2, 1]"
    assert fifth == "[1, 2]"
    assert sixth == "caught odd True"


def test_adopted_main(tmp_path):
    """With adopt_main the receiver's __main__ is a module that has what functions by value brought along."""
    out = run_script(
        tmp_path,
        """
        import subprocess, sys, typing, pickle
        from runtime import serializer
        class Point:
            other: "Point"
        x = 5
        def f(p):
            import __main__
            import typing
            return __main__.x == x, typing.get_type_hints(Point) == {"other": Point}, __name__
        ref, payload = serializer.pack_call(serializer.FunctionTable(), f, (Point(),))
        code = "import sys; from runtime import serializer as s; s.adopt_main(); s.adopt_main();"
        code += f"f, a, k = s.unpack_call(s.FunctionCache(), 1, {ref.data!r}, {payload.data!r}); print(f(*a))"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        """,
    )
    assert out.strip() == "(True, True, '__main__')"


# ------------------------------------------------------------------------------------- caching


def test_stable_functions_are_pickled_once(script):
    mod = script(
        """
        import math, re, functools, pathlib, dataclasses, collections, enum
        RATE = 1.5
        NAMES = ("a", frozenset([1]))
        PATTERN = re.compile("x")
        ROOT = pathlib.Path("/")
        OPTIONS = {"a": [1, 2]}
        class Colour(enum.Enum):
            RED = 1
        P = collections.namedtuple("P", "x")
        @dataclasses.dataclass
        class D:
            x: int
            y: list = dataclasses.field(default_factory=list)
            def area(self): return RATE * self.x
            @staticmethod
            def s(): return 1
            @property
            def p(self): return 1
        def helper(x): return math.floor(x * RATE)
        HELPERS = (helper, len)
        def f(x, y=NAMES):
            return helper(x), PATTERN, ROOT, OPTIONS, Colour.RED, P(1), D(2), HELPERS, undefined
        @functools.lru_cache
        def c(x): return f(x)
        """
    )
    table = FunctionTable()
    for fn in (mod.f, mod.c, mod.D, mod.P, mod.D.area):
        ref = table.ref(fn)
        assert ref.by_value
        assert id(fn) in table._entries, fn
        assert table.ref(fn) is ref


@pytest.mark.parametrize(
    "change",
    [
        "RATE = 2.5",
        "OPTIONS['a'].append(3)",
        "OPTIONS['b'] = 1",
        "f.__defaults__ = (9,)",
        "f.__kwdefaults__['k'] = 9",
        "f.tag = 1",
        "f.__code__ = (lambda x, y=1, *, k=1: 0).__code__",
        "D.limit = 2",
        "D.new = 3",
        "D.run = lambda s: 0",
        "helper.__defaults__ = (3,)",
        "undefined = 1",
        "def helper(n=1): return 5",
        "SEEN.add(7)",
        "D.__bases__ = (E,)",
        "D.s = staticmethod(lambda: 2)",
    ],
)
def test_any_change_is_noticed(script, change):
    mod = script(
        """
        RATE, OPTIONS, SEEN = 1.5, {"a": [1]}, set()
        class B: pass
        class E: pass
        class D(B):
            limit = 1
            def run(self): return RATE
            @staticmethod
            def s(): return 1
        def helper(n=1): return n
        def f(x, y=1, *, k=1): return RATE, OPTIONS, D, helper(), undefined, SEEN
        """
    )
    table = FunctionTable()
    ref = table.ref(mod.f)
    assert id(mod.f) in table._entries
    exec(change, mod.__dict__)
    changed = table.ref(mod.f)
    assert changed is not ref
    assert changed.id != ref.id
    assert table.ref(mod.f) is changed


def test_unstable_functions_are_compared_by_digest(script):
    mod = script("class C: n = 1\nobj = C()\ndef f(): return obj.n")
    table = FunctionTable()
    ref = table.ref(mod.f)
    assert table.ref(mod.f) is ref
    assert not table._entries
    mod.obj.n = 2
    assert table.ref(mod.f) is not ref


def test_large_containers_are_not_compared(script):
    mod = script(
        """
        data, me = dict.fromkeys(range(100_000)), [1]
        me.append(me)
        def f(): return data
        def g(): return me
        """
    )
    table = FunctionTable()
    assert table.ref(mod.f) is table.ref(mod.f)
    assert table.ref(mod.g) is table.ref(mod.g)
    assert not table._entries
    mod.data[1] = 1
    assert len({table.ref(mod.f).id, table.ref(mod.f).id}) == 1


def test_equal_content_is_one_reference():
    table = FunctionTable()
    refs = {table.ref(fn).id for fn in [lambda x: x + 1 for _ in range(10)]}
    assert len(refs) == 1
    refs = {table.ref(functools.partial(add, 1)).id for _ in range(10)}
    assert len(refs) == 1
    assert all(isinstance(i, int) and i > 0 for i in refs)


def test_ids_are_unique_over_tables():
    ids = [FunctionTable().ref(lambda n=n: n).id for n in range(10)]
    assert len(set(ids)) == 10


def test_nothing_is_kept_alive(script):
    class Big:
        pass

    table = FunctionTable()
    watched = []

    def check(make):
        fn, *others = make()
        watched.extend(weakref.ref(o) for o in (fn, *others))
        ref, _payload = pack_call(table, fn, ())
        with contextlib.suppress(Exception):
            table.ref(fn)
        del fn, others, ref, _payload

    big = Big()

    def closure():
        b = Big.__new__(Big)
        return (lambda: b), b

    def cyclic():
        def fact(n, also=None):
            return fact(n - 1)

        return (fact,)

    def with_default():
        def cb():
            return f

        def f(c=cb):
            return 1

        return f, cb

    def local_class():
        class Local:
            def run(self):
                return Local

            s = staticmethod(lambda: Local)

        return (Local,)

    def bound():
        b = Account()
        return functools.partial(b.deposit, 1), b

    for make in (closure, cyclic, with_default, local_class, bound):
        check(make)
    mod = script("def f(): return g()\ndef g(): return 1")
    watched.append(weakref.ref(mod.g))
    table.ref(mod.f)
    del mod.f, mod.g, big
    gc.collect()
    assert [w() for w in watched if w() is not None] == []
    assert [e.ref.name for e in table._entries.values()] == ["Account.deposit"]
    assert table.plain == {}


def test_table_is_bounded():
    table = FunctionTable(size=8, nbytes=100_000)
    for n in range(50):
        table.ref(lambda n=n: n)
    assert len(table._by_digest.things) <= 8
    blobs = [bytes([n]) * 50_000 for n in range(4)]
    for blob in blobs:
        table.ref(lambda blob=blob: blob)
    assert_balanced(table, 2)


def assert_balanced(table, most):
    """The last one is kept, at most so many are, and their bytes are what they are."""
    kept = table._by_digest
    assert 1 <= len(kept.things) <= most
    assert kept.nbytes == sum(len(ref.data) for ref, _ in kept.things.values())


@pytest.mark.parametrize("handler", ["raises", "comes in between"])
def test_table_is_balanced_whatever_strikes(handler):
    """A signal handler at each place of `ref`: one that raises, as Ctrl-C does; or that, as another thread,
    has functions pickled.
    """
    table, alive = FunctionTable(size=8, nbytes=1), []

    def have_one_pickled():
        n = len(alive)
        alive.append(lambda: n)
        table.ref(alive[-1])

    def come_in():
        if handler == "raises":
            raise KeyboardInterrupt
        have_one_pickled()

    def call():
        with contextlib.suppress(KeyboardInterrupt):
            have_one_pickled()
        assert_balanced(table, 1)

    call()
    assert strike_everywhere(call, come_in, ("/runtime/functions.py",)) > 20


def test_function_cache(script):
    cache = FunctionCache(size=3)
    table = FunctionTable()
    refs = [table.ref(fn) for fn in (len, add, math.sin, int)]
    for ref in refs[:3]:
        cache.load(ref.id, ref.data)
    assert cache.load(refs[0].id) is len
    cache.load(refs[3].id, refs[3].data)
    assert refs[1].id not in cache  # the least recently used
    assert len(cache) == 3
    with pytest.raises(LookupError, match="pickle"):
        cache.load(refs[1].id)
    cache.drop(refs[0].id)
    cache.drop(refs[0].id)
    assert refs[0].id not in cache
    cache.clear()
    assert len(cache) == 0
    small = FunctionCache(nbytes=1000)
    for n in range(5):
        ref = table.ref(lambda n=n: (n, b"x" * 0))
        small.load(ref.id, ref.data)
    assert len(small) <= 3


def test_failed_load_is_not_cached():
    cache = FunctionCache()
    with pytest.raises(ModuleNotFoundError):
        cache.load(1, b"\x80\x05\x8c\x07no_such\x8c\x01f\x93.")
    assert 1 not in cache
    assert cache.load(1, pickle.dumps(len)) is len


def test_many_threads(script):
    mod = script("x = 0\nclass D: pass\ndef f(d): return x, type(d).__name__")
    table, errors, seen = FunctionTable(), [], []

    def work():
        try:
            for n in range(30):
                mod.x = n
                ref, payload = pack_call(table, mod.f, (mod.D(), lambda n=n: n))
                seen.append((ref.id, ref.data))
                assert payload.data
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    contents = {}
    assert all(contents.setdefault(i, data) == data for i, data in seen)


def test_forked_child_numbers_for_itself(script):
    mod = script("def f(): return 1")
    FunctionTable().ref(mod.f)
    token = versions.Origin.get()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, versions.Origin.get().encode())
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 100).decode() != token
    os.close(reader)
    os.waitpid(pid, 0)


# ----------------------------------------------------------------------------------- exceptions


class Odd(Exception):
    """Cannot be made again: __init__ wants two arguments, args has one."""

    def __init__(self, a, b):
        super().__init__(f"{a}{b}")


class Fine(Exception):
    def __init__(self, code, text="t"):
        super().__init__(code, text)
        self.code = code


class NoText(Exception):
    def __str__(self):
        raise ValueError("no text for you")


class NoTextAtAll(Exception):
    def __str__(self):
        raise SystemExit(4)

    __repr__ = __str__


class Impostor(Exception):
    def __reduce__(self):
        return str, ("not an exception",)


class ExitsOnPickle(Exception):
    def __reduce__(self):
        sys.exit(7)


class ExitsOnLoad(Exception):
    def __reduce__(self):
        return sys.exit, (8,)


class EndlessReduce(Exception):
    def __reduce__(self):
        return EndlessReduce, (EndlessReduce(),)


def through(exc):
    """As raised in a task and loaded by the host."""
    try:
        raise exc
    except BaseException as error:
        payload = serializer.dump_exception(error)
    return serializer.load_exception(payload.data, [bytearray(b) for b in payload.buffers])


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("x", 1),
        KeyError("k"),
        SystemExit(3),
        KeyboardInterrupt(),
        OSError(2, "no", "f"),
        StopIteration(5),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
        Fine(4),
        NoText(),
        WorkerDied(1, 2, reason="r"),
        BaseException(),
        GeneratorExit(),
    ],
)
def test_exceptions_survive(exc):
    again = through(exc)
    assert type(again) is type(exc)
    assert again.args == exc.args
    cause = again.__cause__
    assert type(cause).__module__ == "concurrent.futures.process"
    assert type(cause).__name__ == "_RemoteTraceback"
    assert str(cause).startswith('\n"""\nTraceback (most recent call last):\n')
    assert str(cause).endswith('"""')
    assert "in through" in str(cause)
    assert type(exc).__qualname__ in str(cause)
    assert "".join(traceback.format_exception(again))


@pytest.mark.parametrize(
    "exc, text",
    [
        (Odd(1, 2), "12"),
        (Impostor("i"), "i"),
        (ExitsOnPickle("e"), "e"),
        (ExitsOnLoad("l"), "l"),
        (EndlessReduce("r"), "r"),
        (ValueError(threading.Lock()), "lock"),
        (NoTextAtAll(threading.Lock()), "raised SystemExit"),
        (ExceptionGroup("g", [Odd(1, 2)]), "g"),
    ],
)
def test_exceptions_that_cannot_travel(exc, text):
    again = through(exc)
    assert type(again) is RemoteError
    assert text in again.text
    assert type(exc).__qualname__ in again.type_name
    assert "in through" in again.traceback
    assert type(again.__cause__).__name__ == "_RemoteTraceback"
    assert type(pickle.loads(pickle.dumps(again))) is RemoteError


def test_causes_contexts_and_notes_are_in_the_text():
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError as error:
        error.add_note("a note")
        last = error
    again = through(last)
    text = str(again.__cause__)
    assert "KeyError: 'first'" in text
    assert "direct cause" in text
    assert "a note" in text
    assert again.__notes__ == ["a note"]


def test_exception_groups():
    group = BaseExceptionGroup("g", [ValueError(1), KeyboardInterrupt(), ExceptionGroup("h", [Fine(2)])])
    again = through(group)
    assert type(again) is BaseExceptionGroup
    assert [type(e) for e in again.exceptions] == [ValueError, KeyboardInterrupt, ExceptionGroup]
    assert again.exceptions[2].exceptions[0].code == 2
    assert "sub-exception" in str(again.__cause__) or "---- 1 ----" in str(again.__cause__)


def test_exception_of_five_megabytes():
    again = through(ValueError("x" * 5_000_000))
    assert len(str(again)) == 5_000_000
    again = through(Odd("y" * 5_000_000, ""))
    assert len(again.text) == 5_000_000


def test_exception_with_an_array():
    again = through(ValueError(np.arange(BIG)))
    assert (again.args[0] == np.arange(BIG)).all()


def test_recursion_error_is_short():
    def endless():
        return endless()

    try:
        endless()
    except RecursionError as error:
        payload = serializer.dump_exception(error)
    again = serializer.load_exception(payload.data)
    assert type(again) is RecursionError
    assert "more times" in str(again.__cause__)
    assert len(str(again.__cause__)) < 5000


def test_long_context_chain():
    exc = ValueError(0)
    for n in range(3000):
        new = ValueError(n)
        new.__context__, exc = exc, new
    assert type(through(exc)) is ValueError
    loop = KeyError("a")
    loop.__context__ = ValueError("b")
    loop.__context__.__context__ = loop
    assert type(through(loop)) is KeyError


def test_exception_without_traceback():
    payload = serializer.dump_exception(ValueError("never raised"))
    assert str(serializer.load_exception(payload.data)) == "never raised"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        pickle.dumps(5),
        pickle.dumps((b"junk", ("ValueError",), "x", "tb\n")),
        pickle.dumps((pickle.dumps(5), ("ValueError",), "x", "tb")),
        pickle.dumps((b"", (), "x", "tb")),
        pickle.dumps((b"\x80\x05\x8c\x07no_such\x8c\x01E\x93.", ("no_such.E",), "x", "tb")),
    ],
)
def test_load_exception_never_raises(data):
    again = serializer.load_exception(data)
    assert type(again) is RemoteError
    assert str(again)


class Stubborn(Exception):
    __slots__ = ()

    def __setattr__(self, name, value):
        raise AttributeError("read only")


def test_exceptions_that_resist():
    assert isinstance(through(Stubborn("s")), (Stubborn, RemoteError))


def test_exceptions_of_a_peer(peer, script):
    mod = script(
        """
        class Custom(Exception):
            pass
        class Worse(Exception):
            def __init__(self, a, b): super().__init__(a)
        def fail(kind): raise {"custom": Custom("c"), "worse": Worse(1, 2), "exit": SystemExit(9)}[kind]
        def local():
            class Local(Exception): pass
            raise Local("l")
        """
    )
    with pytest.raises(mod.Custom, match="c") as info:
        peer(mod.fail, "custom")
    assert "in fail" in str(info.value.__cause__)
    assert "unpack_call" not in str(info.value.__cause__)
    with pytest.raises(RemoteError, match="Worse"):
        peer(mod.fail, "worse")
    with pytest.raises(SystemExit):
        peer(mod.fail, "exit")
    with pytest.raises(Exception, match="l") as info:
        peer(mod.local)
    assert type(info.value).__name__ == "Local"


def test_exception_class_that_the_host_cannot_import(peer, tmp_path):
    (tmp_path / "far_away.py").write_text("class Far(Exception): pass\n")

    def fail(path):
        sys.path.append(path)
        import far_away

        raise far_away.Far("f")

    with pytest.raises(RemoteError, match=r"far_away\.Far: f") as info:
        peer(fail, str(tmp_path))
    assert "ModuleNotFoundError" in info.value.traceback


def test_results_that_cannot_travel(peer):
    with pytest.raises(TypeError, match="lock"):
        peer(threading.Lock)
    assert peer(lambda: lambda x: x + 1)(1) == 2
    assert peer(lambda: 5) == 5


def test_dump_exception_does_not_import_multiprocessing():
    code = (
        "import sys; from runtime import serializer as s\n"
        "class E(Exception): pass\n"
        "try: raise E('x')\n"
        "except E as e: s.dump_exception(e)\n"
        "print('multiprocessing' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])},
    )
    assert done.stdout.strip() == "False"


def test_round_trip_in_one_process():
    """Sender and receiver may be one process (threads, tests): nothing of the sender is overwritten."""
    table, cache = FunctionTable(), FunctionCache()
    seen = []

    def note(n):
        seen.append(n)
        return len(seen)

    ref, payload = pack_call(table, note, (1,))
    fn, args, kwargs = unpack_call(cache, ref.id, ref.data, payload.data)
    assert fn(*args, **kwargs) == 1
    assert seen == []
    assert builtins.len is len
    assert concurrent.futures is not None


def test_a_buffer_within_a_pickle_is_never_a_piece_of_its_own():
    """C pickle would hand over the PickleBuffer itself, and `Pieces` knows only bytes and bytearrays."""
    assert serializer.OUT_OF_BAND_MIN < pickle._Framer._FRAME_SIZE_TARGET
