"""json.dumps and json.loads from the C accelerator alone: the package brings `re` and `enum` in, 5 ms of 240.

The accelerator's two constructors are the ones that json/encoder.py and json/scanner.py call, unchanged from 3.8 to
3.13; where they are missing or differ, the package itself is used.
"""

from __future__ import annotations


class _Rules:
    """What json.JSONDecoder would hand to the scanner."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__
    memo: dict[str, str] = {}


try:
    import _json  # type: ignore[import-not-found]

    _scan = _json.make_scanner(_Rules())  # type: ignore[arg-type]
    _encode = _json.make_encoder(None, None, _json.encode_basestring_ascii, None, ":", ",", False, False, True)  # type: ignore[arg-type]

    def dumps(value: object) -> bytes:
        """Compact ASCII JSON; NaN and infinities as Python's json writes them."""
        return "".join(_encode(value, 0)).encode("ascii")

    def loads(data: bytes) -> object:
        """The value of *data*, which holds nothing else. Raises ValueError."""
        text = data.decode("utf-8")
        try:
            value, end = _scan(text, 0)
        except StopIteration:
            raise ValueError("no JSON value") from None
        if end != len(text):
            raise ValueError("something follows the JSON value")
        return value

    dumps([1.5])
except (ImportError, TypeError, AttributeError):  # pragma: no cover - PyPy, a CPython that changed it
    import json

    def dumps(value: object) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode("ascii")

    def loads(data: bytes) -> object:
        return json.loads(data)
