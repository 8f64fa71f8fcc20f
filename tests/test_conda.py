"""Conda: found, kept, refreshed when an environment is missing, and activated for the service. No registry here has a real one
(PyPI, Debian and npm were looked at), so the tree is a faithful fake: ``bin/conda`` answers what conda answers, ``conda.sh`` has
the function that a shell gets, ``activate.d`` is sourced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from zerodeploy_agent import conda
from zerodeploy_agent.conda import CondaError
from zerodeploy_agent.statefile import SERVER, StateError, States

from tests.services import a_place, an_sshd
from zerodeploy import ServiceError
from zerodeploy.services import helpers, run

CONDA = """#!/bin/sh
echo "$*" >> {root}/calls
case "$*" in
  "info --json") [ -e {root}/old ] && exit 1; printf '{{"root_prefix": "{root}", "envs": []}}\\n';;
  "info --base") echo {root};;
  "env list --json") printf '{{"envs": [%s]}}\\n' "$(for e in {root} {root}/envs/*; do [ -d $e ] && printf '"%s",' $e; done | sed 's/,$//')";;
  *) exit 1;;
esac
"""
CONDA_SH = """conda() {{
  [ "$1" = activate ] || {{ {root}/bin/conda "$@"; return; }}
  case "$2" in base) p={root};; /*) p="$2";; *) p={root}/envs/"$2";; esac
  [ -d "$p/conda-meta" ] || return 1
  export CONDA_PREFIX="$p" CONDA_DEFAULT_ENV="$2" CONDA_SHLVL=1 PATH="$p/bin:$PATH"
  for s in "$p"/etc/conda/activate.d/*.sh; do [ -f "$s" ] && . "$s"; done
  return 0
}}
"""


class Tree:
    """A conda installation at *root*."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("bin", "etc/profile.d", "conda-meta", "envs"):
            (root / folder).mkdir(parents=True)
        (root / "bin" / "conda").write_text(CONDA.format(root=root))
        (root / "bin" / "conda").chmod(0o755)
        (root / "etc/profile.d/conda.sh").write_text(CONDA_SH.format(root=root))
        (root / "calls").write_text("")

    def env(self, name: str, at: Path | None = None) -> Path:
        prefix = at or self.root / "envs" / name
        (prefix / "conda-meta").mkdir(parents=True)
        (prefix / "bin").mkdir()
        (prefix / "etc/conda/activate.d").mkdir(parents=True)
        (prefix / "etc/conda/activate.d/vars.sh").write_text(f"export FROM_ACTIVATE={name}\n")
        program = prefix / "bin" / "inenv"
        from tests.services import MYSERVICE

        program.write_text(f'#!/bin/sh\nexec {sys.executable} {MYSERVICE} --show FROM_ACTIVATE "$@"\n')
        program.chmod(0o755)
        return prefix

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("CONDA_EXE", "MAMBA_EXE", "MAMBA_ROOT_PREFIX", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    with a_place(tmp_path, monkeypatch) as made:
        yield made


def config(place, wanted: str, **more):
    made = place.config(conda=wanted, **more)
    return {**made, "command": made["command"].replace("myservice", "inenv", 1)}


@pytest.fixture(params=["local", "agent", "helpers"])
def where(request, place):
    """What of a description says where; the home there, with a conda in it; the name that errors use."""
    if request.param == "local":
        yield {}, Tree(place.home / "miniforge3"), "this machine", place.base
        return
    with an_sshd(place, helpers=request.param == "helpers") as server:
        there = {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        yield there, Tree(server.home / "miniforge3"), server.alias, server.home / ".remote-http-launcher"


def test_a_service_runs_in_its_environment(where, place):
    more, tree, _, base = where
    tree.env("foo")
    tree.env("elsewhere", place.root / "else where")
    run(config(place, "foo", **more))
    state = States(SERVER, str(base)).read("k")
    assert state is not None and (base / "server" / "k.log").read_text().splitlines()[1] == "FROM_ACTIVATE=foo"
    environ = Path(f"/proc/{state['pid']}/environ").read_bytes().split(b"\0")
    assert f"CONDA_PREFIX={tree.root}/envs/foo".encode() in environ and state["command"].startswith("inenv ")
    before = len(tree.calls())
    setup = json.loads((base / "conda-setup.json").read_text())
    assert setup == {
        "conda_source": f"{tree.root}/etc/profile.d/conda.sh",
        "conda_base": str(tree.root),
        "envs": [str(tree.root), f"{tree.root}/envs/foo"],
    }
    run(config(place, str(place.root / "else where"), **{**more, "key": "l"}), debug_log_file=str(place.root / "debug"))
    assert "rhl-cache-conda" not in (place.root / "debug").read_text()
    assert (base / "server" / "l.log").read_text().splitlines()[1] == "FROM_ACTIVATE=elsewhere"
    (tree.root / "bin" / "inenv").write_text((tree.root / "envs/foo/bin/inenv").read_text())
    (tree.root / "bin" / "inenv").chmod(0o755)
    run(config(place, "base", **{**more, "key": "m"}))
    assert (base / "server" / "m.log").read_text().splitlines()[1] == "FROM_ACTIVATE=None"
    assert len(tree.calls()) == before, "nothing but the cache was asked"


def test_the_cache_is_refreshed_once_where_it_lacks_the_environment(where, place):
    more, tree, target, base = where
    tree.env("foo")
    run(config(place, "foo", **more))
    tree.env("bar")
    run(config(place, "bar", **{**more, "key": "l"}), debug_log_file=str(place.root / "debug"))
    debug = (place.root / "debug").read_text()
    name = f"SSHExecutor[{more['ssh_hostname']}]" if more else "LocalExecutor"
    assert f"command[{name}]: rhl-conda-info\n" in debug and f"command[{name}]: rhl-cache-conda\n" in debug, debug
    assert (base / "server" / "l.log").read_text().splitlines()[1] == "FROM_ACTIVATE=bar"
    before = tree.calls().count("env list --json")
    with pytest.raises(ServiceError) as caught:
        run(config(place, "nosuch", **{**more, "key": "m"}))
    assert (
        "no conda environment 'nosuch'" in str(caught.value)
        and target in str(caught.value)
        and "rhl-cache-conda has already been run" in str(caught.value)
    )
    assert tree.calls().count("env list --json") == before + 1 and States(SERVER, str(base)).read("m") is None


@pytest.mark.parametrize("way", ["bashrc", "login"])
def test_a_conda_that_only_shells_know(place, way):
    """What ``conda init`` has written is read; else bash is asked as somebody who logs in."""
    tree = Tree(place.root / "odd")
    tree.env("foo")
    if way == "bashrc":
        block = f"# >>> conda initialize >>>\n__conda_setup=\"$('{tree.root}/bin/conda' 'shell.bash' 'hook' 2> /dev/null)\"\n# <<< conda initialize <<<\n"
        (place.home / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n" + block)
    else:
        (place.home / ".bash_profile").write_text(f'echo hello\nexport PATH="{tree.root}/bin:$PATH"\n')
    assert helpers.run("rhl-cache-conda", []) == 0
    assert json.loads((place.base / "conda-setup.json").read_text())["conda_base"] == str(tree.root)
    run(config(place, "foo"))
    assert "FROM_ACTIVATE=foo" in (place.base / "server" / "k.log").read_text()


def test_a_cache_without_a_script_to_source(place):
    """As other launchers write it where a login shell has conda already."""
    tree = Tree(place.home / "miniforge3")
    tree.env("foo")
    place.base.mkdir()
    (place.base / "conda-setup.json").write_text(
        json.dumps({"conda_source": None, "conda_base": str(tree.root), "envs": [f"{tree.root}/envs/foo"]})
    )
    run(config(place, "foo"))
    assert "FROM_ACTIVATE=foo" in (place.base / "server" / "k.log").read_text()


def test_no_conda_there(place):
    with pytest.raises(ServiceError, match="no usable conda on this host"):
        run(config(place, "foo"))
    assert not (place.base / "server" / "k.json").exists()


def test_the_helpers(place, capsys, monkeypatch):
    assert helpers.run("rhl-conda-info", []) == 1 and "cache file not found" in capsys.readouterr().err
    assert helpers.run("rhl-cache-conda", []) == 1 and "no usable conda" in capsys.readouterr().err
    tree = Tree(place.root / "conda")
    (tree.root / "old").write_text("")  # one that knows no info --json
    prefix = tree.env("foo")
    monkeypatch.setenv("PATH", f"{tree.root}/bin:{os.environ['PATH']}")
    assert helpers.run("rhl-cache-conda", []) == 0
    assert helpers.run("rhl-conda-info", []) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"wrote {place.base}/conda-setup.json" and json.loads(out[1])["envs"] == [str(tree.root), str(prefix)]
    words = [
        "--key",
        "k",
        "--workdir",
        str(place.root / "w"),
        "--conda-env",
        "foo",
        "--",
        "inenv",
        "--status-file",
        "{status_file}",
    ]
    assert helpers.run("rhl-launch-service", words) == 0
    (place.base / "conda-setup.json").write_text("[]")
    assert helpers.run("rhl-conda-info", []) == 1


def test_micromamba(place, monkeypatch):
    """A host with nothing else: no conda.sh, its own hook."""
    root = place.home / "micromamba"
    prefix = root / "envs" / "foo"
    (prefix / "bin").mkdir(parents=True)
    program = place.home / ".local" / "bin" / "micromamba"
    program.parent.mkdir(parents=True)
    hook = f"micromamba() {{ [ $1 = activate ] && export CONDA_PREFIX=$2 PATH=$2/bin:$PATH; }}; : {root}"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in\n "info --json") echo \'{{"base environment": "{root} (active)"}}\';;\n'
        f' "env list --json") echo \'{{"envs": ["{root}", "{prefix}"]}}\';;\n "shell hook -s bash") echo \'{hook}\';;\n *) exit 1;; esac\n'
    )
    program.chmod(0o755)
    setup = conda.prefix_or_refresh("foo", "here")
    assert (
        setup["mamba"] == str(program)
        and setup["prefix"] == str(prefix)
        and conda.cached() == {name: setup[name] for name in setup if name not in ("prefix", "refreshed")}
    )
    done = subprocess.run(
        conda.activated(setup, ["sh", "-c", "echo $CONDA_PREFIX $PATH"]), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{prefix} {prefix}/bin:")
    assert conda.prefix_or_refresh("base", "here")["prefix"] == str(root)
    with pytest.raises(CondaError, match="it has base, .*foo"):
        conda.prefix_or_refresh("bar", "here")


def test_a_cache_that_is_none(place):
    place.base.mkdir(parents=True)
    for text in ("{}", "[1]", "", '{"conda_base": 3, "envs": []}'):
        (place.base / "conda-setup.json").write_text(text)
        with pytest.raises(StateError):
            conda.cached()
