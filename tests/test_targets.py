"""Host strings, what ssh says and what it means, the command line that is run, and the errors themselves."""

from __future__ import annotations

import builtins
import copy
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zerodeploy
from zerodeploy import DeployedServer, errors
from zerodeploy.control import bootstrap
from zerodeploy.deployment.info import platform_tags
from zerodeploy.errors import (
    AuthenticationFailed,
    BootstrapError,
    HostError,
    HostKeyMismatch,
    HostKeyUnknown,
    HostUnreachable,
    LinkLost,
    NotShippable,
    RemoteCallError,
    UsageError,
    WorkerDied,
    ZeroDeployError,
    make_remote_error,
)
from zerodeploy.link.failures import classify, tail
from zerodeploy.link.openssh import SshTarget, parse_target

# host strings

GOOD = {
    "host": ("host", None, None),
    "build7.example.org": ("build7.example.org", None, None),
    "me@host": ("host", "me", None),
    "me@host:2222": ("host", "me", 2222),
    "host:1": ("host", None, 1),
    "host:65535": ("host", None, 65535),
    "host:022": ("host", None, 22),
    "10.0.0.1:22": ("10.0.0.1", None, 22),
    "::1": ("::1", None, None),
    "fe80::1%eth0": ("fe80::1%eth0", None, None),
    "me@fe80::1": ("fe80::1", "me", None),
    "[::1]": ("::1", None, None),
    "[::1]:2222": ("::1", None, 2222),
    "me@[fe80::1%eth0]:22": ("fe80::1%eth0", "me", 22),
    "[host]:22": ("host", None, 22),
    "me@example.com@gateway": ("gateway", "me@example.com", None),
    "DOMAIN+me@host": ("host", "DOMAIN+me", None),
    "alias_with-odd.chars": ("alias_with-odd.chars", None, None),
    "bücher.example": ("bücher.example", None, None),
    "ssh://host": ("host", None, None),
    "ssh://host/": ("host", None, None),
    "ssh://me@host:2222": ("host", "me", 2222),
    "ssh://me@[::1]:2222/": ("::1", "me", 2222),
    "ssh://m%2Be@host": ("host", "m+e", None),
    "ssh://Me@HOST": ("HOST", "Me", None),
}
BAD = {
    "a host is needed": ["", " ", "\t\n", None, 7, b"host", ["host"]],
    "more than one port": ["h:22:33", "me@a:b:c"],
    "spaces or control": ["\x85h", "a\u202eb", "my host", "host\n", "host\x00", "host\x7f", " host", "me @host", "ssh://ho\tst", "ssh://host%0aProxyCommand=x", "ssh://a%20b",
                          "ssh://me%00@host", "ssh://ho\nst"],
    "read as an option": ["-oProxyCommand=x", "me@-oProxyCommand=x", "-l@host", "ssh://", "ssh://-oX", "ssh://%2doProxyCommand=x@host", "ssh://me@-x",
                          "me@", "me@:22", ":22", "[-x]:22"],
    "user before @ is empty": ["@host", "@", "ssh://@host"],
    "the port": ["host:", "host:0", "host:65536", "host:x", "host:-1", "host:+22", "host:2 2"[:6] + "x", "host:٢٢", "[::1]:", "[::1]:x", "ssh://host:99999",
                 "ssh://host:", "host:22.0", "host:" + "9" * 5000],
    "characters that no host": ["ho;st", "$(id)@host", "host`id`", "a|b", "a&b", "'host'", '"host"', "a\\b", "a{b}", "<host>", "ssh://a%3bb", "[::1", "::1]",
                                "[]", "[a][b]:c:d"],
    "no passwords": ["ssh://me:secret@host", "me:secret@host", "ssh://me%3asecret@host", "ssh://:secret@host"],
    "has no path": ["ssh://host/path", "ssh://host?x", "ssh://host#x"],
    "only ssh:// URLs": ["http://host", "SSH://host", "sftp://host", "://host"],
}  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_targets(text):
    assert parse_target(text) == SshTarget(*GOOD[text])


@pytest.mark.parametrize(
    ("says", "text"), [(says, text) for says, texts in BAD.items() for text in texts], ids=lambda part: f"{part!s:.20}"
)
def test_bad_targets(says, text):
    with pytest.raises(UsageError, match=says):
        parse_target(text)


