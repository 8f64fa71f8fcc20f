"""Frames, messages, state tables, windows and channels: bytes in, objects out, and nothing but the named errors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rpyc.core import brine
from zerodeploy_agent import compactjson, control, frames, keeper, messages, rpcwire
from zerodeploy_agent.frames import ChannelError, Decoder, FrameError
from zerodeploy_agent.messages import Message, MessageError, UnknownMessage
from zerodeploy_agent.mux import GRANT_BYTES, WINDOW_BYTES, ChannelState
from zerodeploy_agent.streams import Channels

# frames

FRAMES = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 4), st.binary(max_size=40)).map(
    lambda frame: (frame[0], frame[1], b"" if frame[1] == frames.EOF else frame[2][:4] if frame[1] == frames.WINDOW else frame[2])
)


def decode_all(decoder: Decoder) -> list[tuple[int, int, bytes]]:
    return list(iter(decoder.next_frame, None))


@given(st.lists(FRAMES, max_size=8), st.data())
def test_any_cut_gives_the_same_frames(sent, data):
    wire = b"".join(frames.encode(*frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    decoder, seen = Decoder(), []
    for start, stop in zip([0, *cuts], [*cuts, len(wire)]):
        decoder.feed(wire[start:stop])
        seen += decode_all(decoder)
    assert seen == sent


@given(st.lists(FRAMES, max_size=5), st.integers(1, 5))
def test_frames_fed_in_pieces_before_any_is_asked_for(sent, size):
    wire = b"".join(frames.encode(*frame) for frame in sent)
    decoder = Decoder()
    for start in range(0, len(wire), size):
        decoder.feed(wire[start : start + size])
    assert decode_all(decoder) == sent


def test_frame_header_is_as_documented():
    assert frames.encode(7, frames.DATA, b"abc") == struct.pack(">IIB", 3, 7, 1) + b"abc"
    assert frames.HEADER_BYTES == 9


LIMITS = {
    frames.CONTROL: frames.MAX_CONTROL_BYTES, frames.DATA: frames.MAX_DATA_BYTES, frames.WINDOW: 4, frames.EOF: 0, frames.RESET: 1024,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "limit"), LIMITS.items())
def test_largest_frame_and_one_byte_more(kind, limit):
    decoder = Decoder()
    decoder.feed(frames.encode(1, kind, bytes(limit)))
    assert decoder.next_frame() == (1, kind, bytes(limit))
    with pytest.raises(FrameError, match=str(limit)):
        frames.encode(1, kind, bytes(limit + 1))
    decoder.feed(frames.HEADER.pack(limit + 1, 1, kind))  # refused before a byte of it has come
    with pytest.raises(FrameError, match=str(limit + 1)):
        decoder.next_frame()


@pytest.mark.parametrize("kind", [5, 6, 127, 255])
def test_unknown_kind(kind):
    decoder = Decoder()
    decoder.feed(frames.HEADER.pack(0, 1, kind))
    with pytest.raises(FrameError, match=f"unknown frame kind {kind}"):
        decoder.next_frame()


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_garbage_is_frames_or_a_frame_error(pieces):
    decoder = Decoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
            decode_all(decoder)
    except FrameError:
        pass


def test_many_frames_in_one_feed_and_a_large_one_in_many():
    decoder = Decoder()
    decoder.feed(b"".join(frames.encode(n, frames.DATA, b"%d" % n) for n in range(2000)))
    assert decode_all(decoder) == [(n, frames.DATA, b"%d" % n) for n in range(2000)]
    large = bytes(range(256)) * 4096
    wire = frames.encode(1, frames.CONTROL, large)
    for start in range(0, len(wire), 1000):
        assert decoder.next_frame() is None
        decoder.feed(wire[start : start + 1000])
    assert decoder.next_frame() == (1, frames.CONTROL, large)


# messages

CLASSES = sorted(messages._TYPES.values(), key=lambda cls: cls.tag)
SAMPLES: dict[type, list[object]] = {
    int: [0, -5, 2**70], str: ["", "täxt\n\u2028\x00"], float: [0.25], bool: [True, False], type(None): [None],
    list: [[], [1, "a", None, [2.5]]], dict: [{}, {"a": [1], "b": {"c": "d"}}],
}  # fmt: skip


def samples(cls: type[Message]) -> list[dict[str, object]]:
    """Field values that use every accepted type of every field at least once."""
    choices = {name: [sample for kind in types for sample in SAMPLES[kind]] for name, types in cls.FIELDS.items()}
    longest = max(map(len, choices.values()), default=1)
    return [{name: values[i % len(values)] for name, values in choices.items()} for i in range(longest)]


def test_every_message_class_is_known_by_its_tag():
    public = {value for value in vars(messages).values() if isinstance(value, type) and issubclass(value, Message)} - {Message}
    assert set(CLASSES) == public and len({cls.tag for cls in CLASSES}) == len(CLASSES) > 30
    assert messages.WorkerDied.tag == "worker_died" and messages.OpenRpc.tag == "open_rpc"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.tag)
class TestEveryMessage:
    def test_round_trip(self, cls):
        for fields in samples(cls):
            message = cls(**fields)
            wire = messages.dump(message)
            assert json.loads(wire)["type"] == cls.tag
            back = messages.load(wire)
            assert back == message and type(back) is cls and vars(back) == fields and hash(back) == hash(message)

    def test_defaults_are_left_out_and_come_back(self, cls):
        fields = {name: value for name, value in samples(cls)[0].items() if name not in cls.DEFAULTS}
        message = cls(**fields)
        wire = messages.dump(message)
        assert set(json.loads(wire)) == {"type", *fields}
        assert vars(messages.load(wire)) == {**cls.DEFAULTS, **fields}

    def test_missing_field(self, cls):
        fields = samples(cls)[0]
        for name in cls.FIELDS:
            less = {key: value for key, value in fields.items() if key != name}
            wire = json.dumps({"type": cls.tag, **less}).encode()
            if name in cls.DEFAULTS:
                messages.load(wire)
                continue
            with pytest.raises(MessageError, match=f"lacks the field '{name}'"):
                messages.load(wire)

    def test_ill_typed_field(self, cls):
        fields = samples(cls)[0]
        for name, types in cls.FIELDS.items():
            for kind, values in SAMPLES.items():
                if kind not in types:  # bool is no int here: True must not pass for 1
                    with pytest.raises(MessageError, match=rf"{cls.tag}\.{name} is "):
                        messages.load(json.dumps({"type": cls.tag, **fields, name: values[0]}).encode())

    def test_unknown_fields_are_ignored_on_the_wire_and_refused_here(self, cls):
        fields = samples(cls)[0]
        wire = json.dumps({"type": cls.tag, **fields, "later": [1], "self": 2}).encode()
        assert messages.load(wire) == cls(**fields)
        with pytest.raises(MessageError, match="has no field"):
            cls(**fields, later=1)

    def test_frozen(self, cls):
        message = cls(**samples(cls)[0])
        for name in (*cls.FIELDS, "anything"):
            with pytest.raises(AttributeError, match="frozen"):
                setattr(message, name, 1)


def test_messages_of_different_classes_differ():
    assert messages.Ping(seq=1) != messages.Pong(seq=1)
    assert messages.Ping(seq=1) != messages.Ping(seq=2)
    assert messages.Ping(seq=1) != 1


def test_token_is_not_in_a_repr():
    for cls in (messages.Session, messages.Setup):
        shown = repr(cls(**{**samples(cls)[0], "token": "5ec4e7"}))
        assert "5ec4e7" not in shown and "token='...'" in shown
    assert repr(messages.Ping(seq=7)) == "Ping(seq=7)"


@pytest.mark.parametrize(("fields", "expected"), [({"id": 12}, 12), ({}, None), ({"id": "x"}, None), ({"id": True}, None)])
def test_unknown_type_names_the_request(fields, expected):
    with pytest.raises(UnknownMessage) as caught:
        messages.load(json.dumps({"type": "from_the_future", **fields}).encode())
    assert caught.value.id == expected


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b"null", b"1", b'"ping"', b"{}", b'{"type":null}', b'{"type":["ping"]}', b'{"type":{}}', b"\xff\xfe", b"nul",
     b'{"type":"ping"}', b'{"type":"ping","seq":1.5}', b'{"type":"ping","seq":1} ', b"[" * 100_000, b'{"a":' * 100_000,
     b'{"type":"ping","seq":' + b"9" * 100_000 + b"}", b'{"type":"message"}'],
)  # fmt: skip
def test_broken_messages(payload):
    with pytest.raises(MessageError):
        messages.load(payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(st.binary(max_size=80))
def test_fuzz_bytes(payload):
    try:
        messages.load(payload)
    except MessageError:
        pass


@given(st.sampled_from(CLASSES), st.data())
def test_fuzz_fields(cls, data):
    fields = {name: data.draw(JSON) for name in cls.FIELDS}
    try:
        loaded = messages.load(
            json.dumps({"type": cls.tag, **fields, **data.draw(st.dictionaries(st.text(max_size=5), JSON, max_size=2))}).encode()
        )
    except MessageError:
        return
    assert isinstance(loaded, Message)


# states

TABLES = {"client": control.CLIENT, "keeper": control.KEEPER}
PAIRS = [
    (end, state, event)
    for end, table in TABLES.items()
    for state in table
    for event in sorted({event for cells in table.values() for event in cells})
]


@pytest.mark.parametrize(("end", "state", "event"), PAIRS)
def test_every_pair(end, state, event):
    table = TABLES[end]
    if event in table[state]:
        after = control.advance(table, state, event)
        assert after in table
        order = list(table)
        assert order.index(after) >= order.index(state)  # no way back
    else:
        with pytest.raises(control.StateError, match=f"'{event}' is not expected in state '{state}'"):
            control.advance(table, state, event)


@pytest.mark.parametrize("end", TABLES)
def test_tables_are_whole(end):
    table = TABLES[end]
    tags = {cls.tag for cls in CLASSES} | {control.PEER_LOST, "worker_lost"}
    assert {event for cells in table.values() for event in cells} <= tags
    assert all(cells[control.PEER_LOST] == control.CLOSED for cells in table.values())
    assert set(table[control.CLOSED]) == {control.PEER_LOST}  # the end is the end
    reached, todo = set(), [next(iter(table))]
    while todo:
        state = todo.pop()
        reached.add(state)
        todo += set(table[state].values()) - reached
    assert reached == set(table)
    with pytest.raises(control.StateError):
        control.advance(table, control.CLOSED, "live")


def test_a_session_of_either_end():
    state = control.CONNECTING
    for event in ("greeting", "live", "pong", "dropped", "terminating", "terminated"):
        state = control.advance(control.CLIENT, state, event)
    assert state == control.CLOSED
    state = control.WAITING
    for event in ("session", "ping", "inspect", "terminate", "ping", control.PEER_LOST):
        state = control.advance(control.KEEPER, state, event)
    assert state == control.CLOSED


# windows


def window_frame(number: int, size: int) -> bytes:
    return frames.encode(number, frames.WINDOW, struct.pack(">I", size))


def test_spending_the_window():
    channel = ChannelState(5)
    assert channel.spend(100) == 100
    assert channel.spend(WINDOW_BYTES) == WINDOW_BYTES - 100
    assert channel.spend(1) == 0
    channel.feed(frames.WINDOW, struct.pack(">I", 10))
    assert channel.spend(11) == 10
    channel.feed(frames.RESET, b"enough")
    with pytest.raises(ChannelError, match="channel 5: enough"):
        channel.spend(1)


def test_taking_grants_in_steps():
    channel, piece = ChannelState(5), bytes(frames.MAX_DATA_BYTES)
    for _ in range(GRANT_BYTES // len(piece) + 1):
        channel.feed(frames.DATA, piece)
    assert channel.take(GRANT_BYTES - 1) == (bytes(GRANT_BYTES - 1), b"")
    data, answer = channel.take(1)
    assert data == b"\0" and answer == window_frame(5, GRANT_BYTES)
    assert channel.take(1 << 30) == (piece, b"") and channel.take(1) == (b"", b"")


def test_no_grant_after_the_end():
    channel = ChannelState(5)
    for _ in range(GRANT_BYTES // frames.MAX_DATA_BYTES):
        channel.feed(frames.DATA, bytes(frames.MAX_DATA_BYTES))
    channel.feed(frames.EOF, b"")
    assert channel.take(1 << 30) == (bytes(GRANT_BYTES), b"")


def test_a_peer_that_ignores_the_window():
    channel, piece = ChannelState(5), bytes(frames.MAX_DATA_BYTES)
    for _ in range(WINDOW_BYTES // len(piece)):
        channel.feed(frames.DATA, piece)
    channel.take(1000)  # taken, but not granted again
    with pytest.raises(ChannelError, match="past its window"):
        channel.feed(frames.DATA, b"x")


@pytest.mark.parametrize(("feeds", "text"), [
    ([(frames.EOF, b""), (frames.DATA, b"x")], "data after its end"),
    ([(frames.WINDOW, b"123")], "a window frame of 3 bytes"),
])  # fmt: skip
def test_broken_rules(feeds, text):
    channel = ChannelState(9)
    with pytest.raises(ChannelError, match=f"channel 9: {text}"):
        for kind, payload in feeds:
            channel.feed(kind, payload)


def test_after_a_reset_nothing_counts():
    channel = ChannelState(9)
    channel.feed(frames.RESET, b"\xffgone")
    channel.feed(frames.DATA, b"late")
    channel.feed(frames.WINDOW, b"odd")
    assert channel.reset == "\ufffdgone" and channel.take(9) == (b"", b"")
    other = ChannelState(9)
    other.feed(frames.RESET, b"")
    assert other.reset == "reset by the peer"


@given(st.lists(st.binary(max_size=50), max_size=20), st.lists(st.integers(1, 70), max_size=40))
def test_what_is_taken_is_what_was_fed(pieces, limits):
    channel = ChannelState(1)
    for piece in pieces:
        channel.feed(frames.DATA, piece)
    taken = []
    for limit in [*limits, 1 << 20]:
        data, _ = channel.take(limit)
        assert len(data) <= limit
        taken.append(data)
    while channel.chunks:
        taken.append(channel.take(1 << 20)[0])
    assert b"".join(taken) == b"".join(pieces) and channel.held == 0


@given(st.lists(st.integers(1, frames.MAX_DATA_BYTES), max_size=60), st.integers(1, 1 << 20))
def test_credit_and_buffer_never_exceed_the_window(sizes, limit):
    sender, receiver = ChannelState(1), ChannelState(1)
    sent = got = 0
    for size in sizes * 3:
        allowed = sender.spend(size)
        if allowed:
            receiver.feed(frames.DATA, bytes(allowed))
            sent += allowed
        data, answer = receiver.take(limit)
        got += len(data)
        if answer:
            sender.feed(frames.WINDOW, answer[frames.HEADER_BYTES :])
        assert sender.credit + receiver.held + receiver.taken == WINDOW_BYTES
    assert got + receiver.held == sent


# channels


class Pair:
    """Two ends whose frames go straight to each other, through a decoder."""

    def __init__(self) -> None:
        self.ends: list[Channels] = [Channels(self.sender(1)), Channels(self.sender(0))]
        self.left, self.right = self.ends
        self.lock = threading.Lock()
        self.kinds: list[int] = []

    def sender(self, to: int):
        decoder = Decoder()

        def send(*buffers: bytes | memoryview) -> None:
            for buffer in buffers:
                decoder.feed(bytes(buffer))
            for number, kind, payload in decode_all(decoder):
                self.kinds.append(kind)
                self.ends[to].deliver(number, kind, payload)

        return send

    def open(self, number: int = 20):
        return self.left.open(number), self.right.open(number)


def in_thread(function, *args) -> tuple[threading.Thread, list[object]]:
    """Runs *function*; the list gets what it gave or raised."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(function(*args))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def joined(thread: threading.Thread, outcome: list[object]) -> object:
    thread.join(10)
    assert not thread.is_alive()
    return outcome[0]


