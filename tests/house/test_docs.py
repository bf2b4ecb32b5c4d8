"""The documentation says what the code does: recipe keys, filters, reasons, commands, recipes and Python in it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator

import click
import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tests.house.pages import ROOT, blocks, commands, pages, tables

# ---- tables


def configs() -> dict[str, type[BaseModel]]:
    """Every recipe and every part of one, by class name."""
    from apo.advice.config import AdviseConfig, PilotConfig
    from apo.analysis.config import DistinguishConfig
    from apo.evaluation.ifeval.config import IFEvalConfig
    from apo.evaluation.mixeval.config import MixEvalConfig
    from apo.evaluation.pairs import PairsConfig
    from apo.evaluation.stability.config import StabilityConfig
    from apo.evaluation.winrate.run import WinrateConfig
    from apo.guarantees.config import CalibrateConfig, CertifyConfig
    from apo.rewards.config import AdaptConfig, CurveConfig, FitConfig, ScoreConfig, SelectConfig
    from apo.training.config import TrainConfig
    from clair.pipeline.config import BuildConfig
    from clair.rounds.config import IterateConfig

    # The roles of evaluations are those of builds, with other defaults: only their own keys have tables.
    evaluations = [AdviseConfig, PilotConfig, IFEvalConfig, MixEvalConfig, WinrateConfig, PairsConfig, StabilityConfig]
    analyses = [DistinguishConfig, CalibrateConfig, CertifyConfig]
    analyses += [SelectConfig, FitConfig, CurveConfig, ScoreConfig, AdaptConfig]
    by_name: dict[str, type[BaseModel]] = {model.__name__: model for model in evaluations + analyses}
    todo: list[type[BaseModel]] = [BuildConfig, TrainConfig, IterateConfig]
    while todo:
        model = todo.pop()
        if model.__name__ not in by_name:
            by_name[model.__name__] = model
            todo += [inner for field in model.model_fields.values() for inner in models_in(field.annotation)]
    return by_name


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def default_of(model: type[BaseModel], key: str) -> str:
    """The default of a key as a table gives it."""
    field = model.model_fields.get(key)
    if field is None:
        return "–"
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    assert default is not PydanticUndefined
    return "absent" if default is None else f"`{json.dumps(default)}`"


def test_every_key_of_every_recipe_is_documented_with_its_default():
    models, documented, count = configs(), [], 0
    for page, names, (head, *rows) in tables("keys"):
        classes = [models[name.strip()] for name in names.split(",")]
        documented += [model.__name__ for model in classes]
        expected = list(dict.fromkeys(key for model in classes for key in model.model_fields))
        keys = [row[0].strip("`").rpartition(".")[2] for row in rows]
        assert sorted(keys) == sorted(expected), f"{page}: the keys of {names}"
        for row, key in zip(rows, keys, strict=True):
            defaults = [default_of(model, key) for model in classes]
            assert row[1 : len(classes) + 1] == defaults, f"{page}: the default of {key} ({names})"
            assert len(row) == len(head)
            assert row[-1], f"{page}: {key} is not explained"
            count += 1
    print(f"looked at {count} keys of {len(documented)} recipe parts")
    assert sorted(documented) == sorted(models), "each part of a recipe has one table of keys"


def test_every_filter_is_documented_with_its_options():
    from clair.pipeline.filters import FILTERS, OFF

    ((page, _, (_, *rows)),) = tables("filters")
    expected = []
    for name, function in FILTERS.items():
        options = list(inspect.signature(function).parameters.values())[1:]
        described = ", ".join(f"`{option.name}: {option.default}`" for option in options)
        expected.append([f"`{name}`", "off" if name in OFF else "on", described])
    assert [row[:3] for row in rows] == expected, page
    assert all(row[3] for row in rows)


def test_every_reason_for_a_drop_is_documented():
    from clair.pipeline.filters import FILTERS
    from clair.pipeline.runner import _SKIP_REASONS
    from clair.prompting.parse import FAILURES

    rows = [row for _, _, (_, *rows) in tables("reasons") for row in rows]
    documented = {reason.strip("` ") for row in rows for reason in row[1].split(",")}
    expected = set(FAILURES) | set(FILTERS) | set(_SKIP_REASONS)
    for file in (ROOT / "clair").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Dropped", "RequestFailed"):
                reason = node.args[node.func.id == "Dropped"] if not isinstance(node.args[0], ast.Starred) else None
                if isinstance(reason, ast.Constant):
                    expected.add(reason.value)
                elif isinstance(reason, ast.JoinedStr):
                    expected.add(f"{reason.values[0].value}4xx")
    print(f"looked at {len(expected)} reasons")
    assert len(expected) > 20
    assert documented == expected


def test_exit_codes_are_the_ones_of_the_code():
    from clair.core import errors

    expected = {0, *(value for name, value in vars(errors).items() if name.startswith("EXIT_"))}
    ((_, _, (_, *rows)),) = tables("exit codes")
    assert {int(row[0]) for row in rows} == expected


# ---- blocks


def test_cli_pages_are_what_the_commands_say():
    check = [sys.executable, "docs/make_cli.py", "--check"]
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


PYTHON = {page: [b for b in blocks("python") if b.page == page] for page in sorted({b.page for b in blocks("python")})}


@pytest.mark.parametrize("page", PYTHON)
def test_python_in_the_docs_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other; one that needs something else (`needs: ...`) is only compiled."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in PYTHON[page]:
        code = compile("\n" * block.line + block.code, block.page, "exec")
        if not block.note.startswith("needs:") and not block.title:
            exec(code, namespace)


def recipes() -> list[tuple[str, str]]:
    """(where, YAML text) of every recipe in the docs and under recipes/.

    The files in recipes/accelerate are accelerate's, and tests/apo/distributed/test_launch_configs.py reads it.
    """
    shown = [(b.location, b.code) for b in blocks("yaml")]
    files = [file for file in sorted((ROOT / "recipes").rglob("*.yaml")) if file.parent.name != "accelerate"]
    return shown + [(str(file.relative_to(ROOT)), file.read_text("utf-8")) for file in files]


@pytest.mark.parametrize(("location", "text"), recipes(), ids=lambda value: value if "\n" not in value else "")
def test_recipes_are_recipes(location, text):
    """A whole recipe is accepted as it stands; of a part of one, every key exists."""
    from clair.core.recipe import parse_yaml, resolve

    values, models = parse_yaml(text), configs()
    kinds = {
        "pipeline": "Build",
        "second_judge": "Stability",
        "tuned": "Winrate",
        "data": "MixEval",
        "prompts": "IFEval",
        "audit": "Calibrate",
        "property": "Certify",
        "comparisons": "Adapt",
        "reward": "Score",
        "max_tastes": "Select",
        "kind": "Fit",
    }
    name = next((kind for key, kind in kinds.items() if key in values), None)
    if name is None and {"model", "dataset"} <= set(values):
        labels = values.get("by", "group") != "group"
        name = "Advise" if isinstance(values["model"], dict) else "Distinguish" if labels else "Train"
    whole = models[f"{name}Config"] if name else None
    if whole is not None:
        resolve(whole, values, location)
    else:
        allowed = [set(model.model_fields) for model in models.values()]
        assert any(set(values) <= keys for keys in allowed), f"{location}: {', '.join(values)}"


def test_every_recipe_file_is_on_the_page_of_recipes():
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "recipes").rglob("*.yaml"))]
    assert len(files) >= 3
    assert not [file for file in files if f"`{file}`" not in pages()["docs/recipes.md"]]


# Other programs that the docs may use.
FOREIGN = {
    "accelerate",
    "cd",
    "cp",
    "curl",
    "export",
    "git",
    "hf",
    "ls",
    "pip",
    "pre-commit",
    "ruff",
    "source",
    "sqlite3",
    "torchrun",
    "transformers",
    "vllm",
}


def typed() -> list[tuple[str, str]]:
    """(where, one command) of every shell block, and of every recipe's head, where commands stand four columns in."""
    entries = [(command.location, command.text) for command in commands()]
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        text = file.read_text("utf-8").replace("\\\n#", "")
        name = str(file.relative_to(ROOT))
        entries += [
            (name, line.partition(" #")[0].strip()) for line in re.findall(r"^#     (\S.*)$", text, re.MULTILINE)
        ]
    return entries


