"""Functions that came as source: compile what was shipped, once, into namespaces of their own.

A shipment is plain data: ``units`` are definitions (functions and classes), dependencies first; ``spaces`` are the
module-level names that they refer to; ``entry`` names the unit that is called. Nothing is bytecode, so the Python
versions of both ends need not match; what this Python's syntax lacks is told as such.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List


class ShipError(Exception):
    """What was shipped does not compile or load here; the text says why."""


def build(shipment: "Dict[str, Any]") -> object:
    """The callable that *shipment* describes. Raises `ShipError` with the reason."""
    modules = {name: _StandIn(space["module"]) for name, space in shipment["spaces"].items()}
    before = {module.__name__: sys.modules.get(module.__name__) for module in modules.values()}
    for module in modules.values():
        sys.modules[module.__name__] = module  # dataclasses, pickle and typing look a class's module up
    try:
        return _build(shipment, modules)
    finally:
        for name, replaced in before.items():
            if replaced is not None and type(replaced) is not _StandIn:
                sys.modules[name] = replaced


class _StandIn(type(sys)):  # type: ignore[misc]
    """The module that shipped definitions say they are from. It gives way when the host's own of that name is asked for."""

    def __getattr__(self, name: str) -> "Any":
        if name[:2] == "__" and name != "__path__":
            raise AttributeError(name)
        own = self.__name__
        before = sys.modules.pop(own, None)
        try:
            __import__(own)
        except ImportError:
            sys.modules[own] = before or self
            raise AttributeError("%s was shipped without %r" % (own, name)) from None
        return getattr(sys.modules[own], name)


def _build(shipment: "Dict[str, Any]", modules: "Dict[str, Any]") -> object:
    spaces = {}
    waiting: "List[Any]" = []
    for name, space in shipment["spaces"].items():
        module = modules[name]
        module.__dict__["__file__"] = space["file"]
        spaces[name] = module.__dict__
        for bound, reference in space["names"].items():
            if reference[0] in ("unit", "partial"):
                waiting.append((name, bound, reference))
            else:
                spaces[name][bound] = _resolve(reference, {})
    built: "Dict[str, object]" = {}
    for unit in shipment["units"]:
        waiting = [item for item in waiting if not _bind(item, spaces, built)]  # partials of the library's functions
        built[unit["id"]] = _define(unit, spaces[unit["space"]], built)
    for item in waiting:
        _bind(item, spaces, built)
    return built[shipment["entry"]]


def _bind(item: "Any", spaces: "Dict[str, Any]", built: "Dict[str, object]") -> bool:
    space, bound, reference = item
    try:
        spaces[space][bound] = _resolve(reference, built)
    except KeyError:
        return False  # the unit comes later
    return True


def _resolve(reference: "Any", built: "Dict[str, object]") -> "Any":
    kind, value = reference
    if kind in ("value", "self"):
        return value
    if kind == "unit":
        return built[value]
    if kind == "partial":
        import functools

        return functools.partial(_resolve(value[0], built), *value[1], **value[2])
    if kind == "import":
        for name in value:
            _load(name)
        return sys.modules[value[0]]
    module, path = value.split(":")
    found = _load(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _load(name: str) -> "Any":
    try:
        __import__(name)
    except ImportError as error:
        raise ShipError(
            "the function needs the module %r, which this host does not have (%s). Install it there, or import it inside "
            "the function where it is optional" % (name, error)
        ) from error
    return sys.modules[name]


def _define(unit: "Dict[str, Any]", namespace: "Dict[str, Any]", built: "Dict[str, object]") -> "Any":
    import __future__

    import linecache

    name, form, free = unit["name"], unit["form"], unit["free"]
    text = unit["source"]
    above = 0  # lines that stand before the source
    if form == "lambda":
        name = "__zd_lambda__"
        above = min(1, unit["line"] - 1)
        head = "def __zd_enclose__(%s): return (" % ", ".join(free) if free else name + " = ("
        text = head + "\n" * above + text + "\n)"
    elif unit["indented"]:
        text, above = "if 1:\n" + text, 1
    if free and form != "lambda":
        # a closure: its free variables become the parameters of an enclosing function. The definition keeps its own
        # indentation, which is why it is not re-indented: that would change the strings in it
        first = unit["source"]
        pad = first[: len(first) - len(first.lstrip(" \t"))]
        text, above = "def __zd_enclose__(%s):\n%s%sreturn %s\n" % (", ".join(free), first, pad, name), 1
    padded = "\n" * max(0, unit["line"] - above - 1) + text
    filename = unit["file"]
    try:
        # annotations name types that need not be here
        code = compile(padded, filename, "exec", __future__.annotations.compiler_flag, dont_inherit=True)
    except SyntaxError as error:
        raise ShipError(
            "this host's Python %d.%d does not understand the source of %s: %s (line %s: %s). Write it in syntax that it has, "
            "or pass python_executable=... for a newer interpreter"
            % (sys.version_info[0], sys.version_info[1], unit["qualname"], error.msg, error.lineno, (error.text or "").strip())
        ) from error
    shown = linecache.cache.get(filename)
    lines = list(shown[2]) if shown and len(shown) == 4 else []  # type: ignore[misc]
    source = [line + "\n" for line in unit["source"].rstrip("\n").split("\n")]
    lines += ["\n"] * (unit["line"] - 1 + len(source) - len(lines))
    lines[unit["line"] - 1 : unit["line"] - 1 + len(source)] = source
    linecache.cache[filename] = (sum(map(len, lines)), None, lines, filename)
    had = namespace.get(name, namespace)
    exec(code, namespace)
    if free:
        made = namespace.pop("__zd_enclose__")(*[_resolve(cell, built) for cell in unit["cells"]])
        for variable, cell in zip(free, unit["cells"]):
            if cell[0] == "self" and variable in made.__code__.co_freevars:
                made.__closure__[made.__code__.co_freevars.index(variable)].cell_contents = made
    else:
        made = namespace.pop(name)
        if had is not namespace:
            namespace[name] = had
    if form != "class":
        for attribute, value in (("__qualname__", unit["qualname"]), ("__defaults__", unit["defaults"] and tuple(unit["defaults"])),
                                 ("__kwdefaults__", unit["kwdefaults"])):  # fmt: skip
            if value is not None:
                setattr(made, attribute, value)
    return made
