"""Host sets: from what a user writes to a list of hosts, all of it checked before anything is contacted.

A host set is a host, or a list of hosts and host sets:

- what `DeployedServer` takes: a string, a plumbum machine, a Link
- a string with ranges: ``web[01-16].example.org``, ``rack[1-3]n[1,2,7-9]``; several with commas: ``web1,db[1-2],@more.txt``
- ``@hosts.txt``: a file with one host or range per line, ``#`` begins a comment
- ``@hosts.yaml`` or ``@hosts.yaml:web,db``: an inventory, or groups of it

An inventory::

    defaults: {user: me, keyfile: ~/.ssh/cluster}
    groups:
      web:
        hosts: ["web[1-3]", {host: web9, port: 2222}]
        jump: bastion
      db:
        hosts: [db1]
        python: /opt/python3.12/bin/python3

The options are ``user``, ``port``, ``keyfile``, ``python``, ``transport``, ``jump`` (ssh's ProxyJump) and ``ssh_config`` (a
file, as ssh's -F); a host's own win over its group's, and those over the defaults.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerodeploy.errors import UsageError
from zerodeploy.link.base import Link
from zerodeploy.link.openssh import OpenSSHLink, parse_target
from zerodeploy.link.resolve import resolve

__all__ = ["HostSpec", "fold", "host_set", "unique_names"]

_MOST_HOSTS = 10_000  # of one range: more is a typo
_RANGE = re.compile(r"\[(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\]")
_LAST_NUMBER = re.compile(r"^([^.:@]*?(?:[^.:@]*@)?[^.:@]*?)(\d*)((?:[.:].*)?)$", re.DOTALL)  # of the name's first part
_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "user": str, "port": int, "keyfile": str, "python": str, "transport": str, "jump": str, "ssh_config": str,
}  # fmt: skip
_TRANSPORTS = ("tunnel", "stdio", "unix")


@dataclass(frozen=True)
class HostSpec:
    """One host of a set. ``name`` is what results call it; ``options`` are keywords for `DeployedServer`."""

    name: str
    target: object
    ssh_options: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    group: str = ""

    def link(self) -> Link:
        """A new Link to it. Contacts nothing."""
        if isinstance(self.target, str):
            return OpenSSHLink.to(self.target, ssh_options=self.ssh_options)
        return resolve(self.target)


def host_set(hosts: object, *, allow_duplicates: bool = False) -> list[HostSpec]:
    """The hosts of a set, in the order given.

    Raises:
        UsageError: a host that is none, a range or file with a mistake, a host that is there twice; all mistakes of one
            kind are told at once. Nothing was contacted.
    """
    specs = list(_expand(hosts))
    if not specs:
        raise UsageError("the host set is empty")
    twice = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if twice and not allow_duplicates:
        raise UsageError(
            f"{_some(twice)} given more than once; name each once (from Python, allow_duplicates=True takes it as two)"
        )
    wrong: list[str] = []
    for spec in specs:
        try:
            spec.link()
        except UsageError as error:
            wrong.append(str(error))
    if wrong:
        raise UsageError("; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""))
    return specs


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _expand(hosts: object) -> Iterable[HostSpec]:
    if isinstance(hosts, HostSpec):
        yield hosts
    elif isinstance(hosts, str):
        for one in _parts(hosts):
            if one.startswith("@"):
                yield from _from_file(one[1:])
            else:
                for name in _range(one):
                    yield HostSpec(name, name)
    elif isinstance(hosts, Iterable) and not isinstance(hosts, Link | bytes | Mapping) and not hasattr(hosts, "session"):
        for one in hosts:
            yield from _expand(one)
    else:
        resolve(hosts)  # refuses what is no host
        yield HostSpec(hosts.label if isinstance(hosts, Link) else str(hosts), hosts)


def unique_names(names: list[str]) -> list[str]:
    """Names that tell hosts apart which were given twice on purpose: host, host#2, …"""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _parts(text: str) -> list[str]:
    """*text* at its commas, but for those in ranges and behind an ``@``, where groups of an inventory may follow."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0 and not text.startswith("@", start):
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:])] if parts else [text]


def fold(names: Sequence[str]) -> str:
    """*names* for people, numbers as ranges: ``db1, web[01-16]``. What it gives is a host set again."""
    groups: dict[tuple[str, str, int], list[int]] = {}
    cut = [found.groups() if (found := _LAST_NUMBER.match(name)) else (name, "", "") for name in names]
    padded = {(head, tail, len(number)) for head, number, tail in cut if number.startswith("0")}
    for name, (head, number, tail) in zip(names, cut, strict=True):
        width = len(number) if (head, tail, len(number)) in padded else 0
        groups.setdefault((head, tail, width) if number else (name, "", -1), []).append(int(number or 0))
    folded = []
    for (head, tail, width), numbers in groups.items():
        runs: list[list[int]] = []
        for number in sorted(set(numbers)):
            if runs and number == runs[-1][1] + 1 and len(str(number).zfill(width)) >= len(str(runs[-1][0]).zfill(width)):
                runs[-1][1] = number
            else:
                runs.append([number, number])
        texts = [str(a).zfill(width) if a == b else f"{str(a).zfill(width)}-{str(b).zfill(width)}" for a, b in runs]
        only = len(runs) == 1 and runs[0][0] == runs[0][1]
        folded.append(head if width < 0 else f"{head}{texts[0]}{tail}" if only else f"{head}[{','.join(texts)}]{tail}")
    return ", ".join(folded)


def _range(text: str) -> list[str]:
    """*text* with its ranges written out, the last one fastest."""
    names = [""]
    at = 0
    for found in _RANGE.finditer(text):
        between = text[at : found.start()]
        numbers = _numbers(found[1], text)
        if len(names) * len(numbers) > _MOST_HOSTS:
            raise UsageError(f"{text!r} means more than {_MOST_HOSTS} hosts")
        names = [name + between + number for name in names for number in numbers]
        at = found.end()
    rest = text[at:]
    if ("[" in rest or "]" in rest) and ":" not in rest:  # [::1]:22 is an address
        raise UsageError(f"{text!r}: a range is [1-9], [01-16] or [1,3,5-7]")
    return [name + rest for name in names]


def _numbers(text: str, whole: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash:
            numbers.append(first)
            continue
        if int(last) < int(first):
            raise UsageError(f"{whole!r}: the range {part} goes down")
        if int(last) - int(first) >= _MOST_HOSTS:
            raise UsageError(f"{whole!r} means more than {_MOST_HOSTS} hosts")
        if len(first) != len(last) and first.startswith("0") and first != "0":
            raise UsageError(f"{whole!r}: {part} has ends of different width")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _from_file(path: str) -> Iterable[HostSpec]:
    name, groups = path, ""
    if not os.path.exists(path) and ":" in path:
        name, _, groups = path.rpartition(":")
    try:
        text = Path(name).expanduser().read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the host file {name!r} can't be read: {error}") from None
    if name.endswith((".yaml", ".yml")):
        yield from _inventory(name, text, [group.strip() for group in groups.split(",")] if groups else [])
        return
    if groups:
        raise UsageError(f"{name!r} has no groups: only a YAML inventory (.yaml) has")
    for number, line in enumerate(text.splitlines(), 1):
        host = line.split("#", 1)[0].strip()
        if not host:
            continue
        if host.startswith("@"):
            raise UsageError(f"{name}:{number}: a host file names hosts, not further files")
        try:
            parse_target(_range(host)[0])
            yield from _expand(host)
        except UsageError as error:
            raise UsageError(f"{name}:{number}: {error}") from None


def _inventory(name: str, text: str, wanted: list[str]) -> Iterable[HostSpec]:
    import yaml

    try:
        content = yaml.load(text, _strict_loader())
    except yaml.YAMLError as error:
        raise UsageError(f"the inventory {name!r} is no YAML: {error}") from None
    if not isinstance(content, dict) or not content.keys() <= {"defaults", "groups"} or not isinstance(content.get("groups"), dict):
        raise UsageError(f"the inventory {name!r} needs 'groups', and may have 'defaults'; it has {_keys(content)}")
    groups: dict[str, object] = content["groups"]
    unknown = [group for group in wanted if group not in groups]
    if unknown:
        raise UsageError(f"the inventory {name!r} has no group {_some(unknown)}; it has {', '.join(map(str, groups))}")
    defaults = _options(content.get("defaults") or {}, f"{name}: defaults")
    for group in wanted or groups:
        where = f"{name}: group {group}"
        body = groups[group]
        if not isinstance(body, dict) or not isinstance(body.get("hosts"), list):
            raise UsageError(f"{where} needs a list of 'hosts'; it has {_keys(body)}")
        shared = {**defaults, **_options({key: value for key, value in body.items() if key != "hosts"}, where)}
        for entry in body["hosts"]:
            own: dict[str, object] = {}
            host = entry
            if isinstance(entry, dict):
                host = entry.get("host")
                own = _options({key: value for key, value in entry.items() if key != "host"}, f"{where}, {host}")
            if not isinstance(host, str):
                raise UsageError(f"{where}: a host is a string, or a mapping with 'host'; not {entry!r}")
            for one in _range(host):
                yield _spec(one, {**shared, **own}, str(group))


def _strict_loader() -> Any:
    """YAML's safe loader, which takes the last of two equal keys, without that: a group would be lost."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            return super().construct_mapping(node, deep)

    return Strict