@pytest.mark.parametrize(("location", "command"), typed(), ids=lambda value: value)
def test_commands_in_the_docs_are_commands(location, command):
    tokens = shlex.split(command)
    while re.match(r"[A-Z_]+=", tokens[0]):
        tokens.pop(0)
    program, arguments = tokens[0].removeprefix(".venv/bin/"), tokens[1:]
    if program in ("clair", "apo"):
        parses(program, arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        targets = [word for word in arguments if "=" not in word]
        assert targets
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets)
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"{location}: no module {arguments[1]}"
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"{location}: no file {arguments[0]}"
    elif not (ROOT / program).is_file():
        assert program in FOREIGN, f"{location}: {program} is not a command of this project"
    if program in ("torchrun", "accelerate"):
        (ours,) = [index for index, word in enumerate(arguments) if word in ("apo", "apo.cli")]
        parses("apo", arguments[ours + 1 :])


def parses(program: str, arguments: list[str]) -> None:
    """Read a command line as the program would, without running it."""
    module = importlib.import_module(f"{program}.cli")
    group = typer.main.get_command(module.app)
    if arguments in ([], ["--help"]):
        return
    while isinstance(group, click.Group):
        assert arguments[0] in group.commands, f"{program} has no command {arguments[0]}"
        program, group = f"{program} {arguments[0]}", group.commands[arguments.pop(0)]
    group.make_context(program, arguments)


def test_relative_links_of_pages_outside_of_the_site_lead_somewhere():
    count = 0
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", pages()[page]):
            assert (ROOT / target).exists(), f"{page}: {target}"
            count += 1
    assert count >= 5


def test_a_page_of_the_site_has_at_most_2500_words():
    counts = {name: len(text.split()) for name, text in pages().items() if name.startswith("docs/")}
    assert not {name: count for name, count in counts.items() if count > 2500}


def test_every_option_of_trl_that_is_refused_has_its_line():
    from apo.training.trainer_config import IGNORED

    page = (ROOT / "docs/trl.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    refused = {name for row in rows if row[1].startswith("refused") for name in re.findall(r"`(\w+)`", row[0])}
    assert set(IGNORED) <= refused


def test_every_method_of_trl_that_the_trainer_overrides_has_its_reason():
    from apo.training.trainer import APOTrainer

    project_classes = [cls for cls in APOTrainer.__mro__ if cls.__module__.startswith("apo.")]
    foreign = [cls for cls in APOTrainer.__mro__ if cls.__module__.split(".")[0] in ("trl", "transformers")]
    overridden = {
        (name, next(cls.__name__ for cls in foreign if name in vars(cls)))
        for cls in project_classes
        for name, value in vars(cls).items()
        if (callable(value) or isinstance(value, property)) and any(name in vars(base) for base in foreign)
    }
    ((_, _, (_, *rows)),) = tables("trl overrides")
    assert {(method.strip("`"), base.strip("`")) for method, base, _, _ in rows} == overridden
    assert len(rows) == len(overridden)