def test_channel_passes_bytes_and_the_end():
    one, other = Pair().open()
    one.write(b"abcdef")
    one.write(bytearray(b"gh"))
    one.write(memoryview(b"ij"))
    one.write(b"")
    assert other.read(4) == b"abcd" and other.read_exactly(4) == b"efgh" and other.read() == b"ij"
    one.end()
    one.end()
    assert other.read() == b"" == other.read()
    other.write(b"back")  # the other direction is open still
    assert one.read() == b"back"
    with pytest.raises(ChannelError, match="ended 2 bytes early"):
        other.read_exactly(2)


def test_wide_items_travel_as_bytes():
    one, other = Pair().open()
    one.write(memoryview(struct.pack("=3I", 1, 2, 3)).cast("I"))
    assert other.read() == struct.pack("=3I", 1, 2, 3)


def test_readable():
    one, other = Pair().open()
    assert not other.readable(0)
    one.write(b"x")
    assert other.readable(0) and other.read() == b"x" and not other.readable(0)
    one.end()
    assert other.readable(None)


def test_read_waits_for_bytes():
    one, other = Pair().open()
    waiting = in_thread(other.read_exactly, 6)
    one.write(b"abc")
    assert waiting[0].is_alive()
    one.write(b"def")
    assert joined(*waiting) == b"abcdef"


