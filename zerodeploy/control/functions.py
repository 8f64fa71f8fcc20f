"""Functions as shipments: source plus what it refers to, never bytecode.

What travels with a function: imports (as imports), functions and classes of the user's own code (as source, and what
those refer to), plain values, closures over all of these. The standard library and installed packages are referred to
by name: the host has to have them.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import hashlib
import os
import sys
import sysconfig
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from zerodeploy_agent import compactjson, plain

from zerodeploy.control.sources import Definition, definition_of_class, definition_of_function
from zerodeploy.errors import NotShippable

__all__ = ["Shipment", "Target", "prepare"]

_LIBRARIES = tuple(
    os.path.join(os.path.realpath(path), "") for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_paths().get(name))
)  # fmt: skip


@dataclass(frozen=True)
class Shipment:
    """A function's shipment: plain data, and the key that names it."""

    key: str
    content: dict[str, object]


@dataclass(frozen=True)
class Target:
    """What to call: a name on the far side, or a shipment; with the arguments that a `functools.partial` adds."""

    name: str | None = None
    shipment: Shipment | None = None
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)


def prepare(function: object, on_host: frozenset[str] = frozenset()) -> Target:
    """How *function* is called on the far side. *on_host*: modules of this program that were shipped there, by name.

    Raises:
        NotShippable: it can't travel; the text names what can't, and the way out.
    """
    if isinstance(function, str):
        return _named(function)
    if type(function) is types.FunctionType:
        known = _prepared.get((id(function.__code__), on_host))
        if known is not None and known.still_fits(function):
            return known.target
    if isinstance(function, functools.partial):
        inner = prepare(function.func, on_host)
        return Target(inner.name, inner.shipment, inner.args + function.args, {**inner.kwargs, **function.keywords})
    name = _library_name(function, on_host)
    if name is not None:
        return Target(name=name)
    if isinstance(function, types.MethodType):
        if isinstance(function.__self__, type):
            raise NotShippable(
                f"{function.__qualname__} is a classmethod, which can't travel by itself; pass a function that calls it"
            )
        raise NotShippable(
            f"{function.__qualname__} is a method of an object of this process, which can't travel; pass a function that makes "
            "the object on the host, or call the object from here over classic_connect()"
        )
    if not callable(function):
        raise NotShippable(f"{function!r} can't be called")
    builder = _Builder(on_host)
    entry = builder.reference(function, "the function", set())
    if entry[0] != "unit":
        raise NotShippable(f"{function!r} can't travel: pass a function, or the name module:name of something on the host")
    target = Target(shipment=builder.shipment(str(entry[1])))
    if builder.stable and isinstance(function, types.FunctionType):
        if len(_prepared) > _KEPT:
            _prepared.clear()
        _prepared[id(function.__code__), on_host] = _Prepared(function, target, builder)
    return target


@functools.lru_cache(maxsize=512)
def _named(target: str) -> Target:
    module, colon, path = target.partition(":")
    if not (module and colon and path) or not all(p.isidentifier() for p in (module + "." + path).split(".")):
        raise NotShippable(f'{target!r} is no target: give module:name, as in "platform:node", or a function')
    return Target(name=target)


def _library_name(thing: object, on_host: frozenset[str]) -> str | None:
    """``module:name`` of something from the standard library, an installed package or a shipped module, else None."""
    module_name, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if module_name is None:  # a builtin: a module's, or a method of a type such as str.upper and dict.fromkeys
        owner = getattr(thing, "__self__", None) or getattr(thing, "__objclass__", None)
        module_name = (
            owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__ if isinstance(owner, type) else None
        )
    if not isinstance(module_name, str) or not isinstance(path, str) or "<" in path:
        return None
    module = sys.modules.get(module_name)
    if module is None or not is_library(module, on_host):
        return None
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    same = found is thing or (found == thing and isinstance(thing, types.MethodType | types.BuiltinMethodType))
    return f"{module_name}:{path}" if same else None


