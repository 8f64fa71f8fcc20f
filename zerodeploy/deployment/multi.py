"""`MultiServerDeployment`: many hosts at once, each with its own result."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from zerodeploy.control.client import PendingCall
from zerodeploy.deployment.fanout import Watched, cause, in_parallel, is_the_callers, was_dropped
from zerodeploy.deployment.hosts import HostSpec, host_set
from zerodeploy.deployment.mapping import Mapping
from zerodeploy.deployment.results import Result, Results, Table
from zerodeploy.deployment.server import DeployedServer
from zerodeploy.errors import ClusterError, HostUnreachable, LinkLost, UsageError, ZeroDeployError
from zerodeploy.link.base import Link

__all__ = ["MultiServerDeployment"]

_DEFAULT_SERVER_CLASS = "rpyc.utils.server.ThreadedServer"
# A login costs about 50 ms of one core here (key exchange, mostly) and waits for the network the rest of the time: some
# 8 round trips. So more than one per core pays, and hundreds at once only make each other wait for the cores.
_LOGINS_PER_CORE = 8
_LOGIN_TRIES = 4
_BACK_OFF_S = 0.5


class MultiServerDeployment:
    """Deployments on a set of hosts, made in parallel.

    Args:
        remote_machines: a host set: hosts as `DeployedServer` takes them, ranges, ``@file``, an inventory, or a list of
            these. See `zerodeploy.deployment.hosts`. Mistakes and duplicates are told before anything is contacted.
        server_class: as for `DeployedServer`, as are all *options*.
        on_error: ``"raise"``: when a host does not start, the others are closed and a `ClusterError` names each failure.
            ``"keep"``: go on with those that did; see `failed`.
        max_parallel: logins at a time. Default: 8 per core.
        deploy_timeout: seconds for the start of all of them together.
        allow_duplicates: take a host that is given twice as two.

    Raises:
        UsageError (a ValueError): the host set or an argument makes no sense. Nothing was contacted.
        ClusterError: with ``on_error="raise"``. Nothing is left on any host.
    """

    def __init__(
        self,
        remote_machines: object,
        server_class: str = _DEFAULT_SERVER_CLASS,
        *,
        on_error: str = "raise",
        max_parallel: int | None = None,
        deploy_timeout: float | None = None,
        allow_duplicates: bool = False,
        **options: Any,
    ) -> None:
        self._servers: dict[int, DeployedServer] = {}
        self._errors: dict[int, Exception] = {}
        self._tries: dict[int, int] = {}
        if on_error not in ("raise", "keep"):
            raise UsageError(f'on_error is "raise" or "keep", not {on_error!r}')
        if max_parallel is not None and (not isinstance(max_parallel, int) or max_parallel < 1):
            raise UsageError(f"max_parallel is a number above 0, not {max_parallel!r}")
        if deploy_timeout is not None and not deploy_timeout > 0:
            raise UsageError(f"deploy_timeout is a number of seconds above 0, not {deploy_timeout!r}")
        self.remote_machines = remote_machines
        self._specs = host_set(remote_machines, allow_duplicates=allow_duplicates)
        self._names = _unique([spec.name for spec in self._specs])
        self._options = {"server_class": server_class, **options}
        self._parallel = max_parallel or _LOGINS_PER_CORE * (os.cpu_count() or 1)
        self._deploy_timeout = deploy_timeout
        self._starting: set[Watched] = set()
        self._lock = threading.Lock()
        self._over = False
        try:
            self._deploy(range(len(self._specs)))
        except BaseException:
            self.cancel()
            raise
        if self._errors and on_error == "raise":
            errors = self.failed
            self.close()
            lines = "".join(f"\n  {name}: {cause(error)}" for name, error in errors.items())
            raise ClusterError(f"{len(errors)} of {len(self._specs)} hosts did not start:{lines}", errors=errors)

    # starting

    def _deploy(self, indices: Iterable[int]) -> None:
        until = None if self._deploy_timeout is None else time.monotonic() + self._deploy_timeout
        for _ in in_parallel(lambda index: self._deploy_one(index, until), list(indices), self._parallel):
            pass

    def _deploy_one(self, index: int, until: float | None) -> None:
        spec = self._specs[index]
        for attempt in range(1, _LOGIN_TRIES + 1):
            link = Watched(spec.link())
            with self._lock:
                if self._over:
                    return
                self._starting.add(link)
            try:
                server = self._start(link, spec, until)
            except Exception as error:
                self._tries[index] = attempt
                if attempt == _LOGIN_TRIES or not was_dropped(error) or not self._back_off(attempt, until):
                    with self._lock:
                        self._errors[index] = error
                    return
            else:
                with self._lock:
                    self._tries[index] = attempt
                    keep = not self._over
                    if keep:
                        self._servers[index] = server
                        self._errors.pop(index, None)
                if not keep:
                    server.close(1.0)
                return
            finally:
                with self._lock:
                    self._starting.discard(link)

    def _start(self, link: Link, spec: HostSpec, until: float | None) -> DeployedServer:
        options = {**self._options, **spec.options}
        if until is not None:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise HostUnreachable(
                    f"its turn did not come within the deploy_timeout of {self._deploy_timeout:g} s", host=spec.name
                )
            options["connect_timeout"] = min(float(options.get("connect_timeout", 30.0)), left_s)
        return DeployedServer(link, **options)

    def _back_off(self, attempt: int, until: float | None) -> bool:
        """Wait a while, each time longer and never in step with the others. False when there is no time left for that."""
        pause_s = _BACK_OFF_S * 2 ** (attempt - 1) * (0.5 + random.random())
        if self._over or (until is not None and time.monotonic() + pause_s > until):
            return False
        time.sleep(pause_s)
        return not self._over

    def revive(self) -> list[str]:
        """Deploy again where it failed, at the start or later; gives the names of the hosts that are live again."""
        dead = [index for index in range(len(self._specs)) if not self._is_live(index)]
        for index in dead:
            old = self._servers.pop(index, None)
            if old is not None:
                old.close(1.0)
        self._deploy(dead)
        return [self._names[index] for index in dead if self._is_live(index)]

    # what it is

    def _is_live(self, index: int) -> bool:
        server = self._servers.get(index)
        return server is not None and not server.closed

    @property
    def servers(self) -> list[DeployedServer]:
        """The deployments that were made, in the order of the hosts given; empty after `close`."""
        return [self._servers[index] for index in sorted(self._servers)]

    @property
    def live(self) -> list[DeployedServer]:
        """Those of them whose link is up."""
        return [server for server in self.servers if not server.closed]

    def _live_by_name(self) -> dict[str, DeployedServer]:
        return {self._names[index]: self._servers[index] for index in sorted(self._servers) if self._is_live(index)}

    @property
    def hosts(self) -> list[str]:
        """All names, in the order given."""
        return list(self._names)

    @property
    def failed(self) -> dict[str, Exception]:
        """The hosts that did not start or were lost since, each with its error."""
        found: dict[str, Exception] = {}
        for index, name in enumerate(self._names):
            server = self._servers.get(index)
            if server is None and index in self._errors:
                found[name] = self._errors[index]
            elif server is not None and server.closed and not self._over:
                found[name] = server.lost or LinkLost("the deployment is closed", host=name)
        return found

    @property
    def attempts(self) -> dict[str, int]:
        """How many logins each host took: more than one where its sshd dropped connections (MaxStartups)."""
        return {self._names[index]: tries for index, tries in sorted(self._tries.items())}

    def __iter__(self) -> Iterator[DeployedServer]:
        return iter(self.servers)

    def __len__(self) -> int:
        return len(self._servers)

    def __getitem__(self, index: int | str) -> DeployedServer:
        if isinstance(index, str):
            if index not in self._names:
                raise KeyError(index)
            server = self._servers.get(self._names.index(index))
            if server is None:
                raise self.failed.get(index) or LinkLost("the deployment is closed", host=index)
            return server
        return self.servers[index]

    def __repr__(self) -> str:
        return f"<MultiServerDeployment of {len(self._names)} hosts, {len(self.live)} live>"

    def _repr_html_(self) -> str:
        failed = self.failed
        rows = []
        for index, name in enumerate(self._names):
            server = self._servers.get(index)
            error = failed.get(name)
            rows.append(Result(name, server.summary if server is not None and error is None else None, error))
        return Table(rows)._repr_html_()

    # connections

    def connect_all(self, service: Any = None, config: dict[str, Any] = {}) -> list[Any]:
        """A connection to each live deployment, in the order of the hosts."""
        if service is None:
            from rpyc.core.service import VoidService

            service = VoidService
        return self._on_each(lambda server: server.connect(service, config))

    def classic_connect_all(self) -> list[Any]:
        """A classic connection to each live deployment, in the order of the hosts."""
        return self._on_each(lambda server: server.classic_connect())

    def _on_each(self, function: Callable[[DeployedServer], Any]) -> list[Any]:
        made: dict[int, Any] = {}
        failed: list[Exception] = []
        servers = self.live

        def one(index: int) -> None:
            try:
                made[index] = function(servers[index])
            except Exception as error:
                failed.append(error)

        for _ in in_parallel(one, list(range(len(servers))), self._parallel):
            pass
        if failed:
            raise failed[0]
        return [made[index] for index in range(len(servers))]

    # calls

    def call(self, function: Callable[..., Any] | str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Results:
        """Run the same call on every host. All of them are asked at once; see `Results`.

        Hosts that failed at the start or since are rows with their errors. A host that does not answer within *timeout*
        seconds is one with a `TimeoutError`; it is told to stop.
        """
        began = time.monotonic()
        rows: queue.SimpleQueue[Callable[[], Result]] = queue.SimpleQueue()
        pending: dict[str, PendingCall] = {}
        failed = self.failed
        for index, name in enumerate(self._names):
            error: Exception | None = failed.get(name)
            if error is None:
                try:
                    pending[name] = self._servers[index].begin_call(function, args, kwargs)
                    continue
                except UsageError:
                    raise
                except (ZeroDeployError, KeyError) as problem:
                    if is_the_callers(problem):
                        for call in pending.values():
                            call.drop()
                        raise
                    error = problem if isinstance(problem, ZeroDeployError) else LinkLost("the deployment is closed", host=name)
            rows.put(lambda name=name, error=error: Result(name, error=error))  # type: ignore[misc]
        for name, call in pending.items():
            call.reply.watch(lambda name=name, call=call: rows.put(_row_of(name, call, time.monotonic() - began)))  # type: ignore[misc]

        def late(silent: list[str]) -> list[Result]:
            for name in silent:
                pending[name].drop()
            text = f"no answer within {timeout} s; it was told to stop"
            return [Result(name, error=TimeoutError(f"{name}: {text}"), seconds=time.monotonic() - began) for name in silent]

        return Results(list(self._names), rows, until=None if timeout is None else began + timeout, late=late)

    def map(self, function: Callable[..., Any] | str, items: Iterable[Any], *, retries: int = 0, timeout: float | None = None,
            return_errors: bool = False) -> list[Any]:  # fmt: skip
        """Call *function* on each of *items*, spread over the live hosts: each takes the next item when it is free.

        An item whose call fails, or whose host is lost, is tried again on another host if there is one, *retries* times
        at most. Every item has exactly one result, in the order of the items.

        Args:
            timeout: seconds for one item on one host.
            return_errors: put errors where values are missing, instead of raising.

        Raises:
            MapError: items are left without a value.
        """
        return Mapping(self._live_by_name, function, list(items), retries, timeout).run(return_errors)

    # ending

    def cancel(self) -> None:
        """End it now, from any thread: starts are broken off, calls fail, all that is there is closed."""
        with self._lock:
            self._over = True
            starting = list(self._starting)
        for link in starting:
            link.give_up()
        self.close(2.0)

    def close(self, timeout: float | None = None) -> None:
        """Close all deployments, in parallel. Twice is fine."""
        with self._lock:
            self._over = True
            servers = list(self._servers.values())
            self._servers.clear()
        for _ in in_parallel(lambda server: server.close(timeout), servers, max(self._parallel, 16)):
            pass

    def __enter__(self) -> MultiServerDeployment:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _row_of(name: str, call: PendingCall, seconds: float) -> Callable[[], Result]:
    def row() -> Result:
        try:
            return Result(name, call.value(), seconds=seconds)
        except Exception as error:
            return Result(name, error=error, seconds=seconds)

    return row


def _unique(names: list[str]) -> list[str]:
    """Names that tell hosts apart which were given twice on purpose: host, host#2, …"""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