def _keys(content: object) -> str:
    return ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__


def _options(given: object, where: str) -> dict[str, object]:
    if not isinstance(given, dict):
        raise UsageError(f"{where}: options are a mapping, not {given!r}")
    for key, value in given.items():
        if key not in _OPTIONS:
            raise UsageError(f"{where}: there is no option {key!r}; there are {', '.join(_OPTIONS)}")
        if not isinstance(value, _OPTIONS[key]) or isinstance(value, bool) or value in ("", 0):
            raise UsageError(f"{where}: {key} is {value!r}")
        if key == "transport" and value not in _TRANSPORTS:
            raise UsageError(f"{where}: transport is one of {', '.join(_TRANSPORTS)}, not {value!r}")
        if isinstance(value, str) and (value.startswith("-") or any(ord(char) < 32 for char in value)):
            raise UsageError(f"{where}: {key} is {value!r}, which ssh could take for something else")
    return dict(given)


def _spec(host: str, options: dict[str, object], group: str) -> HostSpec:
    target = parse_target(host)
    user, port = target.user or options.get("user"), target.port or options.get("port")
    bare = f"[{target.host}]" if ":" in target.host else target.host
    text = (f"{user}@" if user else "") + bare + (f":{port}" if port else "")
    ssh: list[str] = []
    if "ssh_config" in options:
        ssh += ["-F", os.path.expanduser(str(options["ssh_config"]))]
    if "keyfile" in options:
        ssh += ["-i", os.path.expanduser(str(options["keyfile"]))]
    if "jump" in options:
        ssh += ["-o", f"ProxyJump={options['jump']}"]  # not -J, which may not stand beside via's ProxyCommand
    keywords: dict[str, object] = {}
    if "python" in options:
        keywords["python_executable"] = options["python"]
    if "transport" in options:
        keywords["transport"] = options["transport"]
    return HostSpec(host, text, tuple(ssh), keywords, group)
