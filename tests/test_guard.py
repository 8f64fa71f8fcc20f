"""rhl-guard: what it lets through is what a shell would have run, and what it lets through is little."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import can_or_skip
from zerodeploy import GuardRefused
from zerodeploy.services import guard, helpers
from zerodeploy.services.guard import Policy, decide, policy_of
from zerodeploy.testing import SshServer, sshd_path

HOME = "/home/svc"
ANY = Policy(permissive=True)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("rhl-ps", ["rhl-ps"]), ("  rhl-ps   --json ", ["rhl-ps", "--json"]), ("rhl-inspect 'a b'", ["rhl-inspect", "a b"]), ('rhl-inspect "a b"', ["rhl-inspect", "a b"]),
        ("PATH=$HOME/miniforge3/bin:$HOME/miniconda3/bin:$PATH rhl-ps", ["rhl-ps"]), ("A=1 B='x y' C=\"$HOME z\" rhl-stop k", ["rhl-stop", "k"]), ("A= rhl-ps", ["rhl-ps"]),
        ("rhl-inspect '$(id)'", ["rhl-inspect", "$(id)"]), ("rhl-logs k --tail 5", ["rhl-logs", "k", "--tail", "5"]), ("rhl-ps --help", ["rhl-ps", "--help"]),
        ("rhl-handshake http://127.0.0.1:80/x", ["rhl-handshake", "http://127.0.0.1:80/x"]), ("${X} rhl-ps", None), ("rhl-handshake 'http://h/?a=1&b=2'", ["rhl-handshake", "http://h/?a=1&b=2"]),
        ("", None), (" ", None), ("A=1", None), ("rhl-guard", None), ("rhl-guard --permissive-paths", None), ("/usr/bin/rhl-ps", None), ("./rhl-ps", None), ("rhl-PS", None),
        ("rhl-psx", None), ("rhl-", None), ("ls", None), ("bash -lc 'rhl-ps'", None), ("python3 -c x", None), ("kill -1 5", None), ("env rhl-ps", None), ("exec rhl-ps", None),
        ("rhl-ps; ls", None), ("rhl-ps && ls", None), ("rhl-ps | ls", None), ("rhl-ps > /tmp/x", None), ("rhl-ps $(ls)", None), ("rhl-ps `ls`", None), ("rhl-ps\nls", None),
        ("rhl-ps & ls", None), ("rhl-inspect $HOME", None), ('rhl-inspect "$HOME"', None), ("rhl-inspect a\\ b", None), ("rhl-inspect *", None), ("rhl-inspect 'a", None), ('rhl-inspect "a', None),
        ("A=$(id) rhl-ps", None), ("A=`id` rhl-ps", None), ("A=1;id rhl-ps", None), ("A=\"$(id)\" rhl-ps", None), ("A=1\nB rhl-ps", None), ("A=(1) rhl-ps", None),
        ("rhl-inspect --with-m k", None), ("rhl-inspect --with-mtime=1 k", None), ("rhl-inspect", None), ("rhl-logs k --tail -5", None), ("rhl-logs k --tail x", None), ("rhl-ps extra", None),
        ("rhl-ps # x", None), ("rhl-ps !x", None), ("rhl-inspect {a,b}", None), ("rhl-inspect ~/x\0", None), ("rhl-ps\x0b", None), ("é rhl-ps", None), ("x" * 70_000, None),
        ("PATH+=x rhl-ps", None), ("1A=x rhl-ps", None), ("A[0]=x rhl-ps", None),
    ],
)  # fmt: skip
def test_commands(command, expected):
    if expected is None:
        with pytest.raises(GuardRefused):
            decide(command, ANY, HOME)
    else:
        assert decide(command, ANY, HOME) == expected


@pytest.fixture
def home(tmp_path):
    made = tmp_path / "home"
    for name in ("data/deep", "marked", "other"):
        (made / name).mkdir(parents=True)
    (made / "marked" / "seamless.db").write_text("")
    (made / "data" / "MARK").write_text("")
    os.symlink("/etc", made / "data" / "sly")
    os.symlink(made / "other", made / "data" / "beside")
    return made


def paths(words: list[str]) -> list[str]:
    return words[words.index("--") + 1 :]


def test_data_roots(home, tmp_path):
    roots = tmp_path / "roots"
    roots.write_text(f"# comment\n\n~/data\n{home}/gone\n")
    policy = policy_of(["--data-roots", str(roots)], str(home))
    for path in (
        "~/data",
        f"{home}/data",
        f"{home}/data/deep",
        f"{home}/data/none/yet",
        f"{home}/gone/x",
    ):
        assert paths(decide(f"rhl-clear {path}", policy, str(home))) == [os.path.realpath(path.replace("~", str(home)))]
    for path in (
        f"{home}/other",
        f"{home}/datax",
        f"{home}/data/beside",
        f"{home}/data/sly",
        f"{home}/data/../other",
        "data",
        "~",
        "/",
        "/etc",
        f"{home}/data/.ssh",
        "~svc/data",
        "~/.ssh",
    ):
        with pytest.raises(GuardRefused):
            decide(f"rhl-clear {path}", policy, str(home))
    with pytest.raises(GuardRefused, match="data root"):
        decide(f"rhl-ps-persistent {home}/data {home}/other", policy, str(home))
    both = decide(f"rhl-ps-persistent {home}/data --json --marker MARK --file F --level 2 {home}/data/deep", policy, str(home))
    assert both == [
        "rhl-ps-persistent",
        "--marker=MARK",
        "--level=2",
        "--file=F",
        "--json",
        "--",
        f"{home}/data",
        f"{home}/data/deep",
    ]
    assert helpers.parser(both[0]).parse_intermixed_args(both[1:]).paths == [f"{home}/data", f"{home}/data/deep"]
    assert decide("rhl-ps", policy, str(home)) == ["rhl-ps"]


def test_markers(home):
    seamless = policy_of(["--clear-policy", "seamless"], str(home))
    own = policy_of(["--clear-policy", "marker:MARK"], str(home))
    assert paths(decide(f"rhl-clear {home}/marked", seamless, str(home))) == [f"{home}/marked"]
    assert paths(decide(f"rhl-clear {home}/data", own, str(home))) == [f"{home}/data"]
    for path, policy in ((f"{home}/data", seamless), (f"{home}/marked", own), (f"{home}/none", own), (f"{home}/other", seamless)):
        with pytest.raises(GuardRefused, match="no marker"):
            decide(f"rhl-ps-persistent {path}", policy, str(home))


def test_the_heuristics_count_always(home):
    for path in ("relative", "~", str(home), str(home.parent), "/", "/etc", "/usr", "/var", "/opt", "/proc", "/run", "~/.ssh", "/data/.cache/x", "~/data/sly", "/usr/../etc", "~/data/..",
                 "/data/../etc", "//etc", "/etc/.", "/x/./y", "~root/x", "''", "/proc/self/root"):  # fmt: skip
        with pytest.raises(GuardRefused):
            decide(f"rhl-clear {path}", ANY, str(home))
    assert paths(decide("rhl-clear /data/x", ANY, str(home))) == ["/data/x"]
    assert paths(decide("rhl-clear -- /data/x", ANY, str(home))) == ["/data/x"]


def test_without_a_policy_no_path(home):
    for command in (f"rhl-clear {home}/data", "rhl-clear --help", "rhl-ps-persistent", f"rhl-ps-persistent {home}/data"):
        with pytest.raises(GuardRefused, match="path-policy flag"):
            decide(command, Policy(), str(home))
    assert decide("rhl-stop k", Policy(), str(home)) == ["rhl-stop", "k"]


def test_its_own_arguments(home, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("~/data\nhunter2 is the password\n")
    for argv in (["--permissive-paths", "--data-roots", str(secret)], ["--clear-policy", "seamless", "--permissive-paths"], ["--clear-policy", "x"], ["--clear-policy", "marker:"],
                 ["--clear-policy", "marker:a/b"], ["--data-roots", str(secret)], ["--data-roots", str(tmp_path / "none")], ["--data-roots", "/"]):  # fmt: skip
        with pytest.raises(GuardRefused) as caught:
            policy_of(argv, str(home))
        assert "hunter2" not in str(caught.value)
    for argv in (["--permissive"], ["x"], ["--data-roots"]):
        with pytest.raises(SystemExit) as usage:
            policy_of(argv, str(home))
        assert usage.value.code == 2


PIECES = st.sampled_from(
    ["rhl-ps", "rhl-inspect", "rhl-clear", "rhl-stop", "rhl-guard", "rhl-handshake", "k", " ", " ", " ", "\t", "\n", "'", '"', "\\", "$", "$(", ")", "`", ";", "&", "&&", "|", "<", ">", "*", "?",
     "[", "]", "{", "}", ",", "~", "!", "#", "=", "A=", "PATH=", "$HOME", "${IFS}", "--", "--json", "--tail", "-", "/tmp/x", "/data/y", "..", ".", "/", "0", "\0", "\x7f", "é", "\u2028", "\x85", "%", "^", "@", ":", "+=", "x"]
)  # fmt: skip


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a command as sshd would have a shell do it, with helpers that say what they were called with."""
    folder = tmp_path_factory.mktemp("bin")
    for name in (*helpers.HELPERS, "rhl-guard"):
        (folder / name).write_text('#!/bin/sh\nprintf \'%s\\0\' "${0##*/}" "$@"\n')
        (folder / name).chmod(0o755)

    def run(command: str) -> list[str]:
        done = subprocess.run(
            ["/bin/sh", "-c", command], capture_output=True, env={"PATH": str(folder), "HOME": HOME}, cwd="/", timeout=20
        )
        return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]

    return run


