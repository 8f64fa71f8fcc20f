"""Descriptions of services: every mistake names field and line, and a value is one word whatever it holds."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zerodeploy_agent.launching import Launch, shown

from zerodeploy import ConfigError, ServiceError, TemplateError
from zerodeploy.services import bashquoting, command, run
from zerodeploy.services.config import load, of_mapping, schema

GOOD = "workdir: /tmp/x\nkey: k\ncommand: prog {workdir}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "service.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_specifications_example(write):
    text = """workdir: /home/user/my-service-data
hostname: my-server.example.com
key: 'myservice-{workdir.strip("/").replace("/", "--")}'
command: >-
  myservice --port-range {port_start} {port_end}
  --status-file {status_file}
  --host {config['network_interface']}
  --timeout {timeout}
  {workdir}
network_interface: "0.0.0.0"
handshake: healthcheck
conda: myservice-env
timeout: 600
port_start: 10000
port_end: 19999
"""
    made = load(write(text))
    made.check()
    assert (
        made.key == "myservice-home--user--my-service-data"
        and made.handshake == "/healthcheck"
        and made.ssh_hostname == "my-server.example.com"
    )
    words = command.words(made.data["command"], made.names, extra={"status_file": "/s f.json"}, shell=None)
    assert words == [
        "myservice",
        "--port-range",
        "10000",
        "19999",
        "--status-file",
        "/s f.json",
        "--host",
        "0.0.0.0",
        "--timeout",
        "600",
        "/home/user/my-service-data",
    ]


@pytest.mark.parametrize(
    ("text", "field", "line"),
    [
        ("workdir: 3\nkey: k\ncommand: c\n", "workdir", 1), ("key: k\ncommand: c\n", "workdir", 1), ("workdir: /x\nkey: k\n", "command", 1), ("workdir: /x\ncommand: c\n", "key", 1),
        (GOOD + "tunnel: maybe\n", "tunnel", 4), (GOOD + "handshake: [a]\n", "handshake", 4), (GOOD + "handshake:\n  parameters: {a: 1}\n", "handshake.path", 4), (GOOD + "handshake:\n  path: x\n  port_name: foo\n", "handshake.port_name", 6),
        (GOOD + "handshake:\n  pth: x\n  path: y\n", "handshake.pth", 5), (GOOD + "handshake:\n  path: x\n  parameters:\n    a: [1]\n", "handshake.parameters.a", 7),
        (GOOD + "restart:\n  policy: always\n  delay: 1\n  most: 0\n", "restart.most", 7), (GOOD + "restart:\n  policy: alway\n", "restart.policy", 5), (GOOD + "conda: 3\n", "conda", 4),
        (GOOD + "meta: 3\n", "meta", 4), (GOOD + "network_interface: 3\n", "network_interface", 4), (GOOD + "hostname: 3\n", "hostname", 4), (GOOD + "file_parameters: x\n", "file_parameters", 4),
        (GOOD + "env:\n  A: 1\n  b-c: 2\n", "env.b-c", 6), (GOOD + "limits:\n  memory_bytes: 0\n", "limits.memory_bytes", 5), (GOOD + "limits:\n  foo: 1\n", "limits.foo", 5),
        (GOOD + "restart: sometimes\n", "restart", 4), (GOOD + "log: {keep: 3}\n", "log.max_bytes", 4), (GOOD + "start_timeout: 0\n", "start_timeout", 4), (GOOD + "shell: 1\n", "shell", 4),
        ("workdir: x\nkey: k\ncommand: c\n", "workdir", 1), ("workdir: /x\nkey: a/b\ncommand: c\n", "key", 2), ("workdir: /x\nkey: '{nothing}'\ncommand: c\n", "key", 2), ("workdir: /x\nkey: ''\ncommand: c\n", "key", 2),
        (GOOD + "start_timeout: .nan\n", "start_timeout", 4), (GOOD + "start_timeout: .inf\n", "start_timeout", 4), (GOOD + "restart:\n  policy: always\n  delay: .inf\n", "restart.delay", 6),
        (GOOD + "limits: {cpus: .nan}\n", "limits.cpus", 4),
        (GOOD + "meta: {a: 2020-01-01}\n", "meta", 4), (GOOD + "log_level: loud\n", "log_level", 4), ("- a\n", "the configuration", 1), ("", "the configuration", 0),
    ],
)  # fmt: skip
def test_a_mistake_names_field_and_line(write, text, field, line):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(path).check()
    assert (
        (caught.value.field, caught.value.line) == (field, line)
        and path in str(caught.value)
        and isinstance(caught.value, ServiceError)
    )
    assert (f"line {line}" in str(caught.value)) is bool(line)


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: &a [*a]", "line 1: no YAML: it holds itself"), ("\n".join(["a0: &a0 [x]"] + [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(60)]), "line 6: .*more than 100000 values"),
     ("a: [", "line"), ("a: 1\na: 2\n", "line 2: no YAML: the field 'a' is there twice"), ("a: \x00", "no YAML"), ("\xff", "not UTF-8"), ("a: !!python/object:os.system x", "no YAML"), ("x" * (1 << 21), "more than")],
)  # fmt: skip
def test_what_is_no_yaml(tmp_path, text, says):
    (tmp_path / "s.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "s.yaml")


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


def test_handshakes_that_are_no_urls_yet():
    base = {"workdir": "/x", "key": "k", "command": "c"}
    for written, wanted in (
        ("é x?a=%20&b=ü", "/%C3%A9%20x?a=%20&b=%C3%BC"),
        ({"path": "a", "port_name": "x_port"}, "x_port:/a"),
        ({"path": "a", "port_name": "port"}, "/a"),
    ):
        assert of_mapping({**base, "handshake": written}).handshake == wanted


def test_handshakes_and_hosts():
    base = {"workdir": "/x", "key": "k", "command": "c"}
    assert of_mapping({**base, "handshake": {"path": "/a", "parameters": {"b": True, "c": "d e"}}}).handshake == "/a?b=true&c=d+e"
    assert of_mapping({**base, "handshake": "a?b=1"}).handshake == "/a?b=1"
    assert of_mapping(base).hostname == "localhost" and of_mapping({**base, "network_interface": "::1"}).hostname == "::1"
    assert (
        of_mapping({**base, "network_interface": "0.0.0.0"}).hostname == "localhost"
        and not of_mapping({**base, "tunnel": True}).tunnel
    )
    assert of_mapping({**base, "hostname": "h", "ssh_hostname": "u@s"}).ssh_hostname == "u@s"


def test_the_schema_is_one():
    import fastjsonschema

    assert {"workdir", "key", "command"} == set(schema()["required"]) and fastjsonschema.compile(schema())


# commands

NASTY = ["a b", "; touch /tmp/zd-pwned", "$(id)", "`id`", "'", '"', "\\", "a\nb", "*", "~", "-x", "", "é ☃", "#x", "$HOME", "!x", "{a,b}", "<(id)", "a=b", "'; id; '", '"; id; "', "\t", "&", "|| id", "\\'", "x'\"'\"'y", "^a^b", "[a-z]"]  # fmt: skip


def words(template: str, shell: bool | None = None, **names: object) -> list[str]:
    return command.words(template, names, extra={}, shell=shell)


def printed(found: list[str]) -> list[str]:
    """What the words of a ``printf '<%s>\\0'`` are, when they are executed."""
    out = subprocess.run(
        found, capture_output=True, check=True, cwd="/", env={"HOME": "/nowhere", "PATH": "/usr/bin:/bin"}, timeout=20
    ).stdout
    return [each[1:-1].decode() for each in out.split(b"\0")[:-1]]


@pytest.mark.parametrize("shell", [True, False, None])
@pytest.mark.parametrize("value", NASTY)
def test_a_value_is_one_word(value, shell):
    for template in ("printf '<%s>\\0' {v} {w}", "printf '<%s>\\0' \"{v}\" '{w}'", "printf '<%s>\\0' {v}{v} x{w}"):
        found = printed(words(template, shell, v=value, w=value))
        assert found in ([value, value], [value * 2, f"x{value}"]), template


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=8), min_size=1, max_size=4),
    st.booleans(),
)
@example(["\u2000", "\ue020"], True)
@example(["ssh", ""], False)
@example(["/x/sh", " "], True)
def test_any_values(values, shell):
    words_of_shells = bashquoting._REREADS.pattern  # behind such a word values are refused: it reads them again
    values = [
        f".{value}." if value.startswith("~/") or re.fullmatch(f"(.*/)?({words_of_shells})|-v", value) else value
        for value in values
    ]
    template = "printf '<%s>\\0' " + " ".join(f"{{v[{number}]}}" for number in range(len(values)))
    assert printed(words(template, shell, v=values)) == values


def test_the_commands_of_seamless(tmp_path):
    """Word for word as its list of services has them, with and without ports."""
    template = ("hashserver{' --port-range {} {}'.format(config.get('port_start'), config.get('port_end')) if config.get('port_start') is not None and "
                "config.get('port_end') is not None else ''} --status-file {status_file}{' --host ' + config.get('network_interface') if "
                "config.get('network_interface') is not None else ''} --timeout {timeout} {workdir}{' --writable' if 'rw' == 'rw' else ''}")  # fmt: skip
    given = {"status_file": "/s f", "timeout": 600, "workdir": "/w d", "network_interface": "0.0.0.0"}
    tail = ["--status-file", "/s f", "--host", "0.0.0.0", "--timeout", "600", "/w d", "--writable"]
    for more, ports in (({}, []), ({"port_start": 1, "port_end": "2 3"}, ["--port-range", "1", "2 3"])):
        names = {**given, **more}
        assert command.words(template, {**names, "config": names}, extra={}, shell=None) == ["hashserver", *ports, *tail]


@pytest.mark.parametrize("value", [None, [], 5, 1.5, object(), b"x"])
def test_what_is_no_description(value):
    with pytest.raises(ConfigError, match="a mapping, or the path of a YAML file"):
        run(value)


@pytest.mark.parametrize(
    "template", ["printf '<%s>\\0' {v} {v}/b x{v} '{v}' \"{v}\"", "printf '<%s>\\0' {v} {v}/b x{v} '{v}' \"{v}\"; true"]
)
@pytest.mark.parametrize("value", ["~", "~/a b", "~/$(id)", "~x", "a~/b"])
def test_a_value_in_the_home_directory(tmp_path, monkeypatch, template, value):
    """At the beginning of a word, as a shell has it; what runs without a shell is told by `launching`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = words(template, v=value)
    home = os.path.expanduser(value) if value.startswith("~/") else value
    if found[0] == "/bin/bash":
        out = subprocess.run(found, capture_output=True, check=True, timeout=20).stdout
        assert [each[1:-1].decode() for each in out.split(b"\0")[:-1]] == [
            home,
            os.path.expanduser(value + "/b") if value == "~" else home + "/b",
            "x" + value,
            value,
            value,
        ]
    else:
        launch = Launch("k", "/tmp", found, base=str(tmp_path / "base"))
        launch.ready()
        assert launch.words[2:5] == [
            home,
            os.path.expanduser(value + "/b") if value == "~" else home + "/b",
            "x" + value,
        ] and launch.shown == shown(found)


