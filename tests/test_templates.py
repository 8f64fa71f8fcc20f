"""Templates: Python's own f-strings are the oracle for what is allowed; what is not allowed does nothing and says where it stands."""

from __future__ import annotations

import string
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zerodeploy import TemplateError
from zerodeploy.services.templates import FUNCTIONS, METHODS, evaluate

CONFIG = {
    "workdir": "/home/user/my data", "port_start": 10000, "port_end": 19999, "network_interface": "0.0.0.0", "timeout": 600, "x": [1, 2, 3],
    "d": {"a": {"b": 5}}, "f": 1.5, "n": None, "s": "aBc", "yes": True,
}  # fmt: skip


def python(template: str) -> str:
    """What Python makes of it."""
    return str(
        eval("f" + repr(template) if "\\" not in repr(template) else 'f"""' + template + '"""', {}, {**CONFIG, "config": CONFIG})
    )


@pytest.mark.parametrize(
    "template",
    [
        "plain", "", "{{}}", "a{{b}}c{timeout}", "{config['network_interface']}:{port_start}", '{workdir.strip("/").replace("/", "--")}',
        '{"a" if timeout > 5 else "b"}', "{timeout!r:>8}|{f:.3f}|{x[1:]}|{d['a']['b']:04d}", "{workdir=}", "{timeout = }", "{timeout=:>9}", "{s=!s}",
        "{x!r:{port_start - 9980}}", '{",".join(str(i * 2) for i in x if i != 2)}', "{timeout == 600}", "{timeout != 600}", "{timeout >= 1 and yes}",
        "{n}{yes}{not yes}", "{'}{'}", "{d.get('a').get('b')}", "{workdir.split('/')[-1]:^20}", "{(1, 2)}{[1][0]}{ {1: 2}[1] }{ {1} }", "{-timeout // 7 % 5 ** 2}",
        "{1 < timeout < 1000}", "{'a' in s or 'a' not in s}", "{len(x) + max(x) + int('7')}", "{sorted(x, reverse=yes)}", "{s.upper()[::-1]!a}", "{x[-1] << 2 | 1}",
        "{f:{'>'}{10}}", "{ timeout }", "{'%05d' % timeout}", "{[a + b for a, b in zip(x, x) if a]}", "{ {k: v for k, v in d.items()} }", "{timeout,}", "{x[0] if x else None}",
        "é {workdir!a}", "{s.center(9, '*')}", "{'=='}{'!='}{'x:y'}", "{d['a'] == {'b': 5}}", "{timeout:,}", "{0.1 + 0.2:.2e}", "{round(f) ^ 3}", "{any(i > 2 for i in x)}",
    ],
)  # fmt: skip
def test_as_python_does(template):
    assert evaluate(template, CONFIG) == python(template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{f'{timeout}-{x[0]:>3}'}", "600-  1"), ("{'''a'b'''}", "a'b"), ("{config[\"workdir\"].split('/')[1]}", "home"), ("{d[\"a\"]['b']}", "5"),
     ("{' --port-range {} {}'.format(config.get('timeout'), x[0])}", " --port-range 600 1"), ("{'{1}{0!r:>6}{a[a][b]}{b[1]}{{}}'.format('x', 2, a=d, b=x)}", "2   'x'52{}"), ("{'{:{}}|'.format(1, 4)}", "   1|"),
     ('{"q" + "{"}', "q{"), ("{status}", "/x"), ("{'a\\\\b'}", "a\\b")],
)  # fmt: skip
def test_quotes_of_both_kinds_and_more(template, expected):
    assert evaluate(template, CONFIG, extra={"status": "/x"}) == expected