@pytest.mark.parametrize("text", ["ssh://[::1", "ssh://[x]y", "ssh://me@[zz]:1x"])
def test_broken_urls_are_usage_errors(text):
    with pytest.raises(UsageError):
        parse_target(text)


def test_passwords_are_not_repeated():
    for text in BAD["no passwords"]:
        with pytest.raises(UsageError) as caught:
            parse_target(text)
        assert "secret" not in str(caught.value)


@given(
    st.text(max_size=30) | st.text("ssh://@:[]%-me0129af.", max_size=30) | st.text("%-@:[]a0", max_size=20).map("ssh://".__add__)
)
def test_any_text_is_a_safe_target_or_refused(text):
    try:
        target = parse_target(text)
    except UsageError:
        return
    for part in (target.host, target.user or "x", target.destination):
        assert part and not part.startswith("-") and all(ord(c) > 32 and ord(c) != 127 for c in part)
        assert not set(part) & set("'\"`$;&|<>(){}\\")
    assert target.port is None or 0 < target.port < 65536


def test_destination():
    assert SshTarget("h").destination == "h" and SshTarget("h", "u", 9).destination == "u@h"


# what ssh says

CHANGED = """@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Someone could be eavesdropping on you right now (man-in-the-middle attack)!
It is also possible that a host key has just been changed.
The fingerprint for the ED25519 key sent by the remote host is
SHA256:0123456789abcdefghijklmnopqrstuvwxyzABCDEFG.
Please contact your system administrator.
Add correct host key in /home/me/.ssh/known_hosts to get rid of this message.
Offending ED25519 key in /home/me/.ssh/known_hosts:12
  remove with:
  ssh-keygen -f "/home/me/.ssh/known_hosts" -R "[build7]:2222"
Host key for [build7]:2222 has changed and you have requested strict checking.
Host key verification failed.
"""
SAID = [
    (HostKeyMismatch, "ssh-keygen -f", CHANGED),
    (HostKeyMismatch, "another key", "Host key for build7 has changed and you have requested strict checking.\nHost key verification failed.\n"),
    (HostKeyUnknown, "ssh-keyscan", "Host key verification failed.\n"),
    (HostKeyUnknown, "known_hosts", "No ED25519 host key is known for build7 and you have requested strict checking.\nHost key verification failed.\n"),
    (HostKeyUnknown, "known_hosts", "sshpass: Host public key is unknown. sshpass exits without confirming the new key.\n"),
    (HostKeyUnknown, "known_hosts", "sshpass: detected host authentication prompt. Exiting.\n"),
    (AuthenticationFailed, "was refused", "me@build7: Permission denied (publickey).\r\n"),
    (AuthenticationFailed, "was refused", "me@build7: Permission denied (publickey,gssapi-keyex,gssapi-with-mic,password).\n"),
    (AuthenticationFailed, "was refused", "Permission denied, please try again.\nme@build7: Permission denied (publickey,password).\n"),
    (AuthenticationFailed, "was refused",
     "Received disconnect from 10.0.0.7 port 22:2: Too many authentication failures\nDisconnected from 10.0.0.7 port 22\n"),
    (AuthenticationFailed, "", 'Load key "/home/me/.ssh/id": bad permissions\nme@build7: Permission denied (publickey).\n'),
    (AuthenticationFailed, "", "@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @\nPermissions 0644 for 'id' are too open.\n"),
    (AuthenticationFailed, "", 'Load key "/home/me/.ssh/id": error in libcrypto\n'),
    (AuthenticationFailed, "sshpass", "sshpass: Failed to run command: No such file or directory\n"),
    (HostUnreachable, "does not resolve", "ssh: Could not resolve hostname build7: Name or service not known\r\n"),
    (HostUnreachable, "does not resolve", "ssh: Could not resolve hostname build7: Temporary failure in name resolution\n"),
    (HostUnreachable, "does not resolve", "ssh: Could not resolve hostname build7: nodename nor servname provided, or not known\n"),
    (HostUnreachable, "nothing listens", "ssh: connect to host build7 port 22: Connection refused\r\n"),
    (HostUnreachable, "within 4.2 s", "ssh: connect to host build7 port 22: Connection timed out\r\n"),
    (HostUnreachable, "within 4.2 s", "ssh: connect to host build7 port 22: Operation timed out\n"),
    (HostUnreachable, "within 4.2 s", "Connection timed out during banner exchange\nConnection to 10.0.0.7 port 22 timed out\n"),
    (HostUnreachable, "within 4.2 s", "Timeout, server build7 not responding.\n"),
    (HostUnreachable, "no way to it", "ssh: connect to host build7 port 22: No route to host\n"),
    (HostUnreachable, "no way to it", "ssh: connect to host build7 port 22: Network is unreachable\n"),
    (HostUnreachable, "closed the connection", "kex_exchange_identification: Connection closed by remote host\nConnection closed by 10.0.0.7 port 22\n"),
    (HostUnreachable, "closed the connection", "kex_exchange_identification: read: Connection reset by peer\nConnection reset by 10.0.0.7 port 22\n"),
    (HostUnreachable, "closed the connection", "ssh_exchange_identification: Connection closed by remote host\n"),
    (HostUnreachable, "closed the connection", "Connection closed by UNKNOWN port 65535\n"),
    (HostUnreachable, "closed the connection", "client_loop: send disconnect: Broken pipe\n"),
    (HostUnreachable, "no algorithm", "Unable to negotiate with 10.0.0.7 port 22: no matching host key type found. Their offer: ssh-rsa,ssh-dss\n"),
    (HostUnreachable, "no algorithm", "Unable to negotiate with 10.0.0.7 port 22: no matching key exchange method found. Their offer: x\n"),
    (HostError, "configuration", "/home/me/.ssh/config: line 3: Bad configuration option: foo\n/home/me/.ssh/config: terminating, 1 bad configuration options\n"),
    (HostError, "configuration", "Bad owner or permissions on /home/me/.ssh/config\n"),
    (HostError, "options", "unknown option -- z\nusage: ssh [-46AaCfGgKkMNnqsTtVvXxYy] [-B bind_interface]\n"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "says", "stderr"), SAID, ids=[f"{i}-{cls.__name__}" for i, (cls, *_) in enumerate(SAID)])