def test_what_it_lets_through_is_what_a_shell_would_run(shell):
    count = 0

    some = st.lists(PIECES, max_size=14).map("".join)
    plain = st.lists(
        st.sampled_from(
            ["k", "'a b'", '"c"', "x'y'\"z\"", "--json", "--with-mtime", "--tail", "5", "-", "'$;'", "é", "%^@:", "A=b"]
        ),
        max_size=5,
    ).map(" ".join)
    names = st.sampled_from(["rhl-ps ", "rhl-inspect ", "rhl-stop ", "A=1 rhl-rm ", "rhl-logs  ", "B='x y' rhl-inspect "])

    @given(st.one_of(some, st.builds(str.__add__, names, st.one_of(some, plain))))
    @settings(max_examples=4000, deadline=None, database=None)
    @example("rhl-inspect 'a'\"b\"c")
    @example("A='x'\"y\"z rhl-ps --json")
    @example("PATH=$HOME/b:$PATH rhl-stop k")
    @example("rhl-stop ~")
    @example("rhl-stop a~b %x")
    def check(command: str) -> None:
        nonlocal count
        try:
            words = decide(command, ANY, HOME)
        except GuardRefused:
            return
        count += 1
        assert words[0] in helpers.HELPERS
        without = re.sub(r"^[ \t]*(?:PATH=\S*[ \t]+)+", "", command)
        if words[0] not in guard._PATHS and "PATH=" not in command and "~" not in command:
            assert shell(without) == words

    check()
    assert count > 20