def is_library(module: types.ModuleType, on_host: frozenset[str] = frozenset()) -> bool:
    """Whether *module* is the standard library's, an installed package's or shipped: something that a host may have as well."""
    root = module.__name__.partition(".")[0]
    if on_host and any(module.__name__ == name or module.__name__.startswith(name + ".") for name in on_host):
        return True
    if root == "zerodeploy":
        return False  # installed here, never there: its functions travel
    if root in sys.stdlib_module_names and module.__name__ != "__main__":
        return True
    if root == "zerodeploy_agent":
        return True
    file = getattr(module, "__file__", None)
    if not isinstance(file, str):
        return False
    real = os.path.realpath(file)
    return real.startswith(_LIBRARIES) or f"{os.sep}site-packages{os.sep}" in real or f"{os.sep}dist-packages{os.sep}" in real


class _Prepared:
    """A shipment that can be used again as long as everything that was looked at on the way is the same object."""

    def __init__(self, function: types.FunctionType, target: Target, builder: _Builder) -> None:
        self.function = function
        self.target = target
        self._looked_up = builder.looked_up
        self._functions = builder.functions
        self._submodules = builder.submodules

    def still_fits(self, function: types.FunctionType) -> bool:
        """Whether *function*, which has the same code, would be shipped the same way."""
        if function is not self.function and not self._is_twin(function):
            return False
        for one, code, defaults, kwdefaults in self._functions:
            if one.__code__ is not code or one.__defaults__ is not defaults or one.__kwdefaults__ is not kwdefaults:
                return False
            if "__wrapped__" in one.__dict__:
                return False
        for namespace, name, value in self._looked_up:
            if namespace.get(name, _NOTHING) is not value:
                return False
        return all(_used_submodules(module, attributes) == found for module, attributes, found in self._submodules)

    def _is_twin(self, function: types.FunctionType) -> bool:
        """The same lambda or inner function, made again by a loop or a second call of what it stands in."""
        mine = self.function
        return (
            "<" in function.__qualname__ and function.__qualname__ == mine.__qualname__ and not function.__dict__
            and function.__globals__ is mine.__globals__ and function.__module__ == mine.__module__
            and function.__defaults__ is mine.__defaults__ and function.__kwdefaults__ is mine.__kwdefaults__
            and vars(sys.modules[function.__module__]).get(function.__name__) is not function
        )  # fmt: skip


_SCALARS = (type(None), bool, int, float, str, bytes)
_NOTHING = object()
_prepared: dict[tuple[int, frozenset[str]], _Prepared] = {}  # by id of the code, which the entry keeps alive


