"""`MultiServerDeployment`: many hosts at once, each with its own result."""

from __future__ import annotations

import atexit
import inspect
import os
import queue
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from zerodeploy.control.client import PendingCall
from zerodeploy.control.functions import prepare
from zerodeploy.deployment import commands, fanout
from zerodeploy.deployment.fanout import Watched, fan_out, in_parallel, is_the_callers, was_dropped
from zerodeploy.deployment.hosts import HostSpec, host_set, unique_names
from zerodeploy.deployment.mapping import Mapped
from zerodeploy.deployment.progress import Progress
from zerodeploy.deployment.results import Result, Results, Table
from zerodeploy.deployment.server import PAYLOAD_PARTS, DeployedServer
from zerodeploy.errors import ClusterError, HostUnreachable, LinkLost, UsageError, ZeroDeployError
from zerodeploy.link.base import Link

__all__ = ["MultiServerDeployment"]

_DEFAULT_SERVER_CLASS = "rpyc.utils.server.ThreadedServer"
# A login costs about 50 ms of one core here (key exchange, mostly) and waits for the network the rest of the time: some
# 8 round trips. So more than one per core pays, and hundreds at once only make each other wait for the cores.
_LOGINS_PER_CORE = 8
_LOGIN_TRIES = 5
_BACK_OFF_S = 0.5
_FILES_PER_HOST = 8  # 6 while it is live, and some during the start
_all: weakref.WeakSet[MultiServerDeployment] = weakref.WeakSet()
_ANSWER_S = 5.0  # for the answer of a command that was killed on its host after its own timeout


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
        wait: with False return at once; needs ``on_error="keep"``. `call` and `run` may be used right away and ask each host
            as soon as it is up, `wait` waits for the starts.
        progress: show what is waited for. Default: where standard error is a terminal, or in a notebook, once it takes half
            a second.

    For more hosts than the process may have open files for (8 each), the soft limit is raised towards the hard one.

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
        wait: bool = True,
        progress: bool | None = None,
        **options: Any,
    ) -> None:
        self._servers: dict[int, DeployedServer] = {}
        self._errors: dict[int, Exception] = {}
        self._tries: dict[int, int] = {}
        fanout.check_options(on_error, wait, max_parallel, deploy_timeout)
        self.remote_machines = remote_machines
        self._specs = host_set(remote_machines, allow_duplicates=allow_duplicates)
        self._names = unique_names([spec.name for spec in self._specs])
        parts = {name: options.pop(name) for name in PAYLOAD_PARTS if name in options}
        payload = DeployedServer._payload_of(options.pop("payload", None), **parts)  # one for all: what they share is made once
        self._shipped = payload.names if payload else frozenset()
        self._options = {"server_class": server_class, **({"payload": payload} if payload else {}), **options}
        self._parallel = max_parallel or _LOGINS_PER_CORE * (os.cpu_count() or 1)
        self._deploy_timeout = deploy_timeout
        self._progress = progress
        self._starting: set[Watched] = set()
        self._mistake: Exception | None = None  # an argument that no host can do anything with
        self._coming: dict[int, list[Callable[[], None]]] = {}  # hosts on their way up, and what is to be done then
        self._lock = threading.Lock()
        self._over = False
        self._ended = threading.Event()
        self._reviving = threading.Lock()
        self._pid = os.getpid()
        self._places = {name: index for index, name in enumerate(self._names)}
        inspect.signature(DeployedServer).bind(None, **self._options)  # a TypeError for what it does not take
        fanout.allow_files(_FILES_PER_HOST * len(self._specs))
        _all.add(self)
        self._started = self._launch(range(len(self._specs)))
        if not wait:
            return
        try:
            self.wait()
        except BaseException:
            self.cancel()
            raise
        if self._errors and on_error == "raise":
            errors = self.failed
            self.close()
            lines = "".join(f"\n  {name}: {fanout.cause(error)}" for name, error in errors.items())
            raise ClusterError(f"{len(errors)} of {len(self._specs)} hosts did not start:{lines}", errors=errors)

    # starting

    def _launch(self, indices: Iterable[int]) -> queue.SimpleQueue[tuple[int, BaseException | None]]:
        until = None if self._deploy_timeout is None else time.monotonic() + self._deploy_timeout
        with self._lock:
            todo = [index for index in indices if index not in self._coming]
            self._coming.update({index: [] for index in todo})
        return fan_out(lambda index: self._deploy_one(index, until), todo, self._parallel)

    def wait(self) -> None:
        """Until no host is on its way up any more. Raises what is wrong with the arguments, but no host's error."""
        groups = Counter(spec.group for spec in self._specs)
        with Progress("deploying", groups, self._progress if self._coming else False) as progress:
            counted = {index for index in range(len(self._specs)) if index not in self._coming}
            for index in counted:
                progress.done(self._specs[index].group, self._is_live(index))
            while self._coming:
                try:
                    index, _ = progress.get(self._started, 0.5)
                except queue.Empty:  # another thread waits as well, and took it
                    continue
                if index in counted:
                    continue
                failed = self._errors.get(index)
                last = "" if failed is None else f"{self._names[index]}: {type(failed).__name__}"
                progress.done(self._specs[index].group, failed is None, last)
        if self._mistake is not None:
            raise self._mistake

    def _deploy_one(self, index: int, until: float | None) -> None:
        try:
            self._try_to_deploy(index, until)
        except Exception as error:
            self._errors[index] = self._mistake = error
        finally:
            with self._lock:
                waiting = self._coming.pop(index, [])
            for then in waiting:
                then()

    def _try_to_deploy(self, index: int, until: float | None) -> None:
        spec = self._specs[index]
        for attempt in range(1, _LOGIN_TRIES + 1):
            link = Watched(spec.link())
            with self._lock:
                if self._over:
                    self._errors[index] = LinkLost("the deployment is closed", host=spec.name)
                    return
                self._starting.add(link)
            try:
                server = self._start(link, spec, until)
            except (UsageError, TypeError):
                raise  # what the caller gave makes no sense, on no host
            except Exception as error:
                self._tries[index] = attempt
                if attempt == _LOGIN_TRIES or not was_dropped(error) or not self._back_off(attempt, until):
                    with self._lock:
                        self._errors[index] = link.blame(error)
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
            if "payload" in options:
                options["payload_timeout"] = min(float(options.get("payload_timeout") or left_s), left_s)
        return DeployedServer(link, **options)

    def _back_off(self, attempt: int, until: float | None) -> bool:
        """Wait a while, each time longer and never in step with the others. False when there is no time left for that."""
        pause_s = _BACK_OFF_S * 2 ** (attempt - 1) * (0.5 + random.random())
        if until is not None and time.monotonic() + pause_s > until:
            return False
        return not self._ended.wait(pause_s)

    def revive(self, *, wait: bool = True) -> list[str]:
        """Deploy again where it failed, at the start or later; gives the names of the hosts that are live again.

        With ``wait=False`` they are on their way then, as with the parameter of that name.
        """
        with self._reviving:
            self.wait()
            dead = [index for index in range(len(self._specs)) if not self._is_live(index)]
            with self._lock:
                lost = [server for index in dead if (server := self._servers.pop(index, None)) is not None]
            for server in lost:
                server.close(1.0)
            self._mistake = None
            self._started = self._launch(dead)
            if wait:
                self.wait()
            return [self._names[index] for index in dead if self._is_live(index)]

    # what it is

    def _is_live(self, index: int) -> bool:
        server = self._servers.get(index)
        return server is not None and not server.closed

    @property
    def servers(self) -> list[DeployedServer]:
        """The deployments that were made, in the order of the hosts given; empty after `close`."""
        return [server for _, server in self._made()]

    def _made(self) -> list[tuple[int, DeployedServer]]:
        with self._lock:  # others may close or revive meanwhile
            return sorted(self._servers.items())

    @property
    def live(self) -> list[DeployedServer]:
        """Those of them whose link is up."""
        return [server for server in self.servers if not server.closed]

    def _live_by_name(self) -> dict[str, DeployedServer]:
        return {self._names[index]: server for index, server in self._made() if not server.closed}

    @property
    def hosts(self) -> list[str]:
        """All names, in the order given."""
        return list(self._names)

    @property
    def failed(self) -> dict[str, Exception]:
        """The hosts that did not start or were lost since, each with its error."""
        errors = ((name, self._failure(index)) for index, name in enumerate(self._names))
        return {name: error for name, error in errors if error is not None}

    def _failure(self, index: int) -> Exception | None:
        server = self._servers.get(index)
        if server is None:
            return self._errors.get(index)
        if server.closed and not self._over:
            return server.lost or LinkLost("the deployment is closed", host=self._names[index])
        return None

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
        rows = []
        for index, name in enumerate(self._names):
            server, error = self._servers.get(index), self._failure(index)
            if server is None and error is None:
                error = LinkLost("the deployment is closed")
            if index in self._coming:
                continue
            known = server.summary if server is not None and error is None else None
            seconds = 0.0 if server is None else server.login_seconds
            rows.append(Result(name, known, error, seconds, self._tries.get(index, 1)))
        coming = len(self._coming)
        return Table(rows, good="open")._repr_html_() + (
            f"<p>{coming} of {len(self._names)} still on their way</p>" if coming else ""
        )

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
        self.wait()
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
        seconds is one with a `TimeoutError`; it is told to stop. Ctrl-C while rows are waited for stops the calls.
        """
        return self.call_with(function, args, kwargs, timeout=timeout)

    def call_with(self, function: Callable[..., Any] | str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
                  timeout: float | None = None, hosts: Iterable[str] | None = None) -> Results:  # fmt: skip
        """`call` on the hosts that are named only; default all."""
        return self._ask(function, args, kwargs or {}, timeout, hosts, lambda value: value)

    def run(self, argv: Sequence[str | os.PathLike[str]], *, input: str | bytes | None = None, text: bool = False,
            timeout: float | None = None, env: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None,
            script: tuple[str, bytes] | None = None, hosts: Iterable[str] | None = None) -> Results:  # fmt: skip
        """Run the same command on every host; values are `subprocess.CompletedProcess`, as of `DeployedServer.run`.

        Args:
            timeout: seconds for it on each host; then its process group is killed and the row has a
                `subprocess.TimeoutExpired` with what it had written.
            script: name and content of a Python script, which is run with *argv* as its arguments.
        """
        words, options = commands.arguments(argv, input=input, text=text, timeout=timeout, env=env, cwd=cwd, script=script)
        patience_s = None if timeout is None else timeout + _ANSWER_S
        return self._ask(
            commands.remote_run, (words, options), {}, patience_s, hosts,
            lambda value: commands.completed(words, value, text=text, timeout=timeout),
        )  # fmt: skip

    def _ask(self, function: Callable[..., Any] | str, args: Sequence[Any], kwargs: Mapping[str, Any], timeout: float | None,
             hosts: Iterable[str] | None, shape: Callable[[Any], Any]) -> Results:  # fmt: skip
        names = self._names if hosts is None else list(dict.fromkeys(hosts))
        if unknown := [name for name in names if name not in self._places]:
            raise UsageError(f"{', '.join(map(str, unknown[:5]))}: no host of this deployment")
        fanout.check_call(timeout)
        prepare(function, self._shipped)  # what can't travel is told now, whatever becomes of the hosts
        began = {name: time.monotonic() for name in names}
        rows: queue.SimpleQueue[Callable[[], Result]] = queue.SimpleQueue()
        pending: dict[str, PendingCall] = {}
        given_up: set[str] = set()
        deadlines: list[tuple[float, str]] = []

        def row(name: str, seconds: float, call: PendingCall | None = None, error: Exception | None = None) -> Result:
            value = None
            if call is not None:
                try:
                    value = shape(call.value())
                except Exception as problem:
                    error = problem
            return Result(name, value, error, seconds, self._tries.get(self._places[name], 1))

        def ask(name: str, *, here: bool) -> None:
            index = self._places[name]
            error = self._failure(index)
            if name in given_up:
                return
            if error is None:
                began[name] = time.monotonic()
                if timeout is not None:
                    deadlines.append((began[name] + timeout, name))
                try:
                    call = pending[name] = self._servers[index].begin_call(function, args, kwargs)
                    call.when_whole(lambda: rows.put(partial(row, name, time.monotonic() - began[name], call)))
                    return
                except (ZeroDeployError, KeyError) as problem:
                    if here and is_the_callers(problem):
                        raise
                    error = problem if isinstance(problem, ZeroDeployError) else LinkLost("the deployment is closed", host=name)
            rows.put(partial(row, name, 0.0, error=error))

        try:
            for name in names:
                with self._lock:
                    coming = self._coming.get(self._places[name])
                    if coming is not None:
                        coming.append(partial(ask, name, here=False))
                if coming is None:
                    ask(name, here=True)
        except BaseException:
            for call in list(pending.values()):
                call.drop()
            raise

        def late(name: str, reason: str) -> Result:
            given_up.add(name)
            if name in pending:
                pending[name].drop()
            kind = InterruptedError if reason else TimeoutError
            error = kind(f"{name}: {reason or f'no answer within {timeout:g} s'}; it was told to stop")
            return row(name, time.monotonic() - began[name], error=error)

        return Results(list(names), rows, deadlines=None if timeout is None else deadlines, late=late, progress=self._progress)

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
        prepare(function, self._shipped)
        self.wait()
        return Mapped(self._live_by_name, function, list(items), retries, timeout, self._progress).run(return_errors)

    # ending

    def cancel(self) -> None:
        """End it now, from any thread: starts are broken off, calls fail, all that is there is closed."""
        self.close(2.0)

    def close(self, timeout: float | None = None) -> None:
        """Close all deployments, in parallel; starts that are under way are broken off. Twice is fine."""
        self._break_off()
        if os.getpid() != self._pid:
            return
        with self._lock:
            servers = list(self._servers.values())
            self._servers.clear()
        for _ in in_parallel(lambda server: server.close(timeout), servers, max(self._parallel, 16)):
            pass

    def _break_off(self) -> None:
        """End the starts that are under way; no other one begins."""
        if os.getpid() != self._pid:
            return  # a forked child must not end its parent's
        with self._lock:
            self._over = True
            starting = list(self._starting)
        self._ended.set()
        for link in starting:
            link.give_up()

    def __enter__(self) -> MultiServerDeployment:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _at_exit() -> None:
    """The interpreter ends: what is up is closed by `DeployedServer`'s own handler, what is on its way must not go on."""
    for dep in list(_all):
        dep._break_off()


atexit.register(_at_exit)
