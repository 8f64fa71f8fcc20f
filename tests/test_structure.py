"""What may import what, how long modules are, what is public: DESIGN section 3, held by `ast`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zerodeploy_agent

import zerodeploy
from zerodeploy import errors

NEAR = Path(zerodeploy.__file__).parent
FAR = Path(zerodeploy_agent.__file__).parent
NEAR_FILES = sorted(NEAR.rglob("*.py"))
FAR_FILES = sorted(FAR.rglob("*.py"))
SHIPPED_FILES = sorted((NEAR / "jobs" / "grpcserver").glob("*.py"))  # to hosts, as a package of its own
LAYERS = [
    {"cli"},
    {"jobs", "services"},
    {"deployment"},
    {"control"},
    {"link", "payload"},
    {"errors"},
]  # each may import what is below
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PURE = ["frames", "messages", "control", "mux", "plain", "compactjson"]
IMPURE = {
    "socket",
    "subprocess",
    "threading",
    "time",
    "select",
    "selectors",
    "asyncio",
    "multiprocessing",
    "os",
    "signal",
    "random",
}
NEWER = ("_sha2",)  # the standard library's, from 3.12


def module_name(path: Path) -> str:
    root = NEAR.parent if path.is_relative_to(NEAR) else FAR.parent
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """The absolute names of all that *path* imports, anywhere in it; ``from a import b`` gives both a and a.b."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def near_part(name: str) -> str | None:
    """``control`` for ``zerodeploy.control.client``; None for what is in no layer."""
    parts = name.split(".")
    return parts[1] if parts[0] == "zerodeploy" and len(parts) > 1 and parts[1] in RANK else None


def ids(path: Path) -> str:
    return module_name(path)


def test_the_layers_are_all_there():
    folders = {path.name for path in NEAR.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert folders == set(RANK) - {"errors"}


@pytest.mark.parametrize("path", NEAR_FILES, ids=ids)
def test_imports_go_one_way(path):
    here = near_part(module_name(path))
    if here is None:
        return  # __init__ and __main__ are the way in, testing the way out
    for name in imports(path):
        part = near_part(name)
        if part is not None and part != here:
            assert RANK[part] > RANK[here], f"{module_name(path)} imports {name}"
        assert name.split(".")[:2] not in (["zerodeploy", "testing"], ["zerodeploy", "__main__"])


def test_errors_stand_alone():
    assert {name.partition(".")[0] for name in imports(NEAR / "errors.py")} <= {"__future__", "builtins", "typing"}


@pytest.mark.parametrize("path", FAR_FILES, ids=ids)
def test_the_agent_imports_the_standard_library_rpyc_and_itself(path):
    for name in imports(path):
        root = name.partition(".")[0]
        assert root in sys.stdlib_module_names or root in ("rpyc", "zerodeploy_agent", *NEWER), f"{path.name} imports {name}"
        assert root != "zerodeploy"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io(name):
    todo, seen = [name], set()
    while todo:  # what a pure module imports must be pure, too
        module = todo.pop()
        seen.add(module)
        for imported in imports(FAR / f"{module}.py"):
            root, _, rest = imported.partition(".")
            assert root not in IMPURE, f"{module} imports {imported}"
            inner = rest.partition(".")[0]
            if root == "zerodeploy_agent" and inner and (FAR / f"{inner}.py").exists() and inner not in seen:
                todo.append(inner)
        for node in ast.walk(ast.parse((FAR / f"{module}.py").read_bytes())):
            assert not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("open", "print", "input", "exec", "eval")
            )
    assert seen <= set(PURE)


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=ids)
def test_what_is_shipped_with_its_requirements_needs_nothing_of_this_side(path):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
    for name in imports(path):
        root = name.partition(".")[0]
        assert (
            root in sys.stdlib_module_names
            or root in ("grpclib", "google", "h2", "zerodeploy_agent")
            or name.startswith("zerodeploy.jobs.grpcserver")
        ), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [*FAR_FILES, *SHIPPED_FILES], ids=ids)
def test_the_agent_parses_as_python_3_8(path):
    ast.parse(path.read_bytes(), feature_version=(3, 8))


def test_nobody_imports_it_as_bootstrap():
    # it would be a second copy, with classes of its own
    for path in (*NEAR_FILES, *FAR_FILES, *Path(__file__).parent.rglob("*.py")):
        assert not [name for name in imports_anywhere(path) if name.partition(".")[0] == "bootstrap"], path


def imports_anywhere(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


@pytest.mark.parametrize("path", [*NEAR_FILES, *FAR_FILES], ids=ids)
def test_no_module_is_longer_than_500_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 500


def as_linters_sort(name: str) -> tuple[int, str]:
    """Constants, classes, the rest: RUF022."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


@pytest.mark.parametrize("path", [*NEAR_FILES, *FAR_FILES], ids=ids)
def test_all_is_sorted_and_true(path):
    tree = ast.parse(path.read_bytes())
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and [ast.unparse(target) for target in node.targets] == ["__all__"]
            and isinstance(node.value, ast.List)
        ):
            names = ast.literal_eval(node.value)
            assert names == sorted(names, key=as_linters_sort) and len(names) == len(set(names))
            defined = {getattr(item, "name", None) for item in tree.body}
            defined |= {ast.unparse(target) for item in tree.body if isinstance(item, ast.Assign) for target in item.targets}
            defined |= {ast.unparse(item.target) for item in tree.body if isinstance(item, ast.AnnAssign)}
            defined |= {
                alias.asname or alias.name for item in tree.body if isinstance(item, ast.ImportFrom) for alias in item.names
            }
            assert set(names) <= defined


@pytest.mark.parametrize("path", [*NEAR_FILES, *FAR_FILES], ids=ids)
def test_modules_say_what_they_are_for(path):
    tree = ast.parse(path.read_bytes())
    if tree.body and path.name != "stage0.py":  # every byte of it counts
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert first and len(first) <= 125


PUBLIC = [
    "AgentDidNotStart", "AuthenticationFailed", "BootstrapError", "CertificateError", "ClusterError", "CommandLink", "ConfigError", "DeployedServer", "ForwardingRefused", "ForwardingRefusedWarning", "GuardRefused",
    "HostError", "HostKeyError", "HostKeyMismatch", "HostKeyUnknown", "HostUnreachable", "JobError", "JobsUnavailable", "LinkLost", "MapError", "MultiServerDeployment", "NoSpace", "NoSuchJob", "NotShippable", "Payload", "PayloadError",
    "ProtocolError", "PythonNotFound", "PythonTooOld", "RemoteCallError", "ServerInfo", "ServiceError", "TempDirUnusable", "TemplateError", "UsageError", "WorkerDied",
    "ZeroDeployError",
]  # fmt: skip


def test_what_is_public():
    assert zerodeploy.__all__ == sorted(PUBLIC)
    assert all(getattr(zerodeploy, name).__name__ == name for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(zerodeploy))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        zerodeploy.Nothing  # noqa: B018


def test_every_error_is_public():
    made = {
        cls.__name__
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, (Warning, errors.ZeroDeployError))
    }
    assert made == set(errors.__all__) <= set(zerodeploy.__all__)
    for path in sorted({*NEAR_FILES} - {*SHIPPED_FILES}):  # none is defined elsewhere
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef) and path != NEAR / "errors.py":
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                assert not bases & {*errors.__all__, "Exception"}, f"{module_name(path)}.{node.name}"