def test_write_waits_for_the_reader_and_bulk_is_whole():
    pair = Pair()
    one, other = pair.open()
    bulk = bytes(range(256)) * (3 * WINDOW_BYTES // 256) + b"end"
    writing = in_thread(one.write, bulk)
    assert other.read_exactly(len(bulk)) == bulk
    assert joined(*writing) is None
    assert pair.kinds.count(frames.WINDOW) >= 2
    full = in_thread(one.write, bytes(WINDOW_BYTES + GRANT_BYTES))
    assert other.read_exactly(WINDOW_BYTES) == bytes(WINDOW_BYTES)
    assert joined(*full) is None


def test_fail_wakes_readers_and_writers():
    pair = Pair()
    one, other = pair.open()
    one.write(bytes(WINDOW_BYTES))
    writing = in_thread(one.write, b"one more")
    reading = in_thread(one.read)
    pair.left.break_all("the link is gone")
    for waiting in (writing, reading):
        error = joined(*waiting)
        assert isinstance(error, ChannelError) and "the link is gone" in str(error)
    with pytest.raises(ChannelError, match="the link is gone"):
        pair.left.open(99).read()
    one.end()
    one.fail("later reasons do not count")
    with pytest.raises(ChannelError, match="the link is gone"):
        one.write(b"x")
    assert other.read(3) == b"\0\0\0"  # what had come stays readable


def test_close_tells_the_peer_why_and_forgets():
    pair = Pair()
    one, other = pair.open(21)
    reading = in_thread(one.read)
    other.close("not needed any more")
    error = joined(*reading)
    assert isinstance(error, ChannelError) and "not needed any more" in str(error)
    with pytest.raises(ChannelError, match="closed"):
        other.read()
    assert pair.right.get(21) is None and pair.left.get(21) is one
    pair.right.deliver(21, frames.DATA, b"late")  # dropped
    other.close()
    assert pair.kinds.count(frames.RESET) == 1


def test_close_after_both_ends_is_quiet():
    pair = Pair()
    one, other = pair.open()
    one.end()
    other.end()
    one.close()
    other.close()
    assert frames.RESET not in pair.kinds


def test_long_reasons_are_cut():
    pair = Pair()
    one, other = pair.open()
    other.close("x" * 5000)
    with pytest.raises(ChannelError, match="x{1024}$"):
        one.read()


# JSON

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=6), inner, max_size=4), max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_compactjson_is_json(value):
    text = compactjson.dumps(value)
    assert text == json.dumps(value, separators=(",", ":")).encode("ascii")
    assert repr(compactjson.loads(text)) == repr(json.loads(text))