def test_what_the_template_splits_is_split():
    assert words("p {' '.join(args)} {'--debug' if debug else ''} {flags}", args=["a b", "c"], debug=False, flags="-x -y") == [
        "p",
        "a b",
        "c",
        "-x -y",
    ]
    assert words("p {'-a -b' if yes else ''}", yes=True) == ["p", "-a", "-b"]
    assert words("p {' '.join(flags.split())}", flags="-x -y") == ["p", "-x", "-y"]
    assert words("p {name.replace(' ', '_')} {name!r} {n:04d}", name="a b", n=7) == ["p", "a_b", "a b", "0007"]


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "a && b",
        "a > x",
        "a $HOME",
        'a "$HOME"',
        "cd /x",
        "A=1 b",
        "a *",
        "a ~",
        "a; b",
        "`a`",
        "a {{b,c}}",
        "exec a",
        "a # b",
        "a\nb",
        "source x",
        "[[ a ]]",
    ],
)
def test_a_shell_where_it_needs_one(text):
    assert words(text)[:2] == ["/bin/bash", "-c"] and (text.startswith("`") or words(text, False)[0] != "/bin/bash")


@pytest.mark.parametrize("text", ["a 'b | c'", 'a "b;c"', "a\\ b", "a x~ y#", "a=b".replace("a=b", "p a=b"), "p '$HOME'"])
def test_none_where_it_does_not(text):
    assert words(text)[0] != "/bin/bash"


