"""Functions travel as source with what they refer to, or are refused with the thing that can't and the way out."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
import fractions
import functools
import linecache
import math
import os.path
import socket
import sys
import textwrap
import threading
import traceback
import types
import xml.etree.ElementTree
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import pytest

import tests.conftest
from tests.conftest import python_or_skip
from zerodeploy import DeployedServer, NotShippable, RemoteCallError
from zerodeploy.control import functions
from zerodeploy.link.command import LocalLink


@pytest.fixture(scope="module")
def server():
    with DeployedServer(LocalLink(), python_executable=sys.executable) as server:
        yield server


# what it refers to: siblings, constants, imports

FACTOR = 3
TABLE = {"a": [1, 2, (3, b"x")], 4: {5}, "ä": None}
SHADOWED = "module"
annotations = {"a name that": "a __future__ import would overwrite"}


def helper(value):
    return value * FACTOR


def uses_sibling(value):
    return [helper(item) for item in value]


def uses_constants():
    return FACTOR, TABLE, annotations


def uses_imports():
    return (math.floor(2.5), os.path.join("a", "b"), xml.etree.ElementTree.fromstring("<a b='c'/>").attrib, ET.Element("x").tag,
            fractions.Fraction(1, 2) == 0.5, collections.OrderedDict.__name__)  # fmt: skip


def imports_inside():
    import json as j
    from os import path

    return j.dumps([path.basename("/a/b")])


def shadows():
    SHADOWED = "local"
    return SHADOWED, [FACTOR + 1 for FACTOR in (1, 2)], (lambda FACTOR: FACTOR)(7)


def uses_builtins():
    return max(map(len, ["a", "bb"])), __name__


def even(n):
    return True if n == 0 else odd(n - 1)


def odd(n):
    return False if n == 0 else even(n - 1)


def factorial(n):
    return 1 if n < 2 else n * factorial(n - 1)


@pytest.mark.parametrize(
    ("function", "args"),
    [(helper, (4,)), (uses_sibling, ([1, "a"],)), (uses_constants, ()), (uses_imports, ()), (imports_inside, ()), (shadows, ()), (uses_builtins, ()),
     (even, (10,)), (odd, (10,)), (factorial, (30,)), (os.path.join, ("a", "b")), (math.sqrt, (4.0,)), (len, ([1],)), (dict, ([("a", 1)],)),
     (str.upper, ("a",)), (dict.fromkeys, (["a"], 2))],
    ids=lambda part: getattr(part, "__qualname__", None),
)  # fmt: skip
def test_gives_what_it_gives_here(server, function, args):
    assert server.call(function, *args) == function(*args)


# parameters


def all_kinds(a, b=2, /, c=3, *rest, d, e=5, **more):
    return a, b, c, rest, d, e, more


def odd_defaults(
    a=[1, 2],
    b=(
        FACTOR
        + 1
    ),
    c="""two
lines # no comment""", d={"ä": "é"}, *, e=(1,
                    2), f=f"{FACTOR!r:>3}", g=-1,
):  # fmt: skip
    return a, b, c, d, e, f, g


def kept_default(item, seen=[]):
    seen.append(item)
    return list(seen)


def function_default(values, key=abs, other=helper, third=lambda v: -v):
    return sorted(values, key=key), other(2), third(1)


def annotated(a: tests.conftest.Traces, b: int | None = None) -> Nothing:  # noqa: F821
    c: NoSuchName = a  # noqa: F821
    return c, b


def test_parameters(server):
    assert server.call(all_kinds, 1, d=4) == all_kinds(1, d=4)
    assert server.call(all_kinds, 1, 2, 3, 4, 5, d=6, e=7, f=8) == all_kinds(1, 2, 3, 4, 5, d=6, e=7, f=8)
    assert server.call(odd_defaults) == odd_defaults()
    assert server.call(odd_defaults, 1, g=2) == odd_defaults(1, g=2)
    assert server.call(function_default, [-3, 2]) == function_default([-3, 2])
    assert server.call(annotated, 1) == (1, None)
    with pytest.raises(TypeError, match="missing 1 required"):
        server.call(all_kinds)