def test_what_ssh_says(cls, says, stderr):
    for text in (stderr, "Warning: Permanently added something\nsome banner\n" + stderr):
        error = classify(text, host="build7", target="me@build7", waited_s=4.2)
        assert type(error) is cls
        assert str(error).startswith("build7: ") and says in str(error) and "ssh said: " in str(error)
        assert "{" not in str(error).partition("ssh said")[0] and error.stderr.splitlines()[-1] in stderr and error.host == "build7"


def test_the_mending_command_is_sshs_own():
    assert 'ssh-keygen -f "/home/me/.ssh/known_hosts" -R "[build7]:2222"' in str(
        classify(CHANGED, host="h", target="me@h", waited_s=1)
    )
    less = CHANGED.replace("ssh-keygen", "")
    assert "than /home/me/.ssh/known_hosts has for it" in str(classify(less, host="h", target="me@h", waited_s=1))
    assert "ssh-keygen -f /home/me/.ssh/known_hosts -R h" in str(classify(less, host="h", target="me@h", waited_s=1))
    assert "ssh-keyscan h >>" in str(classify("Host key verification failed.", host="h", target="me@h", waited_s=1))


@pytest.mark.parametrize(
    "text", ["", "bash: python3: command not found\n", "Traceback (most recent call last):\nValueError: {x}\n", "Killed\n"]
)
def test_what_is_none_of_sshs(text):
    assert classify(text, host="h", target="h", waited_s=1.0) is None


def test_braces_in_what_ssh_said():
    assert "{target} {0}" in str(classify("Connection refused {target} {0}", host="h", target="{x}", waited_s=1.0))


def test_tail():
    assert tail("") == "" and tail("a\n\n  \nb  \r\n") == "a\nb" and tail("\n".join("abcdefgh"), 3) == "f\ng\nh"


# the command line


@pytest.mark.parametrize("python", [None, ["python3"], ["/opt/my python/bin/python"], ["sudo", "-n", "python3.11"]])
@pytest.mark.parametrize("tmpdir", [None, "/tmp", '/tmp/o\'dd "dir"\n\\!é'])
def test_script_passes_through_any_login_shell(python, tmpdir):
    line = bootstrap.script("0123456789abcdef" * 2, python=python, tmpdir=tmpdir, transport="tunnel", payload_limit_s=12.34)
    assert not set(line) & set("'\n\\!\r\t") and line.isascii() and line.isprintable()
    assert "12.3" in line and line.count("0123456789abcdef" * 2) >= 2
    if python:
        assert ("exec " + " ".join(f'"{word}"' if " " in word else word for word in python)) in line
    assert line.count('"') % 2 == 0


