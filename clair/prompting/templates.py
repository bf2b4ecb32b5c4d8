"""Prompt templates: Jinja in a sandbox. Text of users is inserted as data and never parsed as a template."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path

from clair.core.errors import UserError
from clair.core.files import read_text
from clair.data.records import Message, Messages, Tools, task_text

REVISER_NEEDS = ("task", "answer")
JUDGE_NEEDS = ("task", "first", "second")


@lru_cache(maxsize=16)
def _template(source: str):
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Nothing here becomes HTML: autoescape would change the user's text.
    environment = ImmutableSandboxedEnvironment(
        autoescape=False, keep_trailing_newline=False, undefined=StrictUndefined
    )
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # Jinja copies its chain of dictionaries slowly for each text
    return template


def load_template(path: str | None, built_in: str, needs: tuple[str, ...]) -> str:
    """The text of the user's template file, or of the built-in one.

    Raises UserError if the file is missing, is not a template, or does not use exactly the variables in `needs`.
    """
    if path is None:
        return resources.files("clair.prompting").joinpath(built_in).read_text("utf-8")
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file = Path(path)
    if not file.is_file():
        raise UserError(f"template {file} does not exist; leave the key out to use the built-in {built_in}")
    source = read_text(file)
    try:
        used = meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(source))
    except TemplateError as error:
        raise UserError(f"template {file} is not a Jinja template: {error}") from error
    if set(needs) != used:
        required, existing = (", ".join(f"{{{{ {name} }}}}" for name in sorted(names)) for names in (needs, used))
        raise UserError(f"template {file} must use {required}; it uses {existing or 'nothing'}")
    try:
        render(source, **dict.fromkeys(needs, "text"))
    except UserError as error:
        raise UserError(f"template {file}: {error}") from error
    return source


def render(template: str, **values: str) -> str:
    """Fill a template. Braces and template syntax in the values stay text. Raises UserError if rendering fails."""
    try:
        return str(_template(template).render(**values))
    except Exception as error:  # an expression of a user's template can raise anything
        raise UserError(f"the template cannot be filled ({type(error).__name__}: {error})") from error


def request(
    template: str, messages: Messages, system: str | None = None, tools: Tools = (), **values: str
) -> list[Message]:
    """The messages of one call: a filled template as the only user message, after a system message if there is one."""
    user: Message = {"role": "user", "content": render(template, task=task_text(messages, tools), **values)}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def ask_again(messages: list[Message], reply: str, problem: str) -> list[Message]:
    """Repeat a request after a reply that could not be used, with the problem of that reply."""
    message = (
        f"Your reply cannot be used: {problem}. Give the whole reply again, in the form that was asked for, and "
        f"say nothing about this message in it."
    )
    return [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": message}]