def test_defaults_have_the_values_of_now(server):
    def f(a=1, *, b=2):
        return a, b

    f.__defaults__, f.__kwdefaults__ = (10,), {"b": 20}
    assert server.call(f) == (10, 20)


def test_a_mutable_default_persists_over_there(server):
    assert [server.call(kept_default, item) for item in "ab"] == [["a"], ["a", "b"]]
    assert kept_default.__defaults__ == ([],)


def test_a_default_that_can_not_travel_is_named(server):
    with pytest.raises(NotShippable, match=r"with_sentinel's global _MISSING is an object, which can't travel.*make it inside"):
        server.call(with_sentinel)


_MISSING = object()


def with_sentinel(value=_MISSING):
    return value is _MISSING


# classes


class Base:
    unit = 10
    scaled = FACTOR * 2

    def __init__(self, value):
        self.value = value

    def total(self):
        return self.value * self.unit + helper(1)

    @staticmethod
    def fresh():
        return Derived(1)

    @classmethod
    def named(cls):
        return cls.__name__

    @property
    def doubled(self):
        return self.value * 2


class Derived(Base):
    unit = Base.unit + 1
    helper = helper

    def total(self):
        return super().total() + 1000

    class Inner:
        text = "inner"


@dataclass(order=True, frozen=True)
class Item:
    name: str
    price: float = 1.5
    tags: list[str] = field(default_factory=list, compare=False)
    LIMIT: ClassVar[int] = FACTOR


@dataclass
class Priced(Item.__base__):
    item: Item | None = None

    def label(self) -> str:
        return f"{self.item.name}: {self.item.price:.2f}"


class Color(enum.Enum):
    RED = 1
    GREEN = enum.auto()


class Pair(NamedTuple):
    left: int
    right: int = 2


class Stack(list):
    def push(self, value):
        self.append(value)
        return self


class Failing(KeyError):
    pass


def uses_classes():
    made = Derived(2)
    return (
        made.total(),
        made.doubled,
        Derived.named(),
        Base.fresh().total(),
        Derived.unit,
        Base.scaled,
        made.Inner.text,
        Derived.helper(1),
    )


def uses_base_only():
    return type(Base.fresh()).__name__, isinstance(Base.fresh(), Base)  # Base's method needs Derived, which needs Base


def uses_dataclasses():
    a, b = Item("a"), Item("b", 2.0, ["x"])
    fields = [f.name for f in dataclasses.fields(Item)]
    return a < b, repr(b), dataclasses.asdict(b), fields, Item.LIMIT, Priced(b).label(), hash(a) == hash(Item("a")), Item.__module__


def uses_other_classes():
    try:
        raise Failing("x")
    except KeyError as error:
        caught = type(error).__name__
    return Color.RED.value, Color(2).name, Pair(1)._asdict(), Stack([1]).push(2)[-1], caught


def class_inside():
    @dataclass
    class Local:
        a: int
        b: ClassVar[int] = 2
        c: str = "c"

    return [f.name for f in dataclasses.fields(Local)]


@pytest.mark.parametrize(
    "function", [uses_classes, uses_base_only, uses_dataclasses, uses_other_classes, class_inside, Base.fresh().named]
)
def test_classes(server, function):
    if isinstance(function, types.MethodType):
        with pytest.raises(NotShippable, match=r"Base.named is a classmethod.*pass a function that calls it"):
            server.call(function)
    else:
        assert server.call(function) == function()


def test_a_class_as_the_function(server):
    with pytest.raises(NotShippable, match=r"result is a tests\.test_functions\.Base, which can't travel back"):
        server.call(Base, 1)
    assert server.call(lambda: Base(3).total()) == 33


def test_shipped_classes_come_back_where_pickles_are_trusted():
    source = "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int = 1\n    def m(self): return 1\ndef f(): return [P(2)]\n"
    module = sys.modules["zd_pickled"] = types.ModuleType("zd_pickled")
    linecache.cache["<pickled>"] = (len(source), None, source.splitlines(True), "<pickled>")
    try:
        exec(compile(source, "<pickled>", "exec"), module.__dict__)
        with DeployedServer(LocalLink(), trust_remote=True) as server:
            assert server.call(module.f) == [module.P(2)]
    finally:
        del sys.modules["zd_pickled"]