@pytest.mark.parametrize("name", ["py'thon", "py!thon", "py\\thon", "py\nthon", "$(id)", "`id`", 'a"b'])
def test_interpreters_with_odd_names_are_refused(name):
    with pytest.raises(BootstrapError, match="can't be passed through every login shell") as caught:
        bootstrap.script("0" * 32, python=[name], tmpdir=None, transport="tunnel", payload_limit_s=1)
    assert caught.value.stage == "interpreter"


# platform tags

FACTS = {"version": [3, 11, 2], "machine": "x86_64", "libc": "glibc 2.36", "system": "Linux", "implementation": "cpython"}


def test_platform_tags():
    tags = platform_tags(FACTS)
    assert tags[0] == "cp311-cp311-manylinux_2_36_x86_64" and tags[-1] == "py3-none-any"
    assert len(tags) == len(set(tags))
    for known in (
        "cp311-cp311-manylinux2014_x86_64",
        "cp311-abi3-manylinux_2_17_x86_64",
        "py3-none-manylinux1_x86_64",
        "cp311-cp311-linux_x86_64",
    ):
        assert known in tags
    assert not any("2_37" in tag or "manylinux_2_4_" in tag for tag in tags)
    assert (
        tags.index("cp311-cp311-linux_x86_64")
        < tags.index("cp311-abi3-manylinux_2_36_x86_64")
        < tags.index("py3-none-manylinux_2_36_x86_64")
    )
    arm = platform_tags({**FACTS, "machine": "aarch64", "libc": "glibc 2.28"})
    assert "cp311-cp311-manylinux2014_aarch64" in arm and not any("manylinux1_" in tag or "manylinux2010" in tag for tag in arm)
    assert platform_tags({**FACTS, "libc": "musl"})[0] == "cp311-cp311-musllinux_1_2_x86_64"
    assert platform_tags({**FACTS, "libc": "unknown"})[0] == "cp311-cp311-linux_x86_64"
    assert platform_tags({**FACTS, "system": "Darwin"}) == ["py3-none-any"]
    assert platform_tags({**FACTS, "implementation": "pypy"})[0].startswith("pp311-")


# errors

ALL = [getattr(errors, name) for name in errors.__all__]
CLASSES = [cls for cls in ALL if issubclass(cls, ZeroDeployError)]


