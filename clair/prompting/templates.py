"""The words we send. Templates are Jinja in a sandbox; user text is data to them and is never read as a template."""

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
    return environment.from_string(source)


def load_template(path: str | None, built_in: str, needs: tuple[str, ...]) -> str:
    """The text of the user's template file, or of the built-in one, checked to parse and to use what it is given.

    Raises UserError where the file is missing, is not a template, or leaves out one of the variables in `needs`.
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
        wanted, found = (", ".join(f"{{{{ {name} }}}}" for name in sorted(names)) for names in (needs, used))
        raise UserError(f"template {file} must use {wanted}; it uses {found or 'nothing'}")
    try:
        render(source, **dict.fromkeys(needs, "text"))
    except UserError as error:
        raise UserError(f"template {file}: {error}") from error
    return source


def render(template: str, **values: str) -> str:
    """Fill a template. The values are put in as they are: braces and template syntax in them stay text.

    Raises UserError where the template does with them what cannot be done.
    """
    try:
        return str(_template(template).render(**values))
    except Exception as error:  # whatever a user's expression can raise
        raise UserError(f"the template cannot be filled ({type(error).__name__}: {error})") from error


def request(
    template: str, messages: Messages, system: str | None = None, tools: Tools = (), **values: str
) -> list[Message]:
    """The messages of one call: a filled template as the only user message, after a system message if there is one."""
    user: Message = {"role": "user", "content": render(template, task=task_text(messages, tools), **values)}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def ask_again(asked: list[Message], reply: str, what_is_wrong: str) -> list[Message]:
    """The same request once more, after the reply that could not be used and what is wrong with it."""
    told = (
        f"Your reply cannot be used: {what_is_wrong}. Give the whole reply again, in the form that was asked for, and "
        f"say nothing about this message in it."
    )
    return [*asked, {"role": "assistant", "content": reply}, {"role": "user", "content": told}]