@given(st.text(max_size=30) | st.text('{}[],:"0123456789.eE-truefalsn \\u', max_size=30))
def test_compactjson_refuses_what_json_refuses(text):
    data = text.encode()
    try:
        expected: object = json.loads(data)
    except ValueError:
        with pytest.raises(ValueError):
            compactjson.loads(data)
    else:
        if text == text.strip():  # it takes nothing before or after the value
            assert repr(compactjson.loads(data)) == repr(expected)
        else:
            with pytest.raises(ValueError):
                compactjson.loads(data)


def test_compactjson_specials():
    assert compactjson.dumps([math.nan, math.inf, -math.inf, "é\ud800", None]) == b'[NaN,Infinity,-Infinity,"\\u00e9\\ud800",null]'
    assert compactjson.loads(b"[Infinity,-Infinity]") == [math.inf, -math.inf]
    for bad in (object(), {1: object()}, b"x", {(1,): 2}):
        with pytest.raises(TypeError):
            compactjson.dumps(bad)


# RPyC's wire: our coder beside rpyc's own

ATOMS = (
    st.none() | st.booleans() | st.integers() | st.integers(-0x40, 0x100) | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False) | st.text(max_size=300) | st.binary(max_size=300) | st.sampled_from([..., NotImplemented])
)  # fmt: skip
BRINE = st.recursive(
    ATOMS | st.frozensets(ATOMS, max_size=3),
    lambda inner: st.lists(inner, max_size=6).map(tuple) | st.builds(slice, inner, inner, inner),
    max_leaves=20,
)