class Methods:
    limit = 4

    @staticmethod
    def static(value):
        return value + Methods.limit

    def method(self):
        return 1


def test_static_methods_and_methods_by_class(server):
    assert server.call(Methods.static, 1) == 5
    assert server.call(Methods().static, 1) == 5
    assert server.call(Methods.method, None) == 1


@pytest.mark.parametrize("method", [Methods().method, [1].append, threading.Lock().acquire, Base(1).total])
def test_methods_of_objects(server, method):
    with pytest.raises(NotShippable, match=r"can't travel.*(makes the object on the host|make it inside the function)"):
        server.call(method)


# decorators


def wrapping(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return ["wrapped", function(*args, **kwargs)]

    return wrapper


def times(count):
    def decorate(function):
        def repeated(*args):
            return [function(*args) for _ in range(count)]

        return repeated

    return decorate


class Counting:
    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        return self.count, self.function(*args)


@wrapping
def wrapped(value):
    return value, FACTOR


@times(2)
@times(
    count=3,
)
def repeated(value):
    return value


@functools.lru_cache(maxsize=64)
def cached_fib(n):
    return n if n < 2 else cached_fib(n - 1) + cached_fib(n - 2)


@contextlib.contextmanager
def bracket(log):
    log.append("in")
    yield log
    log.append("out")


def uses_bracket():
    log = []
    with bracket(log):
        log.append("body")
    return log


@Counting
def counted(value):
    return value


def uses_counted():
    return counted(1), counted(2)


@wrapping
def wrapped_recursive(n):
    return [] if n == 0 else wrapped_recursive(n - 1)


def test_decorators(server):
    for function, args in [(wrapped, (1,)), (repeated, ("x",)), (cached_fib, (80,)), (uses_bracket, ()), (wrapped_recursive, (3,))]:
        assert server.call(function, *args) == function(*args)
    assert server.call(uses_counted) == ((1, 1), (2, 2))
    assert server.call(lambda: cached_fib(10) and cached_fib.cache_info().hits > 0) is True
    assert server.call(cached_fib, 5) == 5


# closures and lambdas


def make_adder(amount, base=helper):
    def add(value):
        return base(value) + amount

    return add


def make_counter():
    count = 0

    def increment(step=1):
        nonlocal count
        count += step
        return count

    return increment


def make_recursive(offset):
    def walk(n):
        return offset if n == 0 else 1 + walk(n - 1)

    return walk


def make_recursive_lambda():
    fact = lambda n: 1 if n < 2 else n * fact(n - 1)  # noqa: E731
    return fact


def make_renamed():
    def original(n):
        return 0 if n == 0 else other(n - 1) + 2

    other = original
    return original


def make_mutual():
    def ping(n):
        return n if n == 0 else pong(n - 1)

    def pong(n):
        return ping(n)

    return ping


def nested(value):
    def inner(factor):
        """A docstring
        at column 0."""

        def innermost():
            return value * factor * FACTOR

        return innermost

    return inner(2)()


twice, thrice = (lambda v: v * 2), (lambda v: v * 3)
curried = (lambda a: lambda b: a - b)(10)
nested_lambda = lambda a: (lambda b: a + b)(1)  # noqa: E731
with_default = lambda a, f=lambda v: v + 1, *r, k=(1, 2), **o: (f(a), r, k, o)  # noqa: E731
multi = (  # noqa: E731
    lambda a,
    b=2: [
        a,  # a comment
        b,
        """a
        string""",
    ]
)  # fmt: skip
ops = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "ä": lambda a, b: ("ö", a, b)}
grid = [lambda a, i=i: a * i for i in range(3)]
bound = [(lambda a: a * i) for i in range(3)]


def test_closures(server):
    assert server.call(make_adder(5), 2) == 11 and server.call(make_adder(6, len), "ab") == 8
    counter = make_counter()
    assert [server.call(counter), server.call(counter, 4)] == [1, 5]  # it counts over there
    assert counter() == 1
    assert server.call(make_recursive(100), 5) == 105
    assert server.call(make_recursive_lambda(), 6) == 720
    assert server.call(make_renamed(), 3) == 6
    assert server.call(nested, 5) == nested(5)
    with pytest.raises(
        NotShippable, match=r"make_mutual.pong and ping refer to each other as closures; define them at the top level"
    ):
        server.call(make_mutual())


