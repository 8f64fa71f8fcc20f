"""Plain data across the wire, exactly: a JSON tree for the structure, raw segments beside it for bytes.

None, bool, int (any size), float (nan and inf too), str (lone surrogates too), list and dict with str keys are JSON as
they are; everything else is an object with the key ``$``. Only the exact types travel: a subclass would arrive as
something else than it was. Decoding builds these types and nothing else; nothing is evaluated, imported or unpickled.
"""

from __future__ import annotations

from . import compactjson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PlainError", "decode", "encode", "pack", "unpack"]

_TAG = "$"
_BIG_BITS = 8192  # beyond: hexadecimal, which is exempt from CPython's limit of 4300 decimal digits
_INLINE_BYTES = 1 << 15  # a tree up to this size rides in its control message, well below frames.MAX_CONTROL_BYTES


class PlainError(Exception):
    """The value cannot travel, or what arrived is no plain data. ``path`` says where, ``what`` what is there."""

    def __init__(self, what: str, path: str = "") -> None:
        super().__init__(what, path)
        self.what = what
        self.path = path

    def __str__(self) -> str:
        return self.path + " " + self.what


def encode(value: object, name: str = "value") -> tuple[object, list[bytes]]:
    """The JSON tree and the byte segments of *value*. Raises `PlainError` with the path from *name*."""
    segments: list[bytes] = []
    try:
        return _encode(value, segments), segments
    except PlainError as error:
        raise PlainError(error.what, name + error.path) from None
    except RecursionError:
        raise PlainError("refers to itself, or is nested too deep", name) from None


def _encode(value: Any, segments: list[bytes]) -> object:
    kind = type(value)
    if value is None or kind is bool or kind is float:
        return value
    if kind is int:
        return value if value.bit_length() < _BIG_BITS else {_TAG: "int", "v": hex(value)}
    if kind is str:
        return value if value.isascii() else _encode_text(value)
    if kind is bytes:
        segments.append(value)
        return {_TAG: "bytes", "v": len(segments) - 1}
    if kind is list:
        return _encode_items(value, segments)
    if kind is tuple or kind is set or kind is frozenset:
        return {_TAG: kind.__name__, "v": _encode_items(value, segments)}
    if kind is dict:
        return _encode_dict(value, segments)
    if kind.__module__ == "datetime":
        tree = _encode_time(value)
        if tree is not None:
            return tree
    raise PlainError(_describe(value))


def _encode_text(value: str) -> object:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # two lone surrogates side by side would come out of JSON as one character
        return {_TAG: "str", "v": [ord(c) for c in value]}
    return value


def _encode_items(values: Any, segments: list[bytes]) -> list[object]:
    out = []
    index = 0
    try:
        for item in values:
            out.append(_encode(item, segments))
            index += 1
    except PlainError as error:
        raise PlainError(error.what, "[%d]%s" % (index, error.path)) from None
    return out


def _encode_dict(value: dict[object, object], segments: list[bytes]) -> object:
    simple = _TAG not in value
    keys, items = [], []
    for key, item in value.items():
        try:
            if type(key) is not str or not key.isascii():
                simple = False
            keys.append(_encode(key, segments))
        except PlainError as error:
            where = "at %s of a key" % error.path if error.path else "a key"
            raise PlainError("is a dict; %s %s" % (where, error.what)) from None
        try:
            items.append(_encode(item, segments))
        except PlainError as error:
            try:
                shown = "%.60r" % (key,)
            except ValueError:  # an int beyond CPython's limit of digits
                shown = "..."
            raise PlainError(error.what, "[%s]%s" % (shown, error.path)) from None
    if simple:
        return dict(zip(keys, items))
    return {_TAG: "dict", "k": keys, "v": items}


def _encode_time(value: Any) -> object:
    import datetime

    if type(value) is datetime.timedelta:
        return {_TAG: "timedelta", "v": [value.days, value.seconds, value.microseconds]}
    if type(value) is datetime.date:
        return {_TAG: "date", "v": [value.year, value.month, value.day]}
    if type(value) is datetime.datetime or type(value) is datetime.time:
        zone: list[object] | None = None
        if value.tzinfo is not None:
            if type(value.tzinfo) is not datetime.timezone:
                raise PlainError(
                    "is a %s with the zone %r: only fixed offsets (datetime.timezone) travel" % (type(value).__name__, value.tzinfo)
                )
            offset, *name = value.tzinfo.__getinitargs__()  # type: ignore[attr-defined]
            zone = [offset.days, offset.seconds, offset.microseconds, *name]
        if type(value) is datetime.datetime:
            numbers = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
        else:
            numbers = [value.hour, value.minute, value.second, value.microsecond]
        return {_TAG: type(value).__name__, "v": numbers, "fold": value.fold, "tz": zone}
    return None