@given(BRINE)
def test_brine_is_written_and_read_as_rpyc_does(value):
    parts: list[bytes] = []
    rpcwire.dump(value, parts)
    wire = b"".join(parts)
    assert brine.load(wire) == value
    assert rpcwire.load(brine.dump(value) + b"rest", 0) == (value, len(brine.dump(value)))
    assert repr(rpcwire.loads(wire)) == repr(brine.load(wire))  # True is not 1, -0.0 not 0.0
    if not _holds_sets(value):  # a set has no order
        assert wire == brine.dump(value)


def _holds_sets(value: object) -> bool:
    if isinstance(value, slice):
        return any(map(_holds_sets, (value.start, value.stop, value.step)))
    return isinstance(value, frozenset) or (isinstance(value, tuple) and any(map(_holds_sets, value)))


@pytest.mark.parametrize("size", [0, 1, 4, 5, 255, 256, 70000])
def test_brine_sizes(size):
    for value in (("t",) * size, "s" * size, b"b" * size, 10 ** min(size, 4000)):
        assert rpcwire.dumps(value) == brine.dump(value)
        assert rpcwire.loads(brine.dump(value)) == value


@given(st.binary(max_size=40))
def test_brine_of_anything_ends_in_a_value_or_a_named_error(data):
    with contextlib.suppress(ValueError, IndexError, TypeError, struct.error):
        rpcwire.loads(data)


