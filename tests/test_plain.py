"""Plain data arrives exactly, everything else is refused with the place where it is."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import io
import json
import math
import pathlib
import threading
import zoneinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zerodeploy_agent import compactjson, frames, plain
from zerodeploy_agent.plain import PlainError

# surrogates too
TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
ZONES = st.none() | st.builds(
    datetime.timezone, st.timedeltas(datetime.timedelta(hours=-23, minutes=-59), datetime.timedelta(hours=23, minutes=59))
) | st.builds(
    datetime.timezone, st.timedeltas(datetime.timedelta(hours=-20), datetime.timedelta(hours=20)), st.text(max_size=5)
) | st.just(datetime.timezone.utc)  # fmt: skip
FOLDS = st.sampled_from([0, 1])
TIMES = (
    st.dates() | st.timedeltas()
    | st.builds(lambda t, zone, fold: t.replace(tzinfo=zone, fold=fold), st.times(), ZONES, FOLDS)
    | st.builds(lambda t, zone, fold: t.replace(tzinfo=zone, fold=fold), st.datetimes(), ZONES, FOLDS)
)  # fmt: skip
INTS = st.integers() | st.builds(lambda bits, sign: sign << bits, st.sampled_from([63, 8191, 8192, 9000]), st.sampled_from([1, -1]))
HASHABLE = st.recursive(
    st.none() | st.booleans() | INTS | st.floats() | TEXT | st.binary(max_size=20) | TIMES,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=5,
)  # fmt: skip
PLAIN = st.recursive(
    HASHABLE,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.sets(HASHABLE, max_size=3)
    | st.dictionaries(HASHABLE, inner, max_size=3) | st.dictionaries(st.sampled_from(["$", "k", "v", "ä"]) | TEXT, inner, max_size=3),
    max_leaves=15,
)  # fmt: skip


def exact(value: object) -> object:
    """Something that is equal only for values of the same types and contents, nan, -0.0, fold and zone names included."""
    kind = type(value)
    if kind in (list, tuple):
        return kind.__name__, [exact(item) for item in value]
    if kind in (set, frozenset):
        return kind.__name__, sorted((exact(item) for item in value), key=repr)
    if kind is dict:
        return "dict", [(exact(key), exact(item)) for key, item in value.items()]  # the order travels
    if kind is float:
        return "float", "nan" if math.isnan(value) else value.hex()
    if kind is int:
        return "int", hex(value)
    if kind in (datetime.datetime, datetime.time):
        return kind.__name__, repr(value), value.fold, repr(value.tzinfo)
    return kind.__name__, repr(value)


def over_the_wire(value: object) -> object:
    """As it goes in a message: through JSON text, the segments beside it."""
    body, segments = plain.pack(value, "value", 19)
    arrived = compactjson.loads(compactjson.dumps(body))
    assert [len(part) for part in segments] == plain.sizes(arrived)
    return plain.unpack(arrived, segments)


@given(PLAIN)
def test_round_trip(value):
    assert exact(over_the_wire(value)) == exact(value)


@given(PLAIN)
def test_the_tree_is_json(value):
    tree, segments = plain.encode(value)
    text = json.dumps(tree).encode()
    assert all(type(part) is bytes for part in segments)
    assert exact(plain.decode(json.loads(text), segments)) == exact(value)


@pytest.mark.parametrize(
    "value",
    [
        "\ud83d\ude00", "\ud83d" + "\ude00", "\ude00\ud83d", "😀", "", "\x00\x7f\x80", {"$": 1}, {"$": {"$": "bytes", "v": 0}}, {"$": "bytes", "v": 0},
        [{"$": None}], {1: 2, "1": 3, True and "t": 4, None: 5, (): 6, b"b": 7, 2.5: 8, frozenset({1}): 9}, {"\ud800": "\udfff"},
        True, [True, 1, 1.0, False, 0, 0.0, -0.0], 10**5000, -(16**3000), [math.nan, math.inf, -math.inf, 5e-324], b"", [b"a", b"", b"\xff" * 70000],
        ((), [], set(), frozenset(), {}), {frozenset({frozenset(), frozenset({1})})}, {(1, (2, frozenset({3})))},
        datetime.datetime(2020, 10, 25, 2, 30, fold=1), datetime.time(1, 2, 3, 4, fold=1), datetime.timedelta(-1, 5, 7),
        datetime.timedelta.max, datetime.timedelta.min, datetime.datetime.max, datetime.date.min,
        datetime.datetime(1, 1, 1, tzinfo=datetime.timezone.utc), datetime.time(0, tzinfo=datetime.timezone(datetime.timedelta(hours=5, microseconds=1), "X")),
        "x" * 100_000, ["y" * 3000] * 20, list(range(20_000)), {str(i): i for i in range(9000)}, "ä" * 40_000,
    ],
    ids=lambda value: f"{value!s:.20}".encode("ascii", "backslashreplace").decode() if not isinstance(value, int) else "int",
)  # fmt: skip
def test_notable_values(value):
    assert exact(over_the_wire(value)) == exact(value)


def test_utc_stays_the_singleton():
    back = over_the_wire(datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc))
    assert back.tzinfo is datetime.timezone.utc


@given(PLAIN)
def test_what_rides_in_a_message_fits_one(value):
    body, segments = plain.pack([value, "\x00" * 2048, "😀" * 2048], "value", 19)
    assert len(compactjson.dumps(body)) < frames.MAX_CONTROL_BYTES // 8
    assert plain.unpack(body, segments)[1] == "\x00" * 2048


def test_bytes_are_beside_the_tree_never_in_it():
    blob = b"\xfe" * 1000
    body, segments = plain.pack({"a": [blob]}, "value", 7)
    assert segments == [blob] and body["channel"] == 7 and body["sizes"] == [1000]
    assert len(compactjson.dumps(body)) < 200
    assert plain.pack([1, "a"], "value", 7) == ({"tree": [1, "a"]}, [])
    large, segments = plain.pack(list(range(20_000)), "value", 7)
    assert large["packed"] is True and large["sizes"] == [len(segments[0])]


# refused


class Point(collections.namedtuple("Point", "x y")):
    pass


class Level(enum.IntEnum):
    LOW = 1


class Name(str):
    pass


class Plain:
    pass


LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "value is an object"),
        (1j, "value is a complex"),
        (bytearray(b"x"), "value is a bytearray"),
        (range(3), "value is a range"),
        (..., "value is an ellipsis"),
        (len, "value is a builtin_function_or_method"),
        (int, "value is a type"),
        (Plain(), "value is a tests.test_plain.Plain"),
        (decimal.Decimal(1), "value is a decimal.Decimal"),
        (pathlib.PurePosixPath("/x"), "value is a pathlib.PurePosixPath"),
        (iter(()), "value is a tuple_iterator"),
        (datetime.timezone.utc, "value is a datetime.timezone"),
        (Point(1, 2), "value is a tests.test_plain.Point: subclasses do not travel, convert it with tuple(...)"),
        (Level.LOW, "value is a tests.test_plain.Level: subclasses do not travel, convert it with int(...)"),
        (collections.OrderedDict(a=1), "value is a collections.OrderedDict: subclasses do not travel, convert it with dict(...)"),
        (collections.Counter("a"), "value is a collections.Counter: subclasses do not travel, convert it with dict(...)"),
        (Name("n"), "value is a tests.test_plain.Name: subclasses do not travel, convert it with str(...)"),
        ([1, 2, 3, {"conn": LOCK}], "value[3]['conn'] is a _thread.lock"),
        ({"a": (1, [Plain()])}, "value['a'][1][0] is a tests.test_plain.Plain"),
        ({1: {None: {(2, b"k"): io.StringIO()}}}, "value[1][None][(2, b'k')] is a _io.StringIO"),
        ({"a": {Level.LOW: 1}}, "value['a'] is a dict; a key is a tests.test_plain.Level: subclasses do not travel, convert it with int(...)"),
        ([{(1, (2, Plain)): 1}], "value[0] is a dict; at [1][1] of a key is a type"),
        (({1, 2, Plain},), None),
        ({"k" * 100: object()}, "value['" + "k" * 59 + "] is an object"),
        ({10**5000: object()}, "value[...] is an object"),
        ({(10**5000,): object()}, "value[...] is an object"),
        (datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
         "value is a datetime with the zone zoneinfo.ZoneInfo(key='UTC'): only fixed offsets (datetime.timezone) travel"),
    ],
)  # fmt: skip
def test_refused_with_the_place(value, text):
    with pytest.raises(PlainError) as caught:
        plain.encode(value)
    if text is not None:
        assert str(caught.value) == text
    else:
        assert str(caught.value).startswith("value[0][") and str(caught.value).endswith(" is a type")


def test_the_name_is_the_callers():
    with pytest.raises(PlainError) as caught:
        plain.pack([{"conn": LOCK}], "result", 3)
    assert (caught.value.path, caught.value.what) == ("result[0]['conn']", "is a _thread.lock")


@pytest.mark.parametrize("kind", ["list", "dict", "through a tuple"])
def test_cycles(kind):
    if kind == "list":
        value: object = []
        value.append(value)
    elif kind == "dict":
        value = {}
        value["self"] = value
    else:
        inner: list[object] = []
        value = (inner, 1)
        inner.append(value)
    with pytest.raises(PlainError, match="refers to itself, or is nested too deep"):
        plain.encode(value)


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {1: v}, lambda v: frozenset([v])], ids=range(5)
)
def test_deep_nesting_arrives_or_is_refused(wrap):
    value: object = wrap(1)
    arrived = refused = 0
    for _ in range(60):
        for _ in range(20):
            value = wrap(value)
        try:
            body, segments = plain.pack(value, "value", 1)
            text = compactjson.dumps(body)
            plain.unpack(compactjson.loads(text), segments)
            arrived += 1
        except PlainError:
            refused += 1
    assert arrived >= 5 and refused >= 5


# hostile trees

BAD_TREES = [
    {"$": "bytes"}, {"$": "bytes", "v": 5}, {"$": "bytes", "v": "0"}, {"$": "bytes", "v": None}, {"$": "bytes", "v": [0]},
    {"$": "int", "v": "zz"}, {"$": "int", "v": 5}, {"$": "int"}, {"$": "str", "v": [-1]}, {"$": "str", "v": [0x110000]}, {"$": "str", "v": 3},
    {"$": "str", "v": ["a"]}, {"$": "str", "v": [10**30]}, {"$": "dict", "k": [1], "v": []}, {"$": "dict", "v": []}, {"$": "dict", "k": [[]], "v": [1]},
    {"$": "dict", "k": 3, "v": 4}, {"$": "set", "v": [[]]}, {"$": "set", "v": 1}, {"$": "frozenset", "v": [{}]}, {"$": "tuple", "v": None},
    {"$": "tuple"}, {"$": "what", "v": 1}, {"$": 7, "v": 1}, {"$": ["bytes"], "v": 0}, {"$": {}, "v": 0}, {"$": "date", "v": [0, 0, 0]},
    {"$": "date", "v": [2024, 1]}, {"$": "date", "v": "2024"}, {"$": "time", "v": [25, 0, 0, 0], "fold": 0, "tz": None},
    {"$": "time", "v": [1], "tz": None}, {"$": "time", "v": [1], "fold": 7, "tz": None}, {"$": "datetime", "v": [1, 1, 1], "fold": 0},
    {"$": "datetime", "v": [1, 1, 1], "fold": 0, "tz": 5}, {"$": "datetime", "v": [1, 1, 1], "fold": 0, "tz": [9, 0, 0]},
    {"$": "datetime", "v": [1, 1, 1], "fold": 0, "tz": [0, 0, 0, 4]}, {"$": "datetime", "v": [10**30, 1, 1], "fold": 0, "tz": None},
    {"$": "timedelta", "v": [10**12]}, {"$": "timedelta", "v": ["a"]}, {"$": "timedelta", "v": [1e308]}, {"$": "timedelta", "v": [float("nan")]},
]  # fmt: skip


@pytest.mark.parametrize("tree", BAD_TREES, ids=json.dumps)
@pytest.mark.parametrize(
    "within", [lambda t: t, lambda t: [1, {"a": t}], lambda t: {"$": "tuple", "v": [t]}], ids=["bare", "plain", "tuple"]
)
def test_hostile_trees(tree, within):
    with pytest.raises(PlainError, match="^what arrived is not encoded plain data"):
        plain.decode(within(tree), [])


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["bytes", "int", "dict", "0x1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3) | st.fixed_dictionaries(
        {"$": st.sampled_from(["bytes", "int", "str", "dict", "tuple", "set", "frozenset", "date", "time", "datetime", "timedelta"]) | inner, "v": inner},
        optional={"k": inner, "tz": inner, "fold": inner},
    ),
    max_leaves=12,
)  # fmt: skip


@given(HOSTILE, st.lists(st.binary(max_size=3), max_size=2))
def test_decode_raises_nothing_else(tree, segments):
    try:
        plain.decode(tree, segments)
    except PlainError:
        pass


@given(
    st.dictionaries(st.sampled_from(["packed", "tree", "sizes", "channel"]), HOSTILE), st.lists(st.binary(max_size=9), max_size=2)
)
def test_unpack_raises_nothing_else(body, segments):
    try:
        plain.sizes(body)
        plain.unpack(body, segments)
    except PlainError:
        pass


def test_deep_hostile_tree():
    tree: object = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(PlainError, match="RecursionError"):
        plain.decode(tree, [])
    while tree:  # taken apart by hand: freeing it would recurse
        tree = tree[0]


@pytest.mark.parametrize("sizes", [None, 5, "12", [1, -1], [1.0], [True], ["1"], {}])
def test_bad_sizes(sizes):
    with pytest.raises(PlainError, match="no valid sizes"):
        plain.sizes({"sizes": sizes})


def test_no_pickle_no_eval():
    # decoding gives plain types only, whatever is asked for
    for name in ("object", "type", "eval", "builtins.eval", "datetime.timezone", "__class__"):
        with pytest.raises(PlainError):
            plain.decode({"$": name, "v": ["1"]}, [])
