"""Templates in f-string syntax, evaluated by walking the `ast`: the expressions of a config may compute, and do nothing else.

The syntax is Python's (reference, "f-strings"; PEP 701 as to quotes): expressions, ``!r``, ``!s``, ``!a``, ``=``, format specs with
fields in them, ``{{`` and ``}}``. What they may use: the names of the config, ``config`` itself, literals, operators, conditionals,
comprehensions, indexing, the functions in `FUNCTIONS` and the methods in `METHODS`. No other attribute exists for them.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zerodeploy.errors import TemplateError
from zerodeploy.services.strformat import formatted

__all__ = ["FUNCTIONS", "METHODS", "Part", "evaluate", "parts"]

_MOST_TEXT = 1 << 16  # characters of a result, and of anything on the way to it
_MOST_STEPS = 20_000
_MOST_MADE = 1 << 20  # characters and items of all that is made on the way
_MOST_DEPTH = 60
_MOST_BITS = 4096  # of a whole number
_QUOTES = ('"""', "'''", '"', "'")

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "all": all, "any": any, "bool": bool, "float": float, "int": int, "len": len, "max": max, "min": min, "repr": repr,
    "round": round, "sorted": sorted, "str": str, "sum": sum, "list": list, "tuple": tuple, "dict": dict, "set": set, "range": range,
    "enumerate": enumerate, "zip": zip, "reversed": reversed,
}  # fmt: skip
#: by type. ``format`` is `strformat.formatted`: the real one's fields reach attributes
METHODS: dict[type, frozenset[str]] = {
    str: frozenset((
        "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "index", "isalnum", "isalpha",
        "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle",
        "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
        "upper", "zfill",
    )),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}  # fmt: skip
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.Pow: operator.pow,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
}  # fmt: skip
_CONVERT: dict[str, Callable[[Any], str]] = {"r": repr, "s": str, "a": ascii}


def evaluate(template: str, config: Mapping[str, Any], *, name: str = "template", extra: Mapping[str, Any] | None = None) -> str:
    """*template* as an f-string over *config*: its fields by name, and all of it as ``config``; *extra* names count before both.

    Raises:
        TemplateError: a syntax error, a name that is not there, something that templates may not do, or an expression that
            fails. The text has the position, counted from 1, and the expression.
    """
    return _Template(template, _names(config, extra), name).text()


@dataclass(frozen=True)
class Part:
    """A piece of an evaluated template: its own text, or what a field gave.

    ``value``: the field's value before it was formatted, None for text. ``direct``: the field only names something of the config.
    """

    text: str
    field: bool = False
    value: Any = None
    direct: bool = False


def parts(
    template: str, config: Mapping[str, Any], *, name: str = "template", extra: Mapping[str, Any] | None = None
) -> list[Part]:
    """`evaluate`, in pieces. Raises `TemplateError`."""
    made = _Template(template, _names(config, extra), name)
    made.text()
    return made.parts


def _names(config: Mapping[str, Any], extra: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**{key: value for key, value in config.items() if isinstance(key, str)}, "config": dict(config), **(extra or {})}