def test_closure_over_what_can_not_travel(server):
    lock = threading.Lock()
    with pytest.raises(NotShippable, match=r"variable lock is a _thread.lock, which can't travel.*make it inside the function"):
        server.call(lambda: lock.locked())

    def refers_to_later():
        return later

    with pytest.raises(NotShippable, match="refers to later, which has no value yet"):
        server.call(refers_to_later)
    later = 1
    assert server.call(refers_to_later) == 1


def test_lambdas(server):
    assert server.call(twice, 5) == 10 and server.call(thrice, 5) == 15
    assert server.call(curried, 3) == 7
    assert server.call(nested_lambda, 3) == 4
    assert server.call(with_default, 1, k=2, z=3) == (2, (), 2, {"z": 3})
    assert server.call(multi, 1) == multi(1)
    assert [server.call(op, 5, 3) for op in ops.values()] == [8, 2, ("ö", 5, 3)]
    assert [server.call(f, 5) for f in grid] == [0, 5, 10]
    assert [server.call(f, 5) for f in bound] == [10, 10, 10]
    assert (server.call(lambda: FACTOR), server.call(lambda x: x, 2)) == (3, 2)
    assert server.call((lambda a: lambda: lambda: a)(4)()) == 4


def test_partials(server):
    assert server.call(functools.partial(all_kinds, 1, d=4), 9, e=8) == all_kinds(1, 9, d=4, e=8)
    assert server.call(functools.partial(int, base=2), "101") == 5
    assert server.call(functools.partial(functools.partial(helper), 2)) == 6
    assert server.call(uses_partial) == 15
    with pytest.raises(NotShippable, match=r"uses_bad_partial's global bad_partial\.args\[0\] is an object, which can't travel"):
        server.call(uses_bad_partial)
    with pytest.raises(NotShippable, match=r"args\[0\] is an object, which can't travel"):
        server.call(bad_partial)


tripled = functools.update_wrapper(functools.partial(helper, 5), helper)
bad_partial = functools.partial(helper, object())
frozen = functools.partial(dataclass, frozen=True)


def uses_partial():
    return tripled()


def uses_bad_partial():
    return bad_partial()


@frozen
class Frozen:
    a: int = 1


def test_a_partial_as_decorator(server):
    assert server.call(lambda: Frozen(2).a) == 2


# other kinds of functions


async def coroutine(value):
    await asyncio.sleep(0)
    return [helper(value), await inner_coroutine()]


async def inner_coroutine():
    return "inner"


def returns_coroutine():
    return inner_coroutine()


def generator():
    yield 1


async def async_generator():
    yield 1


def test_async(server):
    assert server.call(coroutine, 2) == [6, "inner"]
    assert server.call(returns_coroutine) == "inner"


@pytest.mark.parametrize(("function", "kind"), [(generator, "generator"), (async_generator, "async_generator"), (lambda: map(abs, [1]), "map"),
                                                (lambda: [1, {"k": open}], None)])  # fmt: skip
def test_results_that_can_not_travel(server, function, kind):
    where = rf"result is an? {kind}" if kind else r"result\[1\]\['k'\] is a"
    with pytest.raises(NotShippable, match=where + ".*which can't travel back: return plain data"):
        server.call(function)


calls_seen = 0
log_seen = []


def count_up():
    global calls_seen
    calls_seen += 1
    log_seen.append(calls_seen)
    return calls_seen, list(log_seen)


def test_a_global_persists_between_calls(server):
    assert [server.call(count_up) for _ in range(3)] == [(1, [1]), (2, [1, 2]), (3, [1, 2, 3])]
    assert calls_seen == 0 and log_seen == []


def test_a_changed_constant_is_shipped_again(server, monkeypatch):
    assert server.call(helper, 1) == 3
    monkeypatch.setitem(globals(), "FACTOR", 4)
    assert server.call(helper, 1) == 4 and server.call(uses_sibling, [1]) == [4]