def test_what_brine_does_not_carry():
    with pytest.raises(TypeError, match="cannot dump"):
        rpcwire.dumps(([1],))


# the keeper's way of passing frames on


@given(st.lists(FRAMES.map(lambda f: (f[0] % 4, f[1], f[2])), max_size=8), st.data())
def test_the_keeper_passes_on_what_is_not_its_own(sent, data):
    wire = b"".join(frames.encode(*frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    mine, passed = feed_in_pieces([wire[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(wire)])])
    assert mine == [payload for channel, _, payload in sent if channel == messages.KEEPER_CHANNEL]
    assert passed == b"".join(frames.encode(*frame) for frame in sent if frame[0] != messages.KEEPER_CHANNEL)


def feed_in_pieces(pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    reading, writing = os.pipe()
    feed, mine, passed = keeper.Feed(reading), [], b""
    try:
        for piece in pieces:
            while piece:
                piece = piece[os.write(writing, piece[: 1 << 15]) :]
                assert feed.read()
                own, runs = feed.split()
                mine += own
                passed += b"".join(runs)
                feed.done()
    finally:
        os.close(reading)
        os.close(writing)
    return mine, passed


def test_the_keeper_passes_large_frames_and_long_runs():
    large = frames.encode(1, frames.CONTROL, os.urandom(frames.MAX_CONTROL_BYTES))
    bulk = [frames.encode(20, frames.DATA, os.urandom(frames.MAX_DATA_BYTES)) for _ in range(20)]
    own = frames.encode(messages.KEEPER_CHANNEL, frames.CONTROL, b"{}")
    wire = b"".join([*bulk[:9], large, own, *bulk[9:], own])
    mine, passed = feed_in_pieces([wire[at : at + 50_000] for at in range(0, len(wire), 50_000)])
    assert mine == [b"{}", b"{}"] and passed == b"".join([*bulk[:9], large, *bulk[9:]])