TREES = st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.lists(
    st.sampled_from(["/", "..", ".", "home", "svc", "etc", "data", "~", "//", ".ssh", "x", "proc", "self", "root"]), max_size=8
).map("/".join)


@given(TREES)
@settings(max_examples=3000, deadline=None)
def test_hostile_paths(path):
    import shlex

    try:
        words = decide(f"rhl-clear -- {shlex.quote(path)}", ANY, HOME)
    except GuardRefused:
        return
    (resolved,) = paths(words)
    assert (
        os.path.isabs(resolved)
        and os.path.realpath(resolved) == resolved
        and not any(part.startswith(".") for part in resolved.split("/"))
    )
    assert resolved not in guard.SYSTEM_ROOTS and not (HOME + "/").startswith(resolved.rstrip("/") + "/")


# as a process, and behind a real sshd


def run_guard(command: str | None, *argv: str, **more: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SSH_", "PYTHON"))}
    environment = {**kept, **more, **({} if command is None else {"SSH_ORIGINAL_COMMAND": command})}
    return subprocess.run(
        [str(Path(sys.executable).parent / "rhl-guard"), *argv], env=environment, capture_output=True, text=True, timeout=30
    )


def test_by_hand(tmp_path):
    done = run_guard(None)
    assert done.returncode == 1 and "authorized_keys" in done.stderr and done.stdout == ""
    assert "interactive" in run_guard(None, SSH_CONNECTION="1 2 3 4").stderr
    assert run_guard("rhl-ps", REMOTE_HTTP_LAUNCHER_DIR=str(tmp_path)).stdout == "KEY STATUS PORT\n"
    assert run_guard("rhl-ps", "--permissive").returncode == 2
    (tmp_path / "sitecustomize.py").write_text("print('hijacked')")
    done = run_guard(
        "rhl-ps", REMOTE_HTTP_LAUNCHER_DIR=str(tmp_path), PYTHONPATH=str(tmp_path), PYTHONSTARTUP="/x", LD_LIBRARY_PATH="/x"
    )
    assert done.stdout.endswith("KEY STATUS PORT\n")
    assert guard.environment_of(
        {"PYTHONPATH": "x", "LD_PRELOAD": "y", "BASH_ENV": "z", "HOME": "/h", "PATH": "/p", "SSH_AUTH_SOCK": "s"}
    ) == {"HOME": "/h", "PATH": "/p"}


def test_behind_sshd(tmp_path):
    can_or_skip(sshd_path() is not None, "no sshd on this machine")
    program = Path(sys.executable).parent / "rhl-guard"
    with SshServer() as server:
        data = server.home / "data"
        data.mkdir()
        (data / "file").write_text("x")
        authorized = server.root / "authorized_keys"
        key = (server.root / "id.pub").read_text()
        authorized.write_text(f'command="{program} --data-roots {tmp_path}/roots",restrict {key}')
        (tmp_path / "roots").write_text(f"{data}\n")

        def ssh(*words: str) -> subprocess.CompletedProcess:
            return subprocess.run(
                ["ssh", "-F", str(server.config), server.alias, *words],
                capture_output=True,
                text=True,
                timeout=30,
                stdin=subprocess.DEVNULL,
            )

        assert ssh("PATH=$HOME/miniforge3/bin:$PATH", "rhl-ps").stdout == "KEY STATUS PORT\n"
        assert ssh("rhl-clear", str(data)).stdout == f"removed 1 item(s) from {data}\n" and list(data.iterdir()) == []
        for words in (("ls",), ("rhl-ps; touch /tmp/x",), ("rhl-clear", str(tmp_path)), ("bash", "-lc", "id"), ()):
            done = ssh(*words)
            assert done.returncode == 1 and done.stdout == "" and "rhl-guard: rejected" in done.stderr, words
        for words in (("rhl-ps", "--bogus"), ("rhl-pid-alive", "x"), ("rhl-clear",)):
            done = ssh(*words)
            assert done.returncode == 2 and f"rhl-guard: rejected: {words[0]}: error: " in done.stderr, "as it is without the guard"
        assert ssh("rhl-inspect", "none").stderr == "rhl-inspect: no state file for 'none'\n"


def test_words_with_any_characters():
    """As `shlex.quote` writes them, which the launcher does."""
    import shlex

    for word in ("it's", "a\nb", "'", "''", "a'b\"c", '{"x": "it\'s"}', "$(id)", "é", "", "\\"):
        assert decide(f"rhl-inspect {shlex.quote(word)}", ANY, HOME) == ["rhl-inspect", word]
    with pytest.raises(GuardRefused):
        decide('rhl-stop "\'" ; id "\'"', ANY, HOME)


def test_what_was_looked_at_leads_nowhere_else(tmp_path, monkeypatch):
    """A link that took a directory's place after the guard has looked is not followed by the helper."""
    from zerodeploy_agent import launching, services

    monkeypatch.setenv("REMOTE_HTTP_LAUNCHER_DIR", str(tmp_path / "state"))
    (tmp_path / "victim" / "deep").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x").symlink_to(tmp_path / "victim")
    for path in (tmp_path / "root" / "x", tmp_path / "root" / "x" / "deep"):
        for action in (lambda: services.clear(str(path), exact=True), lambda: services.persistent(str(path), exact=True),
                       lambda: launching.launch("k", str(path), ["true"], exact=True)):  # fmt: skip
            with pytest.raises(services.ServiceFault, match="leads elsewhere now"):
                action()
        with pytest.raises(services.ServiceFault, match="leads elsewhere now"):
            services.open_directory(str(path))
    assert (tmp_path / "victim" / "deep").exists()
    assert services.clear(str(tmp_path / "root" / "x")) == 1, "by hand a link is fine"


def test_a_path_that_can_not_be_looked_at_is_refused(home, monkeypatch):
    """It changes in between, say."""

    def realpath(path, **_):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os.path, "realpath", realpath)
    with pytest.raises(GuardRefused, match="the path changes, or can't be looked at"):
        decide("rhl-ps-persistent /data/x", Policy(permissive=True), str(home))


def test_what_may_be_looked_at_is_looked_at(monkeypatch):
    """A data root that the system has, for directories alone to be looked at."""
    from zerodeploy_agent import services

    assert decide("rhl-ps-persistent /srv", Policy(roots=("/srv",)), "/home/somebody") == ["rhl-ps-persistent", "--", "/srv"]
    assert services.persistent("/srv", exact=True)[0]["path"] == "/srv"
    with pytest.raises(services.ServiceFault, match="system directory"):
        services.clear("/srv", exact=True)


def test_the_launchers_own_state_is_refused(home, monkeypatch):
    monkeypatch.setenv("REMOTE_HTTP_LAUNCHER_DIR", str(home / "data" / "state"))
    for path in (home / "data" / "state", home / "data" / "state" / "server", home / "data"):
        with pytest.raises(GuardRefused, match="its own state"):
            decide(f"rhl-clear {path}", ANY, str(home))