def test_the_same_function_is_shipped_once(server):
    server.call(even, 3)
    sent = server.info.bytes_sent
    server.call(even, 4)
    assert server.info.bytes_sent - sent < 200
    assert functions.prepare(even).shipment.key == functions.prepare(even).shipment.key


# source text of all sorts


def strings_and_syntax(value):
    text = """first
  indented
at column 0 \
joined
\ttab é 漢字 😀
"""
    raw = rb"\x00"
    shown = f"{value!r:>{len(text) % 7}} {'nested':^8} {{}} {(lambda v: v)(value)}"
    if (found := [n for n in (1, 2, 3) if n > 1]) and (last := found[-1]):
        shown += str(last)
    match {"kind": value, "rest": [1, 2]}:
        case {"kind": str(name), "rest": [first, *others]} if others:
            shown += f"{name}{first}{others}"
        case _:
            shown += "?"
    return text, raw, shown; unreachable = 1  # noqa: E702, F841  # fmt: skip


def größe(länge, é="ä"):
    ï = länge  # ünïcode before: columns count bytes
    return {"ö": (lambda ß: ß + ï)(1)}, é


class Ünï:
    if True:

        def tabbed(self, x="é", y=["ä", "é"]):
            return x, y  # noqa


def test_source_of_all_sorts(server):
    for value in ("x", 1):
        assert server.call(strings_and_syntax, value) == strings_and_syntax(value)
    assert server.call(größe, 2) == größe(2)
    assert server.call(lambda: Ünï().tabbed()) == ("é", ["ä", "é"])
    ä, é = (lambda ö: "ä" + ö), (lambda ö: "é" + ö)
    assert server.call(ä, "ü") == "äü" and server.call(é, "ü") == "éü"
    assert server.call(Ünï.tabbed, None) == ("é", ["ä", "é"])


def from_cell(source: str, name: str, cell: str) -> dict[str, object]:
    """What a notebook does with a cell."""
    source = textwrap.dedent(source)
    linecache.cache[cell] = (len(source), None, source.splitlines(True), cell)
    namespace: dict[str, object] = {"__name__": name}
    exec(compile(source, cell, "exec"), namespace)
    return namespace


def test_definitions_on_the_first_line(server):
    cell = from_cell("def f(a, b=(1,\n 2)):\n    return a, b, g(a)\ndef g(a): return a.real\n", "__main__", "<cell 1>")
    assert server.call(cell["f"], 1) == (1, (1, 2), 1)
    assert server.call(from_cell("f = lambda x: x + 1\n", "__main__", "<cell 2>")["f"], 1) == 2
    assert server.call(from_cell("f = (lambda x: lambda y: x - y)(5)\n", "__main__", "<cell 3>")["f"], 1) == 4
    with pytest.raises(ZeroDivisionError) as caught:
        server.call(from_cell("def f(a): return a / 0\n", "__main__", "<cell 4>")["f"], 1)
    assert '"<cell 4>", line 1, in f\n    def f(a): return a / 0' in caught.value.remote_traceback


def test_two_namespaces_of_the_same_name_stay_apart(server):
    one = from_cell("K = 1\ndef f(): return K\n", "cells", "<cell 5>")
    two = from_cell("K = 2\ndef f(): return K\n", "cells", "<cell 6>")
    other = from_cell("def both(): return f(), g()\n", "cells", "<cell 7>")
    other.update(f=one["f"], g=two["f"])
    assert server.call(other["both"]) == (1, 2)


def test_equal_code_with_other_decorators_is_not_confused(server):
    mark = "def mark(text):\n    def decorate(f):\n        return functools.wraps(f)(lambda: text + f())\n    return decorate\n"
    answers = []
    for text in ("one", "two"):
        module = types.ModuleType(f"zd_test_{text}")
        sys.modules[module.__name__] = module
        source = f"import functools\n{mark}@mark('{text}')\ndef f(): return '!'\n"
        name = f"<module {text}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        exec(compile(source, name, "exec"), module.__dict__)
        try:
            answers.append(server.call(module.f))
        finally:
            del sys.modules[module.__name__]
    assert answers == ["one!", "two!"]


# errors