def copies(error: BaseException) -> list[BaseException]:
    return [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)] + [
        copy.copy(error),
        copy.deepcopy(error),
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickling(cls):
    for details in (
        {},
        {"host": "h"},
        {"host": "h", "stage": "login", "stderr": "a\nb", "seen": [["x", "y"]], "status": -9, "extra": 1},
    ):
        error = cls("what happened {x} %s", **details)
        for back in copies(error):
            assert type(back) is cls and str(back) == str(error) and back.args == error.args and vars(back) == vars(error)


def test_str():
    assert str(ZeroDeployError("text")) == "text"
    assert str(ZeroDeployError("text", host="h")) == "h: text"
    assert str(ZeroDeployError("h: text", host="h")) == "h: text"
    assert str(RemoteCallError("text", host="h", type_name="a.B")) == "h: a.B: text"
    assert str(RemoteCallError("", host="h", type_name="a.B")) == "h: a.B"
    assert str(RemoteCallError("text", type_name="a.B", remote_traceback="Trace\n  here\n\n")) == "a.B: text\n\nTrace\n  here"


def test_the_tree():
    assert (
        issubclass(LinkLost, EOFError)
        and issubclass(WorkerDied, LinkLost)
        and issubclass(UsageError, ValueError)
        and issubclass(NotShippable, TypeError)
    )
    assert issubclass(HostKeyMismatch, errors.HostKeyError) and issubclass(errors.ForwardingRefusedWarning, UserWarning)
    drawn = [line.split("+-")[1].split()[0] for line in errors.__doc__.splitlines() if "+-" in line]
    assert sorted(drawn) == sorted(cls.__name__ for cls in CLASSES if cls is not ZeroDeployError)
    assert all(cls.__doc__ for cls in ALL)


MIXABLE = sorted(
    name for name, cls in vars(builtins).items()
    if isinstance(cls, type) and issubclass(cls, Exception) and cls is not Exception and "Group" not in name
    and cls.__name__ == name
)  # fmt: skip


def remote(cls: type[BaseException], **details: object) -> RemoteCallError:
    bases = [base.__name__ for base in cls.__mro__ if getattr(builtins, base.__name__, None) is base]
    return make_remote_error(
        "it failed",
        bases,
        {"host": "h", "type_name": cls.__name__, "remote_traceback": "Traceback\n  x\n", "original": None, **details},
    )


@pytest.mark.parametrize("name", MIXABLE)
def test_remote_errors_are_what_was_raised(name):
    cls = getattr(builtins, name)
    error = remote(cls)
    assert isinstance(error, cls) and isinstance(error, RemoteCallError) and type(error).__name__ == "RemoteCallError"
    for back in copies(error):
        assert (
            type(back) is type(error)
            and str(back) == str(error) == f"h: {name}: it failed\n\nTraceback\n  x"
            and vars(back) == vars(error)
        )
    shown = "".join(traceback.format_exception(error))
    assert "it failed" in shown and "Traceback\n  x" in shown and repr(error)


@pytest.mark.parametrize("bases", [[], ["SystemExit", "BaseException", "object"], ["KeyboardInterrupt"], ["GeneratorExit"], ["Exception", "BaseException", "object"],
                                   ["ExceptionGroup", "BaseExceptionGroup", "Exception"], ["BaseExceptionGroup"], ["print"], ["no such"], ["__import__"]])  # fmt: skip
def test_what_is_never_mixed_in(bases):
    error = make_remote_error("m", bases, {"host": "h", "type_name": "T"})
    assert type(error) is RemoteCallError and str(error) == "h: T: m"
    assert all(type(back) is RemoteCallError for back in copies(error))


def test_a_remote_error_carries_the_original():
    original = errors.rebuild_original(["FileNotFoundError"], [2, "gone"], {"filename": "/x"})
    assert type(original) is FileNotFoundError and original.filename == "/x"
    error = remote(FileNotFoundError, original=original)
    for back in [error, *copies(error)]:
        assert (back.errno, back.strerror, back.filename, back.original.args) == (2, "gone", "/x", (2, "gone"))
    for bases, args in (
        [["SystemExit"], [1]],
        [["int"], ["1"]],
        [["UnicodeDecodeError"], ["x"]],
        [[], []],
        [["exec"], ["1"]],
        [["ExceptionGroup"], []],
    ):
        assert errors.rebuild_original(bases, args, {}) is None
    assert errors.rebuild_original(["ValueError"], ["x"], {"__class__": 5}) is None


def test_exported():
    assert all(getattr(zerodeploy, name) is getattr(errors, name) for name in errors.__all__)


@pytest.mark.parametrize(
    "options", [["-o", "ControlMaster=no"], ["-o", "ControlPath=/nowhere/%C"], ["-S", "none"], ["-S/nowhere/x"]]
)
def test_a_control_socket_of_the_user_s_does_not_keep_ours_away(sshd, options):
    from plumbum import SshMachine

    with SshMachine(sshd.alias, ssh_opts=["-F", str(sshd.config), *options]) as machine, DeployedServer(machine) as server:
        assert server.classic_connect().modules.os.getpid() == server.info.pid
        assert server.info.transport == "tunnel"


def test_a_live_master_of_the_user_s_is_used(sshd, room):
    """Who logs in with a second factor has one open, and can't log in again."""
    from plumbum import SshMachine

    options = ["-F", str(sshd.config), "-o", f"ControlPath={room}/cm", "-o", "ControlMaster=auto"]
    with SshMachine(sshd.alias, ssh_opts=options) as machine:
        logins = sshd.logins()
        with DeployedServer(machine) as server:
            with pytest.warns(zerodeploy.ForwardingRefusedWarning, match="control socket"):
                assert server.classic_connect().modules.os.getpid() == server.info.pid
            assert server.info.transport == "stdio"
        assert sshd.logins() == logins
        assert machine["true"]() == ""