def _describe(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else kind.__module__ + "." + kind.__qualname__
    bases = [b.__name__ for b in (tuple, list, dict, str, int, float, bytes, set, frozenset) if isinstance(value, b)]
    article = "an " if name[:1].lower() in "aeiou" else "a "
    if bases:
        return "is %s%s: subclasses do not travel, convert it with %s(...)" % (article, name, bases[0])
    return "is %s%s" % (article, name)


def decode(tree: object, segments: list[bytes]) -> object:
    """The value of *tree* and *segments*. Raises `PlainError` for anything that `encode` did not make."""
    try:
        return _decode(tree, segments)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise PlainError("is not encoded plain data (%s: %s)" % (type(error).__name__, error), "what arrived") from None


def _decode(tree: Any, segments: list[bytes]) -> object:
    kind = type(tree)
    if kind is list:
        return [_decode(item, segments) for item in tree]
    if kind is not dict:
        return tree
    fields: dict[str, Any] = tree
    tag = fields.get(_TAG)
    if tag is None:
        return {key: _decode(item, segments) for key, item in fields.items()}
    value: Any = fields["v"]
    if tag == "bytes":
        return segments[value]
    if tag == "int":
        return int(value, 16)
    if tag == "str":
        return "".join(map(chr, value))
    if tag == "dict":
        keys: Any = fields["k"]
        if len(keys) != len(value):
            raise ValueError("keys and values differ in number")
        return {_decode(key, segments): _decode(item, segments) for key, item in zip(keys, value)}
    if tag in ("tuple", "set", "frozenset"):
        items = [_decode(item, segments) for item in value]
        return tuple(items) if tag == "tuple" else set(items) if tag == "set" else frozenset(items)
    return _decode_time(str(tag), value, fields)


def _decode_time(tag: str, numbers: list[Any], fields: dict[str, Any]) -> object:
    import datetime

    if tag == "timedelta":
        return datetime.timedelta(*numbers)
    if tag == "date":
        return datetime.date(*numbers)
    if tag not in ("datetime", "time"):
        raise ValueError("unknown tag %.40r" % tag)
    zone = None
    if fields["tz"] is not None:
        offset = fields["tz"]
        zone = datetime.timezone(datetime.timedelta(*offset[:3]), *offset[3:])
    cls: Any = datetime.datetime if tag == "datetime" else datetime.time
    return cls(*numbers, tzinfo=zone, fold=fields["fold"])


def pack(value: object, name: str, channel: int) -> tuple[dict[str, object], list[bytes]]:
    """A message's ``body`` for *value* and what must follow on *channel*, which is nothing for small plain trees."""
    tree, segments = encode(value, name)
    # each level of a small tree costs at least one byte of JSON, so this also bounds what json must nest
    text = compactjson.dumps(tree) if _is_large(tree) else b""
    if len(text) > _INLINE_BYTES:
        return {"channel": channel, "sizes": [len(text), *map(len, segments)], "packed": True}, [text, *segments]
    if segments:
        return {"tree": tree, "channel": channel, "sizes": [len(part) for part in segments]}, segments
    return {"tree": tree}, segments


def _is_large(tree: object) -> bool:
    if type(tree) is str:
        return len(tree) > 2048
    return type(tree) in (list, dict, int)


def unpack(body: dict[str, object], segments: list[bytes]) -> object:
    """The value of a ``body`` whose segments have been read."""
    if body.get("packed"):
        try:
            tree = compactjson.loads(segments[0])
        except (ValueError, IndexError, RecursionError) as error:
            raise PlainError("is not JSON (%s)" % error, "what arrived") from None
        return decode(tree, segments[1:])
    return decode(body.get("tree"), segments)


def sizes(body: dict[str, object]) -> list[int]:
    """The checked sizes of the segments that follow. Raises `PlainError`."""
    listed = body.get("sizes", [])
    if type(listed) is not list or not all(type(size) is int and size >= 0 for size in listed):
        raise PlainError("has no valid sizes", "what arrived")
    return listed
