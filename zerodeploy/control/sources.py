"""From a function or class object to the text that defines it."""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import inspect
import linecache
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

from zerodeploy.errors import NotShippable
from zerodeploy.payload.syntax import parse

__all__ = ["Definition", "definition_of_class", "definition_of_function", "referenced_names"]

_ANNOTATIONS = __future__.annotations.compiler_flag
_ENCLOSING = "__zd_enclose__"
_Def = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Definition:
    """One definition, cut out of its file. ``source`` keeps its indentation; ``names`` are the globals it refers to."""

    form: str  # "def", "lambda" or "class"
    name: str
    source: str
    line: int
    file: str
    indented: bool
    free: tuple[str, ...]
    names: frozenset[str]
    at_once: frozenset[str]  # those of them that are read when the definition itself runs: bases, decorators, defaults
    hints: frozenset[str]  # first names of annotations in class bodies: dataclasses look ClassVar and the like up
    attributes: frozenset[str]
    blanked: bool  # default values were replaced by None in the source


def _describe(thing: object) -> str:
    name = getattr(thing, "__qualname__", repr(thing))
    return f"{getattr(thing, '__module__', '?')}.{name}"


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> ast.Module:
    return parse(text)


def _source_lines(file: str, namespace: dict[str, object], thing: object) -> list[str]:
    lines = linecache.getlines(file, namespace)
    if not lines and file == "<string>":
        lines = _command_line_lines()
    if not lines:
        lines = _typed_lines(thing)
    if not lines:
        raise NotShippable(
            f"the source of {_describe(thing)} is not to be had ({file}): functions travel as source. Define it in a file or "
            "a notebook, or pass the source by way of a module on the host"
        )
    return lines


def _command_line_lines() -> list[str]:
    """The program that was given as ``python -c``; whether it defines the function in question is seen by its lines."""
    words = sys.orig_argv
    return words[words.index("-c") + 1].splitlines(keepends=True) if "-c" in words[:-1] else []


def _typed_lines(thing: object) -> list[str]:
    """What was typed at the interactive prompt, from readline's history, when it compiles to the very same code."""
    code = getattr(thing, "__code__", None)
    readline = sys.modules.get("readline")
    if code is None or readline is None or code.co_filename != "<stdin>":
        return []
    typed = [readline.get_history_item(i) or "" for i in range(1, readline.get_current_history_length() + 1)]
    for start in range(len(typed) - 1, -1, -1):
        for end in range(start + 1, min(start + 200, len(typed)) + 1):
            text: str = "\n" * (code.co_firstlineno - 1) + "\n".join(typed[start:end]) + "\n"
            try:
                found = compile(text, "<stdin>", "exec")
            except SyntaxError:
                continue
            if any(_same_code(inner, code) for inner in _codes(found)):
                return list(text.splitlines(keepends=True))
    return []


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _same_code(one: types.CodeType, other: types.CodeType) -> bool:
    def key(code: types.CodeType) -> tuple[object, ...]:
        consts = tuple(key(c) if isinstance(c, types.CodeType) else (type(c), repr(c)) for c in code.co_consts)
        return (code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, consts)

    return key(one) == key(other)


def _first_line(node: _Def) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _offsets(lines: list[str]) -> list[int]:
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    return starts


def _at(lines: list[str], starts: list[int], line: int, column: int) -> int:
    """The character offset of an `ast` position, whose columns count UTF-8 bytes."""
    text = lines[line - 1]
    return starts[line - 1] + (column if text.isascii() else len(text.encode("utf-8")[:column].decode("utf-8")))


def definition_of_function(function: types.FunctionType, *, decorated: bool = False, blank_defaults: bool = True) -> Definition:
    """The definition of a plain function; with its decorators when *decorated*. Raises `NotShippable`."""
    code = function.__code__
    lines = _source_lines(code.co_filename, function.__globals__, function)
    try:
        tree = _parse("".join(lines))
    except SyntaxError as error:
        raise NotShippable(f"the source of {_describe(function)} no longer parses ({code.co_filename}: {error})") from None
    if code.co_name == "<lambda>":
        return _lambda(function, lines, tree, blank=blank_defaults)
    found = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name == code.co_name and _first_line(node) == code.co_firstlineno
    ]  # fmt: skip
    if not found:
        raise NotShippable(
            f"{code.co_filename} line {code.co_firstlineno} does not define {_describe(function)}: was the file changed since "
            "it was imported, or the function made at run time? Define it with def in a file or a notebook"
        )
    node = found[0]
    values_travel = blank_defaults and not decorated
    return _cut_def(node, lines, code.co_filename, "def", code.co_freevars, decorated=decorated, blank=values_travel)


def _cut_def(
    node: _Def, lines: list[str], file: str, form: str, free: tuple[str, ...], *, decorated: bool, blank: bool
) -> Definition:
    first = _first_line(node) if decorated else node.lineno
    last = node.end_lineno or node.lineno
    part = lines[first - 1 : last]
    blanked = False
    if blank and not isinstance(node, ast.ClassDef):
        starts = _offsets(lines)
        source, blanked = _blank_defaults("".join(part), starts[first - 1], node.args, lines, starts)
    else:
        source = "".join(part)
    if not source.endswith("\n"):
        source += "\n"
    indented = source[:1] in " \t"
    if free:
        head = f"def {_ENCLOSING}({', '.join(free)}):\n"  # or a nonlocal statement would not compile
    else:
        head = "if 1:\n" if indented else ""
    names, at_once, attributes = referenced_names(head + source, file)
    return Definition(
        form, node.name, source, first, file, indented, free, names - set(free), at_once - set(free),
        frozenset(_hints(node)), attributes, blanked,
    )  # fmt: skip