CONNECTION = {"conn": [socket.socket]}
GUARD = threading.Lock()
SOCKET_HOLDER: dict[str, object] = {"deep": [1, GUARD]}


def uses_lock():
    with GUARD:
        return 1


def uses_deep():
    return SOCKET_HOLDER


def calls_uses_lock():
    return uses_lock()


def uses_test_module():
    return zd_only_here.value


zd_only_here = types.ModuleType("zd_only_here")


def no_such_name():
    return undefined_anywhere  # noqa: F821


def test_globals_that_can_not_travel(server):
    out = r", which can't travel\. Pass plain data as an argument instead, or make it inside the function"
    with pytest.raises(NotShippable, match=r"uses_lock's global GUARD is a _thread\.lock" + out):
        server.call(uses_lock)
    with pytest.raises(NotShippable, match=r"uses_lock's global GUARD is a _thread\.lock" + out):
        server.call(calls_uses_lock)
    with pytest.raises(NotShippable, match=r"uses_deep's global SOCKET_HOLDER\['deep'\]\[1\] is a _thread\.lock" + out):
        server.call(uses_deep)
    with socket.socket() as plug:
        with pytest.raises(NotShippable, match=r"variable plug is a socket\.socket" + out):
            server.call(lambda: plug.fileno())


def test_a_module_that_the_host_lacks(server):
    with pytest.raises(
        NotShippable, match=r"needs the module 'zd_only_here'.*which this host does not have.*Install it there, or import it inside"
    ):
        server.call(uses_test_module)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        server.call("no_such_module_at_all:f")
    with pytest.raises(AttributeError, match="no_such_function"):
        server.call("os:no_such_function")


def test_a_name_that_is_nowhere(server):
    with pytest.raises(NameError, match="undefined_anywhere"):
        server.call(no_such_name)


@pytest.mark.parametrize(
    "target", ["", "os", "os:", ":getpid", "os.getpid", "os:get pid", "os:a:b", "o-s:x", "os:x()", "../x:y", "os:1"]
)
def test_targets_that_are_none(server, target):
    with pytest.raises(NotShippable, match=r"is no target: give module:name"):
        server.call(target)


@pytest.mark.parametrize("thing", [None, 3, [helper], object(), Item("a")])
def test_things_that_can_not_be_called(server, thing):
    with pytest.raises(NotShippable, match="can't be called"):
        server.call(thing)


def test_callable_objects(server):
    class Callable:
        def __call__(self):
            return 1

    with pytest.raises(NotShippable, match="can't travel"):
        server.call(Callable())


def test_no_source(server):
    namespace: dict[str, object] = {"__name__": "nowhere"}
    exec(compile("def f(): return 1\nclass C:\n    def m(self): return 1\ng = lambda: 2", "<made>", "exec"), namespace)
    with pytest.raises(NotShippable, match="define it at the top level of a file or a notebook"):
        server.call(namespace["C"])
    for thing in (namespace["f"], namespace["g"]):
        with pytest.raises(
            NotShippable, match="the source of nowhere.* is not to be had.*functions travel as source. Define it in a file"
        ):
            server.call(thing)
    made = type("Made", (), {})
    with pytest.raises(NotShippable, match="does not define the class"):
        server.call(made)
    local = dataclasses.make_dataclass("Local", ["x"])
    with pytest.raises(NotShippable, match="can't travel|not to be had|does not define"):
        server.call(local)

    class Here:
        pass

    with pytest.raises(NotShippable, match="define it at the top level of a file"):
        server.call(Here)


def test_a_file_that_was_changed(server):
    cell = from_cell("\n\ndef f():\n    return 1\n\ng = lambda: 1\n", "changed", "<changed>")
    linecache.cache["<changed>"] = (10, None, ["def other():\n", "    return 1\n"], "<changed>")
    with pytest.raises(NotShippable, match="<changed> line 3 does not define changed.f: was the file changed"):
        server.call(cell["f"])
    with pytest.raises(NotShippable, match="the lambda at <changed> line 6 can't be told"):
        server.call(cell["g"])
    linecache.cache["<changed>"] = (10, None, ["def broken(:\n"], "<changed>")
    with pytest.raises(NotShippable, match="no longer parses"):
        server.call(cell["f"])


