"""A service's description: read from YAML, checked against ``config.schema.yaml``, its templates evaluated.

Every error names the file, the line and the field.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import yaml
from zerodeploy_agent import statefile
from zerodeploy_agent.launching import digest_of

from zerodeploy.errors import ConfigError, TemplateError
from zerodeploy.services.observer import LEVELS
from zerodeploy.services.templates import evaluate

__all__ = ["DEFAULT_INTERFACE", "Config", "digest_of", "load", "of_mapping", "schema"]

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEFAULT_INTERFACE = "localhost"
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Config:
    """One service. ``data`` is what was written; the rest is what it means."""

    data: Mapping[str, Any]
    key: str
    source: str = ""  # the file, for messages
    _lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, Any]:
        """What templates can use by name, and all of it as ``config``."""
        return _with_defaults(self.data)

    @property
    def workdir(self) -> str:
        return str(self.data["workdir"])

    @property
    def ssh_hostname(self) -> str | None:
        """The host for ssh; None: this machine."""
        if self.data.get("hostname") is None and self.data.get("ssh_hostname") is None:
            return None
        return str(self.data.get("ssh_hostname") or self.data["hostname"])

    @property
    def hostname(self) -> str:
        """What clients of the service connect to, without a tunnel."""
        given = self.data.get("hostname")
        if given is not None:
            return str(given)
        interface = self.network_interface
        return DEFAULT_INTERFACE if interface in ("", "*", "0.0.0.0", "::", DEFAULT_INTERFACE) else interface

    @property
    def network_interface(self) -> str:
        return str(self.data.get("network_interface", DEFAULT_INTERFACE))

    @property
    def tunnel(self) -> bool:
        """Whether there is one to be; to this machine none is needed."""
        return bool(self.data.get("tunnel")) and self.ssh_hostname is not None

    @property
    def handshake(self) -> str | None:
        """As `hosting.target_of` reads it: path and query, with a leading slash, behind ``FIELD:`` if it is not for ``port``; None
        where an open port is enough."""
        given = self.data.get("handshake")
        if given is None:
            return None
        where = ""
        if isinstance(given, Mapping):
            where = f"{given['port_name']}:" if given.get("port_name", "port") != "port" else ""
            query = urlencode({str(name): _shown(value) for name, value in (given.get("parameters") or {}).items()})
            given = f"{given['path']}{'&' if '?' in given['path'] else '?'}{query}" if query else given["path"]
        return where + "/" + quote(str(given).lstrip("/"), safe="/?&=%:@!$'()*+,;~#-._[]|")

    @property
    def start_timeout(self) -> float:
        return float(self.data.get("start_timeout", START_TIMEOUT_S))

    @property
    def settings(self) -> dict[str, Any]:
        """What only this launcher knows of: env, limits, restart, log. Empty where none of them is given."""
        given = {name: self.data[name] for name in ("env", "limits", "restart", "log") if self.data.get(name)}
        if "env" in given:
            given["env"] = {name: _shown(value) for name, value in given["env"].items()}
        if isinstance(given.get("restart"), str):
            given["restart"] = {"policy": given["restart"]}
        if (given.get("restart") or {}).get("policy") == "never":
            del given["restart"]
        return given

    def digest(self) -> str:
        """Of the whole description, to know it again."""
        import zerodeploy

        return digest_of([zerodeploy.__version__, dict(self.data)])

    def check(self) -> None:
        """Raises `ConfigError` for what the schema does not allow, or what can't be written into a state file."""
        _check(self.data, self.source, self._lines)
        _check_text(self.data, self.source, self._lines)
        for name in ("file_parameters", "meta"):
            try:
                json.dumps(self.data.get(name), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise _error(self.source, self._lines, (name,), f"it can't be written as JSON: {error}") from None
        for path, value in _numbers(self.data):
            if not math.isfinite(value):
                raise _error(self.source, self._lines, path, f"it must be a finite number; not {value!r}")
        place = os.path.expanduser(self.workdir)
        if not os.path.isabs(place) and not self.workdir.startswith("~"):
            raise _error(
                self.source, self._lines, ("workdir",), f"an absolute path, or one that begins with ~/; not {self.workdir!r}"
            )

    def check_level(self, level: object) -> None:
        """Raises `ConfigError` for no level of `Observer`."""
        if level not in LEVELS:
            raise _error(self.source, self._lines, ("log_level",), f"it must be one of {', '.join(LEVELS)}; not {level!r}")

    def placed(self, error: ConfigError, name: str) -> ConfigError:
        """*error* of the field's template, with the file and the line."""
        assert isinstance(error, TemplateError)
        return _placed(error, self.source, self._lines, (name,))


def _check_text(data: Any, source: str, lines: Mapping[tuple[str | int, ...], int], path: tuple[str | int, ...] = ()) -> None:
    """Raises `ConfigError` for characters that neither a command nor a file can have."""
    if isinstance(data, str):
        try:
            if "\0" not in data:
                data.encode("utf-8")
                return
        except UnicodeEncodeError:
            pass
        raise _error(source, lines, path, f"it holds a NUL, or half of a surrogate pair, which is no character: {_brief(data)}")
    if len(path) < 20 and isinstance(data, Mapping):
        for name, value in data.items():
            _check_text(name, source, lines, path)
            _check_text(value, source, lines, (*path, name))
    elif len(path) < 20 and isinstance(data, list | tuple):
        for number, value in enumerate(data):
            _check_text(value, source, lines, (*path, number))


def _numbers(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers that mean something to the launcher; the schema has seen them. JSON Schema knows nothing of infinity."""
    for name in ("start_timeout", "restart", "limits", "log"):
        given = data.get(name)
        fields = given.items() if isinstance(given, Mapping) else [("", given)]
        yield from (((name, each) if each else (name,), value) for each, value in fields if isinstance(value, float))


def _shown(value: object) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def load(path: str | os.PathLike[str]) -> Config:
    """The description in a YAML file, not checked yet, its key evaluated. Raises `ConfigError`, `TemplateError`."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"a description is a mapping, or the path of a YAML file; not {_brief(path)}")
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    if len(raw) > _MOST_BYTES:
        raise ConfigError(f"{name}: more than {_MOST_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _check_size(node, {})
            lines = dict(_lines_of(node, ())) if node is not None else {}
            data = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{at}: no YAML: {error.problem or error.context}", line=mark.line + 1 if mark else 0) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: no YAML: {error}") from None
    return _made(data, name, lines)


def of_mapping(data: Mapping[str, Any]) -> Config:
    """The description that a program holds. Raises `ConfigError`, `TemplateError`."""
    return _made(data, "", {})


def _with_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"network_interface": DEFAULT_INTERFACE, **data}


def _made(data: Any, source: str, lines: Mapping[tuple[str | int, ...], int]) -> Config:
    if (
        not isinstance(data, Mapping)
        or not isinstance(data.get("key"), str)
        or not isinstance(data.get("network_interface", ""), str)
    ):
        _check(dict(data) if isinstance(data, Mapping) else data, source, lines)
        raise _error(source, lines, ("key",), "it must be a string")
    try:
        key = evaluate(data["key"], _with_defaults(data), name="key")
        statefile.check_key(key)
    except TemplateError as error:
        _check(dict(data), source, lines)
        raise _placed(error, source, lines, ("key",)) from None
    except statefile.StateError as error:
        raise _error(source, lines, ("key",), str(error)) from None
    return Config(dict(data), key, source, lines)


def _check_size(node: Any, sizes: dict[int, int]) -> int:
    """How many values *node* is when each alias is what it stands for. Raises `yaml.MarkedYAMLError` for too many, or for no end."""
    if isinstance(node, yaml.CollectionNode):
        if sizes.get(id(node), -1) == 0:
            raise yaml.MarkedYAMLError(problem="it holds itself", problem_mark=node.start_mark)
        if id(node) not in sizes:
            sizes[id(node)] = 0
            below = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
            size = 1 + sum(_check_size(each, sizes) for each in below)
            if size > _MOST_VALUES:
                raise yaml.MarkedYAMLError(problem=f"more than {_MOST_VALUES} values", problem_mark=node.start_mark)
            sizes[id(node)] = size
        return sizes[id(node)]
    return 1


def _lines_of(node: Any, path: tuple[str | int, ...]) -> Any:
    """Each field's path and line, counted from 1. Raises `yaml.MarkedYAMLError` for a field that is there twice."""
    yield path, node.start_mark.line + 1
    if len(path) > 20:
        return
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.MarkedYAMLError(problem=f"the field {key.value!r} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
                yield from (
                    (where, key.start_mark.line + 1 if where == (*path, key.value) else line)
                    for where, line in _lines_of(value, (*path, key.value))
                )
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines_of(value, (*path, number))


def schema() -> dict[str, Any]:
    """``config.schema.yaml``."""
    text = (Path(__file__).parent / "config.schema.yaml").read_text("utf-8")
    made: dict[str, Any] = yaml.load(text, _Loader)
    return made


@functools.lru_cache(maxsize=1)
def _validator() -> Any:
    import fastjsonschema

    return fastjsonschema.compile(schema(), use_default=False)


def _check(data: Any, source: str, lines: Mapping[tuple[str | int, ...], int]) -> None:
    import fastjsonschema

    try:
        _validator()(data)
    except fastjsonschema.JsonSchemaValueException as error:
        path = tuple(int(part) if part.isdigit() else part for part in map(str, error.path[1:]))
        raise _error(source, lines, *_wording(path, error)) from None


def _wording(path: tuple[str | int, ...], error: Any) -> tuple[tuple[str | int, ...], str]:
    """The field that is wrong, and what it should be."""
    rule, wanted, value = error.rule, error.rule_definition, error.value
    if rule == "required":
        missing = next(name for name in wanted if name not in value)
        return (*path, missing), "this field is required, and missing"
    if rule == "additionalProperties":
        known = ", ".join(sorted(error.definition.get("properties", {})))
        odd = next((name for name in value if name not in error.definition.get("properties", {})), "")
        return (*path, odd), f"there is no such field; there are {known}"
    if rule == "propertyNames":
        odd = next((name for name in value if not isinstance(name, str) or not name.isidentifier()), "")
        return (*path, odd), "no name of an environment variable"
    if rule == "oneOf":
        inner = _inner(path, wanted, value)
        if inner is not None:
            return inner
        shapes = " or ".join(_shape(each) for each in wanted)
        return path, f"it must be {shapes}; not {_brief(value)}"
    if rule == "type":
        return path, f"it must be {_type(wanted)}; not {_brief(value)}"
    if rule == "enum":
        return path, f"it must be one of {', '.join(map(str, wanted))}; not {_brief(value)}"
    if rule == "minLength":
        return path, "it must not be empty"
    return path, f"{error.message.partition(' ')[2]}; it is {_brief(value)}"


def _inner(path: tuple[str | int, ...], wanted: list[Any], value: Any) -> tuple[tuple[str | int, ...], str] | None:
    """What is wrong within a mapping that is one of several shapes; None for another thing than a mapping."""
    import fastjsonschema

    for each in wanted if isinstance(value, Mapping) else ():
        if each.get("type") == "object":
            try:
                fastjsonschema.compile(each, use_default=False)(value)
            except fastjsonschema.JsonSchemaValueException as error:
                below = tuple(int(part) if part.isdigit() else part for part in map(str, error.path[1:]))
                return _wording((*path, *below), error)
    return None


def _type(wanted: str | list[str]) -> str:
    names = {
        "object": "a mapping",
        "string": "a string",
        "boolean": "true or false",
        "integer": "a whole number",
        "number": "a number",
    }
    return " or ".join(names.get(each, each) for each in ([wanted] if isinstance(wanted, str) else wanted) if each != "null")


def _shape(definition: Mapping[str, Any]) -> str:
    if "enum" in definition:
        return "one of " + ", ".join(map(str, definition["enum"]))
    shape = _type(definition["type"])
    return f"{shape} with {', '.join(definition['properties'])}" if "properties" in definition else shape


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:80] + "…"


def _place(source: str, line: int) -> str:
    return f"{source}, line {line}: " if source and line else f"{source}: " if source else ""


def _error(source: str, lines: Mapping[tuple[str | int, ...], int], path: tuple[str | int, ...], text: str) -> ConfigError:
    line, at = 0, path
    while not line:
        line = lines.get(at, 0)
        if not at:
            break
        at = at[:-1]
    name = ".".join(map(str, path)) or "the configuration"
    return ConfigError(f"{_place(source, line)}{name}: {text}", field=name, line=line)


def _placed(
    error: TemplateError, source: str, lines: Mapping[tuple[str | int, ...], int], path: tuple[str | int, ...]
) -> TemplateError:
    line = lines.get(path, 0)
    return TemplateError(f"{_place(source, line)}{error.args[0]}", position=error.position, field=path[0], line=line)
