"""``zerodeploy build``: a program and all that it needs as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zerodeploy.cli.common import Context, errors_told, modules_of, options_of, say_json


@click.command()
@click.argument("wanted", nargs=-1, metavar="[REQUIREMENT]...")
@click.option("-r", "--requirements", "files", multiple=True, metavar="FILE",
              help="A requirements file, or pyproject.toml[EXTRA,...].")  # fmt: skip
@click.option("--lock", metavar="FILE", help="A uv.lock or pylock.toml: exactly what it says.")
@click.option("-m", "--module", "modules", multiple=True, metavar="NAME|PATH", help="Your own module, package or directory.")
@click.option("-e", "--entry-point", metavar="MODULE:FUNCTION", help="What it runs; without one it is a Python prompt.")
@click.option("-c", "--console-script", metavar="NAME", help="A script of one of the packages, in its place.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The file to write.")
@click.option("--python", metavar="3.N", help="The Python that it is for.  [default: this one]")
@click.option("--platform", "target", metavar="NAME",
              help="The platform that it is for, as uv names it: x86_64-manylinux_2_17, aarch64-unknown-linux-gnu.  [default: this one]")  # fmt: skip
@options_of
@click.pass_obj
def build(settings: Context, /, wanted: tuple[str, ...], files: tuple[str, ...], lock: str | None, modules: tuple[str, ...],
          entry_point: str | None, console_script: str | None, output: Path, python: str | None, target: str | None) -> None:  # fmt: skip
    """Write a self-contained zipapp, in shiv's form: wheels, your modules and an entry point.

    It runs with "python FILE" where nothing else is installed, or with "zerodeploy script HOST FILE". Same input, same bytes.

    \b
    zerodeploy build -r requirements.txt -m mypkg -e mypkg.cli:main -o tool.pyz
    zerodeploy build httpie -c http --python 3.9 --platform x86_64-manylinux_2_17 -o http.pyz
    """
    from zerodeploy.payload import app, wheels

    with errors_told(settings):
        requirements = [each for file in files for each in wheels.requirements_of(file)]
        requirements += wheels.requirements_of(list(wanted) or None, lock)
        about: dict[str, Any] = app.build(
            output, requirements=requirements, modules=modules_of(modules), entry_point=entry_point, console_script=console_script,
            platform=app.platform_of(python, target),
        )  # fmt: skip
        if settings.json:
            say_json(about)
        else:
            click.echo(f"{about['file']}: {about['bytes']} bytes, {about['platform']}" + _packages(about["packages"]))


def _packages(names: list[str]) -> str:
    return f", with {', '.join(names)}" if names else ""