@pytest.mark.parametrize(
    ("template", "position", "said"),
    [
        ("{x.__class__}", 2, "attribute"), ("ab{().__class__.__bases__[0]}", 4, "attribute"), ("{open('/etc/passwd')}", 2, "can't call open"),
        ("{__import__('os')}", 2, "can't call"), ("{'{0.__class__}'.format(s)}", 2, "attribute"), ("{'{a.b}'.format(a=s)}", 2, "attribute"), ("{'{0[a].b}'.format(d)}", 2, "attribute"), ("{'{0[a'.format(d)}", 2, "ValueError"), ("{'{0[x.y]}'.format(d)}", 2, "KeyError"),
        ("{'{:>99999}'.format(1)}", 2, "4096"), ("{'{:{:{}}}'.format(1, 2, 3)}", 2, "fields in fields"), ("{'{} {0}'.format(1)}", 2, "with a number and"), ("{'{}'.format()}", 2, "IndexError"),
        ("{'{x}'.format()}", 2, "KeyError"), ("{'{'.format()}", 2, "ValueError"), ("{'{!z}'.format(1)}", 2, "conversion"), ("{'{0[0]}'.format({1})}", 2, "can't reach"), ("{s.format_map(d)}", 2, "no method"), ("{s.encode()}", 2, "no method"),
        ("{(lambda: 1)()}", 2, "can't call"), ("{(y := 1)}", 2, "NamedExpr"), ("{getattr(s, 'upper')()}", 2, "can't call"), ("{eval('1')}", 2, "can't call"),
        ("{config.update({})}", 2, "no method"), ("{x.append(1)}", 2, "no method"), ("{d.__getitem__('a')}", 2, "no method"), ("{globals()}", 2, "can't call"),
        ("{str.upper}", 2, "attribute"), ("{s.upper}", 2, "attribute"), ("{'a' * 10 ** 9}", 2, "too large"), ("{2 ** 10 ** 6}", 2, "too large"), ("{1 << 99999}", 2, "too large"),
        ("{'%999999d' % 1}", 2, "too large"), ("{'%*d' % (9999999, 1)}", 2, "too large"), ("{timeout:>99999}", 1, "4096"), ("{s.zfill(10 ** 9)}", 2, "too large"),
        ("{[i for i in range(9999) for j in range(9999)]}", 2, "too much"), ("{x[5]}", 2, "IndexError"), ("{d['no']}", 2, "KeyError"), ("{1 / 0}", 2, "ZeroDivisionError"),
        ("{nope}", 2, "there is no 'nope'; there are config"), ("{x", 1, "not closed"), ("a}", 2, "single }"), ("{}", 1, "empty"), ("{ }", 1, "empty"), ("{x!z}", 3, "r, s or a"),
        ("{x:{timeout:{f}}}", 12, "too deeply"), ("{x +}", 2, "no expression"), ("{'a}", 2, "string is not closed"), ("{x)}", 3, "not opened"), ("{x # y}", 4, "comment"),
        ("{x:{", 4, "not closed"), ("{b'x'}", 2, "b'x'"), ("{...}", 2, "Ellipsis"), ("{1j}", 2, "1j"), ("{sorted(x, key=len)}", 2, "there is no 'len'"),
        ("{max(*x)}", 2, "* or **"), ("{dict(**d)}", 2, "* or **"), ("{await x}", 2, ""), ("{yield}", 2, ""), ("{x; y}", 2, "no expression"), ("{1)+(1}", 3, "not opened"),
        ("{'a'.join(['b' * 60000] * 60000)}", 2, "too large"), ("{s.replace('', 'x' * 60000)}", 2, "too large"), ("{n.x}", 2, "attribute"), ("{'abc'.join(n)}", 2, "TypeError"),
        ("{timeout:d5}", 1, "Invalid format"), ("{x:d}", 1, "format"),
    ],
)  # fmt: skip
def test_what_is_refused_says_where(template, position, said):
    with pytest.raises(TemplateError) as caught:
        evaluate(template, CONFIG, name="command")
    assert (
        caught.value.position == position
        and said in str(caught.value)
        and str(caught.value).startswith(f"command, character {position}: ")
    )


events: list[str] = []
watching = False


def _audit(event: str, args: object) -> None:
    if watching and event not in ("compile", "object.__getattr__"):
        events.append(event)


sys.addaudithook(_audit)
TOKENS = st.sampled_from(
    ["{", "}", "{{", "}}", "!r", "!", ":", ">9", "=", "(", ")", "[", "]", "'", '"', "'''", "\\", "#", ".", ",", " ", "\n", "\0", "é", "*", "**", "%", "+", "lambda", ":=",
     "for i in x", "if", "else", "__class__", "__globals__", "__import__('os')", "open", "exec", "eval", "config", "workdir", "x", "d", "s", ".format(", ".upper()", "1", "1e999",
     "9" * 30, "range(", "str", "async", "await", "yield", "None", "True", "f'", "rb'", "print(", "{x!r:{d}}", *sorted(FUNCTIONS), *sorted(METHODS[str])]
)  # fmt: skip


@given(
    st.one_of(st.lists(TOKENS, max_size=25).map("".join), st.text(string.printable, max_size=60).map(lambda text: "{" + text + "}"))
)
@settings(max_examples=3000, deadline=None)
@example("{" * 300)
@example("{" + "(" * 500 + ")" * 500 + "}")
@example("{" + "not " * 5000 + "x}")
@example("{x" + "[0]" * 3000 + "}")
@example("{" + "f'{" * 50 + "}" * 50 + "}")
def test_hostile_templates_do_nothing(template):
    global watching
    before = repr(CONFIG)
    watching = True
    try:
        assert isinstance(evaluate(template, CONFIG), str)
    except TemplateError as error:
        assert error.position >= 1
    finally:
        watching = False
    assert events == [] and repr(CONFIG) == before
