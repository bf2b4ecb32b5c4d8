"""Settings that all evaluations share, the check of a result folder against them, and when a run may go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from apo.evaluation.results import ITEMS
from clair.core.errors import EXIT_SOME_FAILED, UserError
from clair.core.files import read_json, write_json
from clair.core.recipe import Recipe, changed_keys, resolved
from clair.data.records import Dropped
from clair.inference.budget import BudgetConfig
from clair.inference.client import ModelClient
from clair.inference.config import ROLE_PASSING, ModelConfig, redacted_model
from clair.inference.model import LimitReached, PaymentRequired, Refused
from clair.ledger.ledger import Ledger

SETTINGS = "settings.json"
_PASSING = ("concurrency", "attempts", "out", "ledger", "limit", "budget", "upstream_files")


class Evaluation(Recipe):
    """What every evaluation that asks models has."""

    budget: BudgetConfig | None = None
    concurrency: int = Field(100, ge=1)
    attempts: int = Field(6, ge=1)
    ledger: str | None = None
    out: str = Field(min_length=1)

    @property
    def models(self) -> Mapping[str, ModelConfig]:
        """The models that are asked, by role."""
        raise NotImplementedError

    @property
    def ledger_path(self) -> Path:
        """The ledger: the one named, or the result folder's own."""
        return Path(self.ledger) if self.ledger else Path(self.out) / "ledger.sqlite"


def check_folder(out: Path, result: str) -> None:
    """See that `out` may be written to: new, empty, or the folder of such an evaluation (`result` is its file)."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out {out} is a file, not a folder; choose another --out")
    if out.is_dir() and not any((out / name).is_file() for name in (SETTINGS, result)):
        strange = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith((".lock", "ledger.sqlite")))
        if strange:
            raise UserError(f"{out} is no result folder and not empty (it holds {strange[0]}); choose another --out")


def same_settings(config: Evaluation, out: Path, ledger: Ledger, items: str = ITEMS) -> None:
    """The folder remembers its settings from before the first request. Raises UserError where these are others.

    A run that came to nothing, such as one with a wrong key, leaves them free. `items` is the file of a finished one.
    """
    file, settings = out / SETTINGS, public(config)
    begun = (out / items).is_file() or any(sum(tokens) for tokens in ledger.spent(payer(config)).values())
    if file.is_file() and begun:
        changed = changed_keys(_lasting(read_json(file)), _lasting(settings))
        if changed:
            raise UserError(
                f"{out} holds an evaluation with other settings (it differs in {', '.join(changed)}); choose another "
                f"--out, so that results are never mixed"
            )
    write_json(file, settings)


def payer(config: Evaluation) -> str:
    """On whose account requests go in the ledger."""
    return str(Path(config.out).resolve())


def public(config: Evaluation) -> dict[str, Any]:
    """The settings as they may be written down: without secrets."""
    settings = resolved(config)
    for role, model in config.models.items():
        settings[role] = redacted_model(model, settings[role])
    return settings


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings decides about the result."""
    kept = {key: value for key, value in settings.items() if key not in _PASSING}
    roles = [key for key, value in kept.items() if isinstance(value, Mapping) and "url" in value]
    for role in roles:
        drop = ROLE_PASSING | ({"url"} if kept[role].get("id") else set())
        kept[role] = {key: value for key, value in kept[role].items() if key not in drop}
    return kept


_ABOUT_THE_ROW = {"http_400", "http_403", "http_413", "http_422", "http_451", "prompt_too_long", "tool_call"}
"""Why a request fails that would fail again: too long, moderated, malformed for this server; or a tool is called."""


def is_passing(dropped: Dropped) -> bool:
    """True if a failed request says nothing about its row: nobody answered, no money, a reply that is no completion.

    Another run may get its answer, so that it must not become a verdict.
    """
    return dropped.failed and dropped.reason not in _ABOUT_THE_ROW


def goes_on(error: Exception, clients: Mapping[str, ModelClient]) -> None:
    """Give the error of a run code 3 where the same command can go on: replies came before it, or money is wanted."""
    replies = any(client.tally.calls or client.tally.reused for client in clients.values())
    if isinstance(error, LimitReached | PaymentRequired) or (isinstance(error, Refused) and replies):
        error.exit_code = EXIT_SOME_FAILED