class Cellular(Base):
    def total(self):
        return super().total()


def test_a_method_with_super_by_itself(server):
    with pytest.raises(NotShippable, match="uses super.*ship a plain function that uses the class"):
        server.call(Cellular.total, None)


# tracebacks


def line_of(function) -> int:
    return function.__code__.co_firstlineno


def raises_deep():
    text = "é"; helper_that_raises(text)  # noqa: E702  # fmt: skip


def helper_that_raises(text):
    # a comment, which counts as a line

    raise ValueError("from " + text)


def make_raising(value):
    def inside():
        return value["missing"]

    return inside


@dataclass
class Raising:
    a: int

    def boom(self):
        return self.a / 0


def test_tracebacks_show_the_users_file_and_lines(server):
    with pytest.raises(RemoteCallError) as caught:
        server.call(raises_deep)
    text = caught.value.remote_traceback
    assert isinstance(caught.value, ValueError) and caught.value.original.args == ("from é",)
    assert f'File "{__file__}", line {line_of(raises_deep) + 1}, in raises_deep\n    text = "é"; helper_that_raises(text)' in text
    assert (
        f'File "{__file__}", line {line_of(helper_that_raises) + 3}, in helper_that_raises\n    raise ValueError("from " + text)\n'
        in text
    )
    assert text.startswith("Traceback (most recent call last):\n  File") and "agent.pyz" not in text
    assert text.rstrip().endswith("ValueError: from é")


def test_tracebacks_of_closures_lambdas_and_methods(server):
    inside = make_raising({})
    with pytest.raises(KeyError) as caught:
        server.call(inside)
    assert f'line {line_of(inside) + 1}, in inside\n        return value["missing"]' in textwrap.indent(
        caught.value.remote_traceback, "    "
    )
    with pytest.raises(ZeroDivisionError) as caught:
        server.call(lambda: Raising(1).boom())
    assert f"line {line_of(Raising.boom) + 1}, in boom\n    return self.a / 0" in caught.value.remote_traceback
    failing = lambda v: v[0]  # noqa: E731
    with pytest.raises(IndexError) as caught:
        server.call(failing, [])
    assert f"line {line_of(failing)}, in <lambda>\n    lambda v: v[0]" in caught.value.remote_traceback


def raises_group():
    raise ExceptionGroup("several", [ValueError(1)])  # noqa: F821


def raises_syntax():
    compile("a b", "some file", "exec")


def raises_stop():
    raise StopIteration(3)


def raises_unicode():
    b"\xff".decode()


def raises_own():
    raise Failing("key")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no exception groups in this Python")
def test_exception_groups(server):
    with pytest.raises(RemoteCallError, match="ExceptionGroup: several"):
        server.call(raises_group)


def test_errors_of_all_sorts(server):
    for function, kind in [
        (raises_stop, StopIteration),
        (raises_unicode, UnicodeDecodeError),
        (raises_own, KeyError),
        (raises_syntax, SyntaxError),
    ]:
        with pytest.raises(kind) as caught:
            server.call(function)
        error = caught.value
        assert isinstance(error, RemoteCallError) and error.host == "localhost"
        shown = "".join(traceback.format_exception(error))
        assert f"in {function.__name__}\n" in error.remote_traceback and f"in {function.__name__}\n" in shown


# pickle


def describe(value, **more):
    return type(value).__name__, str(value), sorted(more)


def test_pickled_arguments(server):
    assert server.call(describe, fractions.Fraction(1, 3), pickle_args=True, z=1j) == ("Fraction", "1/3", ["z"])
    with pytest.raises(NotShippable, match=r"args\[0\] is a fractions.Fraction.*pickle_args=True"):
        server.call(describe, fractions.Fraction(1, 3))
    with pytest.raises(NotShippable, match=r"kwargs\['z'\] is a complex"):
        server.call(describe, 1, z=1j)


# other Pythons over there


def new_syntax(value):
    match value:
        case [first, *_]:
            return first
    return None


