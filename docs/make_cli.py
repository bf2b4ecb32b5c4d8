"""Write docs/cli.md from the commands' own --help, or see that it is fresh.

python docs/make_cli.py [--check]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 100
INTRODUCTION = """\
# Command line

What `--help` prints, for every command. This page is written by `make cli-docs` and checked by `make lint`.

Exit codes: 0 done; 2 a mistake of the user's, told in one line before any work; 3 some rows failed and the rest is
complete; 4 stopped by the budget; 5 training stopped by what it found; 130 interrupted. After 3, 4 and 130 the same
command goes on from there.
"""


def page() -> str:
    """The text of docs/cli.md."""
    from apo.cli import app as apo
    from clair.cli import app as clair

    sections = [INTRODUCTION]
    for name, app in (("clair", clair), ("apo", apo)):
        app.rich_markup_mode = None
        sections.append(_section("##", [name], app))
        for command, command_object in typer.main.get_command(app).commands.items():
            sections.append(_section("###", [name, command], app))
            inner = getattr(command_object, "commands", ())  # of a group, such as `apo eval`
            sections += [_section("####", [name, command, sub], app) for sub in inner]
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
    """Write the page; with --check only compare."""
    os.environ["NO_COLOR"] = "1"
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, "utf-8")
    elif not PAGE.is_file() or PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE.name} is not what the commands say; run: make cli-docs")


if __name__ == "__main__":
    main()