class _Builder:
    """Collects units (definitions) and spaces (the module-level names they refer to), dependencies first."""

    def __init__(self, on_host: frozenset[str]) -> None:
        self._on_host = on_host
        self.units: list[dict[str, object]] = []
        self.spaces: dict[str, dict[str, Any]] = {}
        self._ids: dict[int, str] = {}
        self._alive: list[object] = []  # ids stay unique while what they belong to lives
        # whether the same objects make the same shipment again, and which they are
        self.stable = True
        self.looked_up: list[tuple[dict[str, Any], str, object]] = []
        self.functions: list[tuple[types.FunctionType, types.CodeType, object, object]] = []
        self.submodules: list[tuple[types.ModuleType, frozenset[str], list[str]]] = []

    def shipment(self, entry: str) -> Shipment:
        spaces = {name: {key: part for key, part in space.items() if key != "_of"} for name, space in self.spaces.items()}
        content: dict[str, object] = {"entry": entry, "units": self.units, "spaces": spaces}
        tree, segments = plain.encode(content, "shipment")
        digest = hashlib.sha256(compactjson.dumps(tree))
        for segment in segments:
            digest.update(segment)
        return Shipment(digest.hexdigest()[:32], content)

    def reference(self, value: object, where: str, pending: set[int]) -> list[object]:
        """How the far side gets at *value*: ``[kind, data]``."""
        if isinstance(value, types.ModuleType):
            return ["import", [value.__name__]]
        known = self._ids.get(id(value))
        if known is not None:
            return ["unit", known]
        if isinstance(value, types.FunctionType | type) or callable(value):
            name = _library_name(value, self._on_host)
            if name is not None:
                return ["name", name]
        if isinstance(value, types.FunctionType):
            return ["unit", self._function(value, where, pending)]
        if isinstance(value, type):
            return ["unit", self._class(value, where, pending)]
        self.stable = self.stable and type(value) in _SCALARS
        if isinstance(value, functools.partial):
            args, kwargs = list(value.args), dict(value.keywords)
            _check_plain(args, where + ".args")
            _check_plain(kwargs, where + ".keywords")
            return ["partial", [self.reference(value.func, where, pending), args, kwargs]]
        inner = getattr(value, "__wrapped__", None)
        if isinstance(inner, types.FunctionType) and "<locals>" not in inner.__qualname__:
            return ["unit", self._function(inner, where, pending, standing_for=value)]
        _check_plain(value, where)
        return ["value", value]

    def _new_id(self, value: object) -> str:
        self._alive.append(value)
        unit = f"u{len(self._ids)}"
        self._ids[id(value)] = unit
        return unit

    def _function(self, function: types.FunctionType, where: str, pending: set[int], standing_for: object = None) -> str:
        unwrapped = getattr(function, "__wrapped__", None)
        decorated = standing_for is not None
        if not decorated and isinstance(unwrapped, types.FunctionType) and "<locals>" not in unwrapped.__qualname__:
            # a decorator of a library made it: apply that decorator over there
            inner_module = sys.modules.get(unwrapped.__module__)
            if (
                inner_module is not None
                and not is_library(inner_module, self._on_host)
                and getattr(inner_module, unwrapped.__name__, None) is function
            ):
                return self._function(unwrapped, where, pending, standing_for=function)
        owner = sys.modules.get(function.__module__)
        if decorated or function.__closure__ or unwrapped is not None or owner is None:
            self.stable = False
        else:
            self.looked_up.append((vars(owner), function.__name__, vars(owner).get(function.__name__, _NOTHING)))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.stable = self.stable and type(value) in _SCALARS
        self.functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        plain_defaults = all(_is_plain(v) for v in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
        definition = _cached_definition(function, decorated, plain_defaults and not decorated)
        unit = self._new_id(standing_for if decorated else function)
        if decorated:
            self._ids[id(function)] = unit
        space = self._space(function.__globals__, definition.file)
        cells: list[object] = []
        here = pending | {id(function)}
        for name, cell in zip(definition.free, function.__closure__ or (), strict=False):
            try:
                content = cell.cell_contents
            except ValueError:
                raise NotShippable(f"{_name(function)} refers to {name}, which has no value yet") from None
            if id(content) in here:
                if content is not function:
                    raise NotShippable(
                        f"{_name(function)} and {name} refer to each other as closures; define them at the top level"
                    )
                cells.append(["self", None])
            elif name == "__class__":
                raise NotShippable(f"{_name(function)} uses super() or __class__; ship a plain function that uses the class")
            else:
                cells.append(self.reference(content, f"{_name(function)}'s variable {name}", here))
        self._fill(space, function.__globals__, definition, definition.at_once, here, _name(function))
        self.units.append(self._unit(unit, space, definition, cells, function, plain_defaults))
        self._fill(space, function.__globals__, definition, definition.names, here, _name(function))
        if decorated or getattr(sys.modules.get(function.__module__), function.__name__, None) is function:
            self.spaces[space]["names"].setdefault(function.__name__, ["unit", unit])
        return unit

    def _unit(
        self, unit: str, space: str, definition: Definition, cells: list[object], function: Any, plain_defaults: bool
    ) -> dict[str, object]:
        values = definition.form != "class" and plain_defaults and (definition.blanked or definition.form == "lambda")
        return {
            "id": unit, "space": space, "form": definition.form, "name": definition.name, "source": definition.source,
            "line": definition.line, "file": definition.file, "indented": definition.indented, "free": list(definition.free),
            "cells": cells, "qualname": function.__qualname__,
            "defaults": list(function.__defaults__) if values and function.__defaults__ else None,
            "kwdefaults": dict(function.__kwdefaults__) if values and function.__kwdefaults__ else None,
        }  # fmt: skip

    def _class(self, cls: type, where: str, pending: set[int]) -> str:
        if cls.__module__ == "builtins":
            raise NotShippable(f"{where} is the type {cls.__name__}, which has no name that can be imported")
        definition = _cached_class(cls)
        unit = self._new_id(cls)
        module = sys.modules[cls.__module__]
        space = self._space(vars(module), definition.file)
        # bases and decorators have to be there first; what its methods refer to may in turn need the class (a subclass)
        self._fill(space, vars(module), definition, definition.at_once, pending | {id(cls)}, _name(cls))
        self.units.append(self._unit(unit, space, definition, [], cls, False))
        self._fill(space, vars(module), definition, definition.names, pending | {id(cls)}, _name(cls))
        self.spaces[space]["names"].setdefault(cls.__name__, ["unit", unit])
        return unit

    def _space(self, namespace: dict[str, Any], file: str) -> str:
        for name, space in self.spaces.items():
            if space["_of"] == id(namespace):
                return name
        name = f"s{len(self.spaces)}"
        module = str(namespace.get("__name__", "__main__"))
        self.spaces[name] = {"_of": id(namespace), "module": module, "file": file, "names": {}}
        self._alive.append(namespace)
        return name

    def _fill(
        self, space: str, namespace: dict[str, Any], definition: Definition, wanted: frozenset[str], pending: set[int], owner: str
    ) -> None:
        names = self.spaces[space]["names"]
        for name in sorted(definition.hints):
            value = namespace.get(name)
            self.looked_up.append((namespace, name, namespace.get(name, _NOTHING)))
            if value is typing or value is dataclasses:
                names.setdefault(name, ["import", [value.__name__]])
            for form in ("typing:ClassVar", "dataclasses:InitVar", "dataclasses:KW_ONLY"):
                module, _, attribute = form.partition(":")
                if value is getattr(sys.modules[module], attribute):
                    names.setdefault(name, ["name", form])
        for name in sorted(wanted):
            self.looked_up.append((namespace, name, namespace.get(name, _NOTHING)))
            if name in names or (name == definition.name and definition.form != "lambda" and name not in namespace):
                continue
            if name not in namespace:
                if not hasattr(builtins, name) and name not in ("__class__",):
                    continue  # a NameError over there as it would be here
                continue
            value = namespace[name]
            if isinstance(value, types.ModuleType):
                used = _used_submodules(value, definition.attributes)
                self.submodules.append((value, definition.attributes, used))
                names[name] = ["import", [value.__name__, *used]]
                continue
            reference = self.reference(value, f"{owner}'s global {name}", pending)
            names.setdefault(name, reference)


def _used_submodules(module: types.ModuleType, attributes: frozenset[str]) -> list[str]:
    """Submodules that are loaded here and named in the code: ``import xml`` alone would not bring xml.dom."""
    found = []
    level = [module.__name__]
    while level:
        level = [
            f"{parent}.{name}" for parent in level for name in sorted(attributes) if f"{parent}.{name}" in sys.modules
        ]  # fmt: skip
        found += level
    return found


def _name(thing: Any) -> str:
    name = str(getattr(thing, "__qualname__", thing)).replace("<locals>.", "")
    return name if name != "<lambda>" else "the lambda"


def _check_plain(value: object, where: str) -> None:
    try:
        plain.encode(value, where)
    except plain.PlainError as error:
        raise NotShippable(
            f"{error}, which can't travel. Pass plain data as an argument instead, or make it inside the function"
        ) from None


def _is_plain(value: object) -> bool:
    try:
        plain.encode(value)
    except plain.PlainError:
        return False
    return True


# by identity: equal code objects may have different decorators or files. The code is kept, or its id could come again
_definitions: dict[tuple[int, bool, bool], tuple[types.CodeType, Definition]] = {}
_classes: dict[type, Definition] = {}
_KEPT = 512


def _cached_definition(function: types.FunctionType, decorated: bool, blank: bool) -> Definition:
    key = (id(function.__code__), decorated, blank)
    known = _definitions.get(key)
    if known is None:
        if len(_definitions) > _KEPT:
            _definitions.clear()
        definition = definition_of_function(function, decorated=decorated, blank_defaults=blank)
        known = _definitions[key] = function.__code__, definition
    return known[1]


def _cached_class(cls: type) -> Definition:
    definition = _classes.get(cls)
    if definition is None:
        if len(_classes) > _KEPT:
            _classes.clear()
        definition = _classes[cls] = definition_of_class(cls)
    return definition