def modern_but_old_enough(value: int | None, *, names: list[str] = ["a"]) -> dict[str, int]:
    if (n := len(names)) and value is not None:
        return {"never": n} | {} if False else {f"{name=}": n for name in names}
    return {}


def version():
    return "%d.%d" % sys.version_info[:2]


@pytest.mark.slow
@pytest.mark.parametrize("there", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
def test_every_python_over_there(there):
    with DeployedServer(LocalLink(), python_executable=python_or_skip(there)) as server:
        assert server.call(version) == there
        for function in (uses_constants, uses_imports, uses_classes, uses_base_only, uses_dataclasses, uses_other_classes, class_inside,
                         uses_bracket, imports_inside, shadows, odd_defaults):  # fmt: skip
            assert server.call(function) == function(), function.__name__
        assert server.call(cached_fib, 30) == cached_fib(30) and server.call(wrapped, 2) == wrapped(2)
        assert (
            server.call(make_recursive(3), 4) == 7
            and server.call(make_recursive_lambda(), 5) == 120
            and server.call(curried, 3) == 7
        )
        assert server.call(größe, 2) == größe(2) and server.call(multi, 1) == multi(1) and server.call(repeated, 1) == repeated(1)
        assert server.call(modern_but_old_enough, 1) == {"name='a'": 1}
        assert server.call(coroutine, 2) == [6, "inner"]
        assert server.call(uses_dataclasses)[-1] == __name__
        with pytest.raises(KeyError) as caught:
            server.call(make_raising({}))
        assert (
            f'File "{__file__}", line ' in caught.value.remote_traceback
            and 'return value["missing"]' in caught.value.remote_traceback
        )
        if there in ("3.8", "3.9"):
            with pytest.raises(
                NotShippable,
                match=rf"Python {there} does not understand the source of new_syntax: .*Write it in syntax that it has",
            ):
                server.call(new_syntax, [1])
        else:
            assert server.call(new_syntax, [1, 2]) == 1
        deep: object = 1
        for depth in range(1, 1200):
            deep = (deep,)
            if depth % 50 == 0:
                try:
                    assert server.call("builtins:len", deep) == 1
                except NotShippable as error:
                    assert "nested too deep" in str(error) or "is not encoded plain data" in str(error)


# a shipment is used again as long as nothing it was made of has changed


def shipped_again(function) -> bool:
    """Whether *function* is shipped as it was the last time, without being looked through again."""
    return functions.prepare(function) is functions.prepare(function)


def test_what_did_not_change_is_not_looked_through_again(server):
    assert shipped_again(uses_sibling) and shipped_again(lambda: None)
    kept = [functions.prepare(one) for one in [(lambda value: value + 1) for _ in range(3)]]
    assert kept[0] is kept[1] is kept[2]
    assert not shipped_again(uses_constants)  # what a table holds may change, and the table be the same
    assert not shipped_again(make_recursive(1))


def test_every_change_is_seen_at_the_next_call(server, monkeypatch):
    assert server.call(uses_sibling, [2]) == [6] == server.call(uses_sibling, [2])
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 5)
    assert server.call(uses_sibling, [2]) == [10]
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda value: value - FACTOR)
    assert server.call(uses_sibling, [2]) == [-3]
    monkeypatch.undo()
    assert server.call(uses_sibling, [2]) == [6]
    monkeypatch.setattr(helper, "__code__", fail_differently.__code__)
    assert server.call(uses_sibling, [2]) == ["another body 2"]
    monkeypatch.undo()
    assert server.call(uses_sibling, [2]) == [6]


def fail_differently(value):
    return f"another body {value}"


def with_plain_default(value=1):
    return value


def test_twins_differ_in_what_they_hold(server, monkeypatch):
    assert [server.call(lambda bound=bound: bound) for bound in (1, 1000, "x")] == [1, 1000, "x"]
    assert [server.call(one) for one in [(lambda: bound) for bound in (1, 2)]] == [2, 2]
    assert server.call(with_plain_default) == 1
    monkeypatch.setattr(with_plain_default, "__defaults__", (7,))
    assert server.call(with_plain_default) == 7
    mutable = [1]

    def closed():
        return mutable

    assert server.call(closed) == [1]
    mutable.append(2)
    assert server.call(closed) == [1, 2]
