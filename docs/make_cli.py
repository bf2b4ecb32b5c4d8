"""Write docs/cli_clair.md and docs/cli_apo.md from the commands' own --help, or check that they are up to date.

python docs/make_cli.py [--check]
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

WIDTH = 100
INTRODUCTION = """\
# The command `{name}`

This page shows the `--help` of `{name}` and of its subcommands; [`{other}`](cli_{other}.md) has its own page.
`make cli-docs` writes both. [Exit codes](filters.md#exit-codes) are the same for all commands.
"""


def page(name: str, other: str) -> str:
    """The text of a command's page; `other` is the other command."""
    app = importlib.import_module(f"{name}.cli").app
    app.rich_markup_mode = None
    sections = [INTRODUCTION.format(name=name, other=other), _section("##", [name], app)]
    for command, command_object in typer.main.get_command(app).commands.items():
        sections.append(_section("###", [name, command], app))
        subcommands = getattr(command_object, "commands", ())  # of a group, such as `apo eval`
        sections += [_section("####", [name, command, sub], app) for sub in subcommands]
    return "\n".join(sections)


def _section(level: str, arguments: list[str], app: typer.Typer) -> str:
    result = CliRunner().invoke(
        app, [*arguments[1:], "--help"], prog_name=arguments[0], terminal_width=WIDTH, env={"COLUMNS": str(WIDTH)}
    )
    if result.exit_code:
        raise RuntimeError(f"{' '.join(arguments)} --help failed: {result.output}")
    lines = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
    return f"{level} `{' '.join(arguments)}`\n\n```text\n{lines}\n```\n"


def main() -> None:
    """Write the pages; with --check only compare."""
    os.environ["NO_COLOR"] = "1"
    for name, other in (("clair", "apo"), ("apo", "clair")):
        text, file = page(name, other), Path(__file__).with_name(f"cli_{name}.md")
        if "--check" not in sys.argv[1:]:
            file.write_text(text, "utf-8")
        elif not file.is_file() or file.read_text("utf-8") != text:
            sys.exit(f"{file.name} differs from the commands' --help; run: make cli-docs")


if __name__ == "__main__":
    main()