def _blank_defaults(text: str, base: int, args: ast.arguments, lines: list[str], starts: list[int]) -> tuple[str, bool]:
    """*text*, which begins at offset *base*, with None for each default value; and whether there was any."""
    defaults = [*args.defaults, *(value for value in args.kw_defaults if value is not None)]
    for value in sorted(defaults, key=lambda v: (v.lineno, v.col_offset), reverse=True):
        start = _at(lines, starts, value.lineno, value.col_offset) - base
        stop = _at(lines, starts, value.end_lineno or value.lineno, value.end_col_offset or 0) - base
        breaks = text.count("\n", start, stop)  # a multi-line default leaves them, so that line numbers stay
        text = text[:start] + ("(None" + "\n" * breaks + ")" if breaks else "None") + text[stop:]
    return text, bool(defaults)


def _hints(definition: ast.AST) -> Iterator[str]:
    for node in ast.walk(definition):
        if isinstance(node, ast.AnnAssign):
            hint = node.annotation
            while isinstance(hint, ast.Subscript | ast.Attribute):
                hint = hint.value
            if isinstance(hint, ast.Name):
                yield hint.id


def _lambda(function: types.FunctionType, lines: list[str], tree: ast.Module, *, blank: bool) -> Definition:
    code = function.__code__
    on_line = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno]
    starts = _offsets(lines)
    text = "".join(lines)

    def cut(node: ast.Lambda) -> str:
        start = _at(lines, starts, node.lineno, node.col_offset)
        return text[start : _at(lines, starts, node.end_lineno or 0, node.end_col_offset or 0)]

    if len(on_line) > 1:
        # several on the line: equal code means equal behaviour, whichever of them it was; default values are sent
        on_line = [node for node in on_line if _lambda_matches(cut(node), code)][:1]
    if not on_line:
        raise NotShippable(
            f"the lambda at {code.co_filename} line {code.co_firstlineno} can't be told from others on that line, or the file "
            "was changed; use def, or one lambda a line"
        )
    node, source, blanked = on_line[0], cut(on_line[0]), False
    if blank:
        source, blanked = _blank_defaults(source, _at(lines, starts, node.lineno, node.col_offset), node.args, lines, starts)
    free = code.co_freevars
    names, at_once, attributes = referenced_names(f"(\n{source}\n)", code.co_filename)
    return Definition(
        "lambda", "<lambda>", source, code.co_firstlineno, code.co_filename, False, free, names - set(free), at_once - set(free),
        frozenset(), attributes, blanked,
    )  # fmt: skip


def _lambda_matches(source: str, code: types.CodeType) -> bool:
    enclosing = f"def f({', '.join(code.co_freevars)}):\n return (\n{source}\n)"
    try:
        compiled = compile(enclosing, code.co_filename, "exec")
    except SyntaxError:
        return False
    outer = next(_codes(compiled))
    # the last of its constants: lambdas in default values come first, those inside are constants of the lambda itself
    made = [inner for inner in outer.co_consts if isinstance(inner, types.CodeType)]
    return bool(made) and made[-1].co_name == "<lambda>" and _same_code(made[-1], code)


def definition_of_class(cls: type) -> Definition:
    """The definition of a class, decorators included. Raises `NotShippable`."""
    module = sys.modules.get(cls.__module__)
    namespace = dict(vars(module)) if module else {}
    file = getattr(module, "__file__", None)
    for method in vars(cls).values():
        if isinstance(method, types.FunctionType) and method.__qualname__.startswith(cls.__qualname__ + "."):
            written = method.__code__.co_filename  # a notebook's cell; but what dataclasses generates is in no file of the user's
            if method.__globals__.get("__name__") == cls.__module__ and linecache.getlines(written, namespace):
                file = written
                break
    if file is None or "<locals>" in cls.__qualname__:
        raise NotShippable(f"the class {_describe(cls)} can't travel: define it at the top level of a file or a notebook cell")
    lines = _source_lines(file, namespace, cls)
    tree = _parse("".join(lines))
    found: list[ast.ClassDef] = []
    body: list[ast.stmt] = tree.body
    for part in cls.__qualname__.split("."):
        found = [node for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.ClassDef) and node.name == part]
        if not found:
            raise NotShippable(f"{file} does not define the class {_describe(cls)}: was it changed, or made at run time?")
        body = found[-1].body
    return _cut_def(found[-1], lines, file, "class", (), decorated=True, blank=False)


def referenced_names(source: str, file: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The module-level names that *source* reads, those that it reads when it is executed, and all attribute names in it."""
    code = compile(source, file, "exec", flags=_ANNOTATIONS, dont_inherit=True)
    names: set[str] = set()
    at_once: set[str] = set()
    attributes: set[str] = set()

    def walk(code: types.CodeType, runs_now: bool) -> None:
        stored: set[str] = set()  # so far: in a class body, "x = x" reads the module's x
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "STORE_NAME":
                stored.add(name)
            elif instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL") or (
                instruction.opname in ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS") and name not in stored
            ):
                names.add(name)
                if runs_now:
                    at_once.add(name)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                attributes.add(name)
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                walk(inner, runs_now and _runs_with_its_definition(inner))

    walk(code, True)
    implicit = {"__name__", "__qualname__", "__module__", "__doc__", "__file__", "__builtins__", "__annotations__",
                "__classdict__", "__conditional_annotations__"}  # fmt: skip
    return frozenset(names - implicit), frozenset(at_once - implicit), frozenset(attributes)


def _runs_with_its_definition(code: types.CodeType) -> bool:
    """Whether *code* is a class body or a comprehension, and not a function that is called later."""
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return True
    return code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", _ENCLOSING) or code.co_name.startswith("<generic")