@pytest.mark.parametrize("shell", [None, True])
@pytest.mark.parametrize("value", ["hello world", "it's $HOME `id`", 'say "x"', "a\nb\\", "", "'"])
@pytest.mark.parametrize("template", ['python3 -c "print({v!r})"', "python3 -c 'print({v!r})'"])
def test_a_repr_within_quotes_is_for_who_reads_these(template, value, shell):
    done = subprocess.run(words(template, shell, v=value), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (value + "\n", "")
    done = subprocess.run(
        words("printf '[%s]' {v!r} | cat" if shell else "printf '[%s]' {v!r}", shell, v=value), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"[{value}]", "")


def test_a_repr_for_a_shell_of_the_template():
    assert words('bash -c "exec foo {v!r}"', None, v="plain") == ["bash", "-c", "exec foo plain"]
    with pytest.raises(TemplateError, match="read again by bash"):
        words('bash -c "exec foo {v!r}"', None, v="a b")


@pytest.mark.parametrize(
    "text",
    [
        "echo `echo {v}`",
        "echo $((1 + {v}))",
        "[[ {v} -gt 0 ]]",
        "(( {v} ))",
        "eval p {v}",
        "eval $(a; b) {v}",
        "bash -c 'p {v}'",
        'x="${{y:-{v}}}"',
        "$(case x in a) p {v};; esac)",
        "[ -v {v} ]",
        "printf -v {v} x",
        "$\\\n'{v}'",
        "cat <<X\n{v}\nX",
        "a # {v}",
        "echo $'{v}'",
        "PS4={v}; set -x; true",
        "export PS4='{v}'; true",
        "BASH_ENV={v} bash script",
    ],
)
def test_where_nothing_can_be_quoted_it_is_refused(text):
    with pytest.raises(TemplateError, match="quoted safely"):
        words(text, True, v="a'\nb $(id)")
    assert words(text, True, v="plain")[0] == "/bin/bash"


@pytest.mark.parametrize("text", ["", "   ", "'a", "{v}", "p \0", "p '{'"])
def test_no_command(text):
    with pytest.raises(TemplateError):
        words(text, False, v="")


@pytest.mark.parametrize(
    "template",
    [
        "# don't\nprintf '<%s>\\0' {v}",
        "printf '<%s>\\0' {v} # it's",
        "printf '<%s>\\0' \"${{HOME}}\" {v} $(: ; :)",
        "printf '<%s>\\0' \"$(printf %s {v})\"",
    ],
)
def test_what_stands_before_a_value_does_not_matter(template, tmp_path):
    value = f"x & touch {tmp_path}/pwned; true"
    assert value in printed(words(template, v=value)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", [True, False])
def test_what_is_no_text_is_one_word_too(shell):
    import datetime

    values = {"at": datetime.datetime(2024, 1, 1, 10), "ports": [1, 2], "opts": {"a": "b c"}, "none": None}
    template = "printf '<%s>\\0' {at} {ports} {opts} {none}"
    assert printed(words(template, shell, **values)) == [str(value) for value in values.values()]


@pytest.mark.parametrize("shell", [True, None])
def test_keys_and_sets_run_nothing(shell, tmp_path):
    odd = f"$(touch {tmp_path}/pwned)"
    names = {"options": {odd: 1}, "tags": {f"; touch {tmp_path}/pwned;"}}
    found = printed(
        words("printf '<%s>\\0' {' '.join(tags)} {' '.join(f'--{k}={v}' for k, v in options.items())} | cat", shell, **names)
    )
    assert found == [f"; touch {tmp_path}/pwned;", f"--{odd}=1"] and not list(tmp_path.iterdir())


def test_the_templates_own_splits_stay():
    assert words("p {' '.join(args.split(','))} {args.replace(',', ' ')}", args="a,b,c") == ["p", "a", "b", "c", "a", "b", "c"]
    assert words("p {' '.join(n for n in names if n)}", names=["a", "", "b"]) == ["p", "a", "b"]
    assert words("p {' '.join('--' + a for a in args if '=' in a)}", args=["x=1", "y=2", "q"]) == ["p", "--x=1", "--y=2"]
    assert words("p {'--name ' + name if name else ''} {name}", name="") == ["p", ""]