class _Template:
    """One template and what it may use."""

    def __init__(self, template: str, names: Mapping[str, Any], name: str, depth: int = 0) -> None:
        self._template, self._names, self._name = template, names, name
        self._steps, self._depth = 0, depth
        self.parts: list[Part] = []
        self._made = 0

    def _fail(self, at: int, text: str) -> TemplateError:
        shown = self._template[at : at + 60]
        return TemplateError(f"{self._name}, character {at + 1}: {text} (at {shown!r})", position=at + 1)

    def text(self) -> str:
        out, end = self._literal_and_fields(0, nested=False)
        assert end == len(self._template)
        return out

    def _literal_and_fields(self, at: int, *, nested: bool) -> tuple[str, int]:
        """The text from *at* on: to the end, or in a format spec to its closing brace."""
        template, out = self._template, ""
        while at < len(template):
            char, part = template[at], None
            if char == "{" and not nested and template[at : at + 2] == "{{":
                text, at = "{", at + 2
            elif char == "{":
                part, at = self._field(at, nested=nested)
                text = part.text
            elif char == "}" and nested:
                return out, at
            elif char == "}":
                if template[at : at + 2] != "}}":
                    raise self._fail(at, "a single } (write }} for the character)")
                text, at = "}", at + 2
            else:
                following = re.compile(r"[^{}]+").match(template, at)
                assert following is not None
                text, at = following[0], following.end()
            out += text
            self._bounded(out, at)
            if not nested:
                self.parts.append(part or Part(text))
        if nested:
            raise self._fail(len(template), "a { is not closed")
        return out, at

    def _field(self, start: int, *, nested: bool) -> tuple[Part, int]:
        """The replacement field that begins at *start*; what it gives, and where it ends."""
        template = self._template
        end = self._end_of_expression(start + 1)
        source = template[start + 1 : end]
        shown = ""
        if template[end] == "=":
            shown, end = template[start + 1 : end + 1], end + 1
            while template[end : end + 1].isspace():
                shown, end = shown + template[end], end + 1
        if not source.strip():
            raise self._fail(start, "an empty expression")
        value, direct = self._expression(source, start + 1), _is_direct(source)
        conversion = ""
        if template[end : end + 1] == "!":
            conversion = template[end + 1 : end + 2]
            if conversion not in _CONVERT:
                raise self._fail(end, "after ! comes r, s or a")
            end += 2
        spec: str | None = None
        if template[end : end + 1] == ":":
            if nested:
                raise self._fail(end, "format specs are nested too deeply")
            spec, end = self._literal_and_fields(end + 1, nested=True)
        if template[end : end + 1] != "}":
            raise self._fail(min(end, len(template)), "expected }")
        if shown and not conversion and spec is None:
            conversion = "r"
        result = value
        if conversion:
            self._check_text(value, start)
            result = _CONVERT[conversion](value)
        return Part(shown + self._formatted(result, spec or "", start), True, value, direct and not shown), end + 1

    def _written(self, value: Any, spec: str) -> str:
        """A field of ``str.format``."""
        return str(self._bounded(self._formatted(value, spec, self._at), self._at))

    def _formatted(self, value: Any, spec: str, at: int) -> str:
        if any(int(number) > 4096 for number in re.findall(r"\d+", spec)):
            raise self._fail(at, "a width or precision above 4096")
        self._check_text(value, at)
        try:
            return format(value, spec)
        except (ValueError, TypeError) as error:
            raise self._fail(at, str(error)) from None

    def _check_text(self, value: Any, at: int) -> None:
        """Before it is written out: what holds the same list many times is small until then."""
        todo, size = [value], 0
        while todo:
            each = todo.pop()
            if isinstance(each, str | bytes):
                size += len(each)
            elif isinstance(each, dict):
                size += 2 * len(each)
                todo += [*each.keys(), *each.values()] if size <= _MOST_TEXT else []
            elif isinstance(each, list | tuple | set | frozenset):
                size += len(each)
                todo += each if size <= _MOST_TEXT else []
            else:
                size += 1
            if size > _MOST_TEXT:
                raise self._fail(at, f"more than {_MOST_TEXT} characters or items")

    def _end_of_expression(self, at: int) -> int:
        """Where the expression from *at* on ends: at ``!``, ``:``, ``=`` or ``}`` outside of all brackets and strings."""
        template, start = self._template, at
        closing: list[str] = []
        while at < len(template):
            char = template[at]
            if char in "\"'":
                at = self._end_of_string(at)
                continue
            if char in "([{":
                closing.append({"(": ")", "[": "]", "{": "}"}[char])
            elif closing and char == closing[-1]:
                closing.pop()
            elif not closing and char in "!:=}":
                follows = template[at + 1 : at + 2]
                if char == "!" and follows == "=":
                    at += 2
                    continue
                if char == "=" and (follows == "=" or template[at - 1 : at] in "<>!="):
                    at += 2 if follows == "=" else 1
                    continue
                return at
            elif char in ")]}":
                raise self._fail(at, f"a {char} that was not opened")
            elif char == "#":
                raise self._fail(at, "a comment in an expression")
            elif char == "\\":
                raise self._fail(at, "a backslash outside of a string")
            at += 1
        raise self._fail(start - 1, "a { is not closed")

    def _end_of_string(self, at: int) -> int:
        quote = next(each for each in _QUOTES if self._template.startswith(each, at))
        end = at + len(quote)
        while end < len(self._template):
            if self._template[end] == "\\":
                end += 2
            elif self._template.startswith(quote, end):
                return end + len(quote)
            else:
                end += 1
        raise self._fail(at, "a string is not closed")

    def _expression(self, source: str, at: int) -> Any:
        stripped = source.strip()
        try:
            tree = ast.parse(f"({stripped}\n)", mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._fail(at, f"no expression: {getattr(error, 'msg', error)}") from None
        self._at = at
        try:
            return self._value(tree.body, dict(self._names), 0)
        except TemplateError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
            raise self._fail(at, f"{type(error).__name__}: {error}") from None

    # the expressions

    def _bounded(self, value: Any, at: int) -> Any:
        if isinstance(value, str | bytes | list | tuple | dict | set) and len(value) > _MOST_TEXT:
            raise self._fail(at, f"more than {_MOST_TEXT} characters or items")
        if isinstance(value, str | bytes | list | tuple | dict | set):
            self._made += len(value)
            if self._made > _MOST_MADE:
                raise self._fail(at, "it computes too much")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise self._fail(at, "a number that is too large")
        return value

    def _value(self, node: ast.AST, names: dict[str, Any], depth: int) -> Any:
        self._steps += 1
        if self._steps > _MOST_STEPS or depth > _MOST_DEPTH:
            raise self._fail(self._at, "it computes too much")
        handler = getattr(self, "_on_" + type(node).__name__.lower(), None)
        if handler is None:
            raise self._fail(self._at, f"templates can't hold a {type(node).__name__}")
        return self._bounded(handler(node, names, depth + 1), self._at)

    def _on_constant(self, node: ast.Constant, names: dict[str, Any], depth: int) -> Any:
        if not isinstance(node.value, str | int | float | None):
            raise self._fail(self._at, f"templates can't hold {node.value!r}")
        return node.value

    def _on_name(self, node: ast.Name, names: dict[str, Any], depth: int) -> Any:
        if node.id in names:
            return names[node.id]
        known = ", ".join(sorted(names)[:30])
        raise self._fail(self._at, f"there is no {node.id!r}; there are {known}")

    def _on_joinedstr(self, node: ast.JoinedStr, names: dict[str, Any], depth: int) -> str:
        out = ""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self._value(part.value, names, depth)
                spec = self._value(part.format_spec, names, depth) if part.format_spec is not None else ""
                out += self._formatted(_CONVERT[chr(part.conversion)](value) if part.conversion > 0 else value, spec, self._at)
            else:
                out += self._value(part, names, depth)
            self._bounded(out, self._at)
        return out

    def _on_tuple(self, node: ast.Tuple, names: dict[str, Any], depth: int) -> tuple[Any, ...]:
        return tuple(self._value(each, names, depth) for each in node.elts)

    def _on_list(self, node: ast.List, names: dict[str, Any], depth: int) -> list[Any]:
        return [self._value(each, names, depth) for each in node.elts]

    def _on_set(self, node: ast.Set, names: dict[str, Any], depth: int) -> set[Any]:
        return {self._value(each, names, depth) for each in node.elts}

    def _on_dict(self, node: ast.Dict, names: dict[str, Any], depth: int) -> dict[Any, Any]:
        if any(key is None for key in node.keys):
            raise self._fail(self._at, "templates can't hold ** in a dict")
        return {
            self._value(key, names, depth): self._value(value, names, depth)
            for key, value in zip(node.keys, node.values, strict=True)
            if key
        }

    def _on_boolop(self, node: ast.BoolOp, names: dict[str, Any], depth: int) -> Any:
        value: Any = None
        for each in node.values:
            value = self._value(each, names, depth)
            if bool(value) is isinstance(node.op, ast.Or):
                break
        return value

    def _on_unaryop(self, node: ast.UnaryOp, names: dict[str, Any], depth: int) -> Any:
        return _UNARY[type(node.op)](self._value(node.operand, names, depth))

    def _on_binop(self, node: ast.BinOp, names: dict[str, Any], depth: int) -> Any:
        action = _BINARY.get(type(node.op))
        if action is None:
            raise self._fail(self._at, f"templates can't compute {type(node.op).__name__}")
        left, right = self._value(node.left, names, depth), self._value(node.right, names, depth)
        self._check_size(type(node.op), left, right)
        return action(left, right)

    def _check_size(self, kind: type[ast.operator], left: Any, right: Any) -> None:
        """Before it is computed: afterwards the memory would be gone."""
        too_large = False
        if kind is ast.Mult:
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                    too_large = len(one) * other > _MOST_TEXT
        elif kind is ast.Pow and isinstance(left, int) and isinstance(right, int):
            too_large = left.bit_length() * right > _MOST_BITS
        elif kind is ast.LShift and isinstance(left, int) and isinstance(right, int):
            too_large = left.bit_length() + right > _MOST_BITS
        elif kind is ast.Mod and isinstance(left, str):
            too_large = "*" in left or any(int(number) > 4096 for number in re.findall(r"\d+", left))
        if too_large:
            raise self._fail(self._at, "the result would be too large")

    def _on_compare(self, node: ast.Compare, names: dict[str, Any], depth: int) -> bool:
        left = self._value(node.left, names, depth)
        for kind, each in zip(node.ops, node.comparators, strict=True):
            right = self._value(each, names, depth)
            if not _COMPARE[type(kind)](left, right):
                return False
            left = right
        return True

    def _on_ifexp(self, node: ast.IfExp, names: dict[str, Any], depth: int) -> Any:
        return self._value(node.body if self._value(node.test, names, depth) else node.orelse, names, depth)

    def _on_subscript(self, node: ast.Subscript, names: dict[str, Any], depth: int) -> Any:
        value = self._value(node.value, names, depth)
        if isinstance(node.slice, ast.Slice):
            parts = (node.slice.lower, node.slice.upper, node.slice.step)
            return value[slice(*(None if part is None else self._value(part, names, depth) for part in parts))]
        return value[self._value(node.slice, names, depth)]

    def _on_attribute(self, node: ast.Attribute, names: dict[str, Any], depth: int) -> Any:
        raise self._fail(self._at, f"there is no attribute {node.attr!r} for templates, only methods that are called")

    def _on_call(self, node: ast.Call, names: dict[str, Any], depth: int) -> Any:
        if any(isinstance(each, ast.Starred) for each in node.args) or any(each.arg is None for each in node.keywords):
            raise self._fail(self._at, "templates can't hold * or ** in a call")
        if isinstance(node.func, ast.Attribute):
            value = self._value(node.func.value, names, depth)
            allowed = METHODS.get(type(value), frozenset())
            if node.func.attr not in allowed:
                raise self._fail(self._at, f"there is no method {node.func.attr!r} of a {type(value).__name__} for templates")
            action = getattr(value, node.func.attr)
        elif isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and node.func.id not in names:
            value, action = None, FUNCTIONS[node.func.id]
        else:
            raise self._fail(self._at, f"templates can't call {ast.unparse(node.func)}")
        args = [self._value(each, names, depth) for each in node.args]
        options = {str(each.arg): self._value(each.value, names, depth) for each in node.keywords}
        if "key" in options and not isinstance(value, str):
            raise self._fail(self._at, "templates can't hold a function")
        if value is None:
            for each in args:
                self._check_text(each, self._at)
        self._check_call(value, node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id, args)
        if isinstance(value, str) and action.__name__ == "format":
            return formatted(value, args, options, self._written)
        result = action(*args, **options)
        if isinstance(result, range | enumerate | zip | reversed) or type(result).__name__ in (
            "dict_keys",
            "dict_values",
            "dict_items",
        ):
            return list(result)
        return result

    def _check_call(self, value: Any, name: str, args: list[Any]) -> None:
        too_large = any(isinstance(each, int) and abs(each) > _MOST_TEXT for each in args) and (
            isinstance(value, str) or name == "range"
        )
        if isinstance(value, str) and name == "replace" and len(args) > 1 and all(isinstance(each, str) for each in args[:2]):
            too_large = too_large or (value.count(args[0]) * len(args[1]) + len(value)) > _MOST_TEXT
        if isinstance(value, str) and name == "join" and args and isinstance(args[0], list | tuple):
            too_large = too_large or sum(len(each) + len(value) for each in args[0] if isinstance(each, str)) > _MOST_TEXT
        if isinstance(value, str) and name == "expandtabs" and args and isinstance(args[0], int):
            too_large = too_large or value.count("\t") * args[0] > _MOST_TEXT
        if too_large:
            raise self._fail(self._at, "the result would be too large")

    # comprehensions

    def _on_listcomp(self, node: ast.ListComp | ast.GeneratorExp, names: dict[str, Any], depth: int) -> list[Any]:
        return [self._value(node.elt, inner, depth) for inner in self._rounds(node.generators, names, depth)]

    _on_generatorexp = _on_listcomp  # a list is as good, and has an end

    def _on_setcomp(self, node: ast.SetComp, names: dict[str, Any], depth: int) -> set[Any]:
        return {self._value(node.elt, inner, depth) for inner in self._rounds(node.generators, names, depth)}

    def _on_dictcomp(self, node: ast.DictComp, names: dict[str, Any], depth: int) -> dict[Any, Any]:
        rounds = self._rounds(node.generators, names, depth)
        return {self._value(node.key, inner, depth): self._value(node.value, inner, depth) for inner in rounds}

    def _rounds(self, generators: list[ast.comprehension], names: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
        if not generators:
            yield names
            return
        first, *rest = generators
        if first.is_async:
            raise self._fail(self._at, "templates can't wait")
        for item in self._value(first.iter, names, depth):
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise self._fail(self._at, "it computes too much")
            inner = dict(names)
            self._bind(first.target, item, inner)
            if all(self._value(test, inner, depth) for test in first.ifs):
                yield from self._rounds(rest, inner, depth)

    def _bind(self, target: ast.expr, item: Any, names: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = item
        elif isinstance(target, ast.Tuple | ast.List):
            items = list(item)
            if len(items) != len(target.elts):
                raise ValueError(f"{len(target.elts)} names for {len(items)} values")
            for each, value in zip(target.elts, items, strict=True):
                self._bind(each, value, names)
        else:
            raise self._fail(self._at, f"templates can't assign to {ast.unparse(target)}")


def _is_direct(source: str) -> bool:
    """Whether the expression is the name of something, or an item of it."""
    node: ast.AST = ast.parse(f"({source.strip()}\n)", mode="eval").body
    while isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name)
