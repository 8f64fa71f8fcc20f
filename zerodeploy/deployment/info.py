"""What is known of a deployment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["ServerInfo", "platform_tags"]


@dataclass(frozen=True)
class ServerInfo:
    """One deployment, as `DeployedServer.info` gives it.

    ``pid`` is that of the process that runs remote code; ``platform`` has ``machine``, ``system``, ``libc`` and ``tags``
    (wheel tags, PEP 425, best first); ``bytes_sent`` counts what went down the link so far; ``phases`` maps a stage
    (login, private dir, start, forward) to seconds.
    """

    host: str
    pid: int
    python: str
    implementation: str
    platform: Mapping[str, object]
    private_dir: str
    bytes_sent: int
    phases: Mapping[str, float]
    keeper_pid: int
    executable: str
    _transport: Callable[[], str] = field(repr=False, compare=False)

    @property
    def transport(self) -> str:
        """What connections really go through; tried out when none was made yet, so it shows a refused forwarding."""
        return self._transport()

    def as_dict(self) -> dict[str, object]:
        """All of it as plain data."""
        return {
            "host": self.host, "pid": self.pid, "python": self.python, "implementation": self.implementation,
            "platform": dict(self.platform), "private_dir": self.private_dir, "transport": self.transport,
            "bytes_sent": self.bytes_sent, "phases": {name: round(s, 4) for name, s in self.phases.items()},
            "keeper_pid": self.keeper_pid, "executable": self.executable,
        }  # fmt: skip


def platform_tags(facts: Mapping[str, object]) -> list[str]:
    """The wheel tags that the agent's *facts* allow for CPython (PEP 425, 600, 656), best first."""
    major, minor = (int(part) for part in facts["version"][:2])  # type: ignore[index]
    machine, libc = str(facts["machine"]), str(facts["libc"])
    if facts["system"] != "Linux":
        return ["py3-none-any"]
    platforms = []
    name, _, version = libc.partition(" ")
    if name == "glibc":
        low = 5 if machine in ("x86_64", "i686") else 17
        glibc_minor = int(version.split(".")[1])
        legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
        for number in range(glibc_minor, low - 1, -1):
            platforms.append(f"manylinux_2_{number}_{machine}")
            if number in legacy:
                platforms.append(f"{legacy[number]}_{machine}")
    elif name == "musl":
        newest = int(version.split(".")[1]) if version.count(".") else 2
        platforms += [f"musllinux_1_{number}_{machine}" for number in range(newest, 0, -1)]
    platforms.append(f"linux_{machine}")
    interpreter = f"cp{major}{minor}" if facts["implementation"] == "cpython" else f"pp{major}{minor}"
    tags = [f"{interpreter}-{interpreter}-{platform}" for platform in platforms]
    tags += [f"{interpreter}-abi3-{platform}" for platform in platforms]
    tags += [f"py3-none-{platform}" for platform in platforms]
    return [*tags, f"{interpreter}-none-any", "py3-none-any"]
