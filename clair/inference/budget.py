"""Prices, the worst-case cost of a request, a budget that is never exceeded, and what a role has used.

Before each call its worst case is reserved. If it does not fit, the call waits or the run stops. After the call the
true cost replaces the reserve. All amounts are Decimals, never floats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import Field, model_validator

from clair.core.errors import UserError
from clair.core.files import canonical_json
from clair.core.recipe import Recipe
from clair.data.records import Reply
from clair.inference.rate_limit import Rate
from clair.ledger.ledger import Tokens

NOTHING = Tokens(0, 0)
_MILLION = Decimal(1_000_000)
_TOKENS_PER_MESSAGE = 16
"""An upper bound of the tokens that a chat template adds to a turn."""


class Price(Recipe):
    """Prices per million input and output tokens, in any one currency."""

    input: Decimal = Field(ge=0)
    output: Decimal = Field(ge=0)

    def cost(self, tokens: Tokens) -> Decimal:
        """The cost of these tokens."""
        return (self.input * tokens.prompt + self.output * tokens.completion) / _MILLION


def role_prices(roles: Mapping[str, Any]) -> dict[str, Price]:
    """The price of each role that has one (`roles`: ModelConfigs); `table` is looked up in genai-prices, in US dollars.

    Raises UserError if genai-prices is not installed or does not know the model.
    """
    return {
        role: model.price if isinstance(model.price, Price) else _from_table(role, model)
        for role, model in roles.items()
        if model.price is not None
    }


def _from_table(role: str, model: Any) -> Price:
    try:
        from genai_prices import Usage, calc_price
    except ImportError as error:
        raise UserError(f"{role}.price: table needs genai-prices: pip install 'clair-apo[prices]'") from error
    name, url = model.model, (model.urls or ("",))[0]
    try:
        prices = [
            calc_price(usage, model_ref=name, provider_api_url=url).total_price
            for usage in (Usage(input_tokens=1_000_000), Usage(output_tokens=1_000_000))
        ]
    except LookupError as error:
        raise UserError(f"{role}.price: genai-prices does not know {name!r} at {url}; give input and output") from error
    return Price(input=prices[0], output=prices[1])


def price_table_version() -> str | None:
    """The version of genai-prices, which dates its table; None if it is not installed."""
    try:
        return f"genai-prices {version('genai-prices')}"
    except PackageNotFoundError:
        return None


class BudgetConfig(Recipe):
    """`budget:` of a data recipe: in money, by the prices of the roles, or in tokens, input and output together."""

    money: Decimal | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if (self.money is None) == (self.tokens is None):
            raise ValueError("give either money or tokens")
        return self

    def share(self, count: int) -> BudgetConfig:
        """The budget of one of `count` equal parts."""
        money, tokens = self.money and self.money / count, self.tokens and self.tokens // count
        return self.model_copy(update={"money": money, "tokens": tokens})


class BudgetExceeded(Exception):
    """The next call may cost more than the budget has left."""


def max_billed_tokens(request: Mapping[str, Any]) -> Tokens:
    """An upper bound of the tokens billed for a request, without a tokenizer: a token is at least one UTF-8 byte."""
    messages = request["messages"]
    text = sum(len(str(m["content"] or "").encode("utf-8", "replace")) for m in messages)
    extras = [{key: m[key] for key in m.keys() - {"role", "content"}} for m in messages if len(m) > 2]
    text += sum(map(len, map(canonical_json, extras)))
    tools = sum(len(canonical_json(request[key])) for key in ("tools", "response_format") if key in request)
    max_tokens = request.get("max_completion_tokens") or request.get("max_tokens") or 0
    return Tokens(text + tools + _TOKENS_PER_MESSAGE * (len(messages) + 1), int(max_tokens))


class Budget:
    """A limit shared by all roles of a run. If `limit` is None, spending is counted and never refused."""

    def __init__(
        self,
        config: BudgetConfig | None,
        prices: Mapping[str, Price],
        spent: Mapping[str, Tokens],
        *,
        in_batches: Mapping[str, Tokens] | None = None,
        discounts: Mapping[str, float] | None = None,
    ) -> None:
        """`spent`: tokens by role. `in_batches`: those of them billed by a Batch API, at `discounts` off the price."""
        self.in_tokens = config is not None and config.tokens is not None
        self.limit = config and (config.money if config.tokens is None else Decimal(config.tokens))
        self._prices, self._discounts = prices, discounts or {}
        self.spent = sum((self.cost(role, tokens) for role, tokens in spent.items()), Decimal(0))
        for role, tokens in (in_batches or {}).items():
            self.spent += self.cost(role, tokens, batch=True) - self.cost(role, tokens)
        self.reserved = Decimal(0)
        self._changed = asyncio.Event()

    def cost(self, role: str, tokens: Tokens, *, batch: bool = False) -> Decimal:
        """The amount that counts against the limit: the number of tokens, or their price (0 if the role has none)."""
        if self.in_tokens:
            return Decimal(tokens.prompt + tokens.completion)
        full = self._prices[role].cost(tokens) if role in self._prices else Decimal(0)
        return full * discounted_share(self._discounts.get(role, 0.0)) if batch else full

    async def reserve(self, role: str, worst_case: Tokens) -> None:
        """Reserve the worst case of a call; wait while calls in flight may still cost less. Raises BudgetExceeded."""
        amount = self.cost(role, worst_case)
        while self.limit is not None and self.spent + self.reserved + amount > self.limit:
            if self.spent + amount > self.limit or self.reserved == 0:
                raise BudgetExceeded(self.exceeded_message(amount))
            self._changed.clear()
            await self._changed.wait()
        self.reserved += amount

    def settle(self, role: str, worst_case: Tokens, billed: Tokens) -> None:
        """Replace the reserve of a call by what was billed."""
        self.reserved -= self.cost(role, worst_case)
        self.spent += self.cost(role, billed)
        self._changed.set()

    def reserve_batch(self, role: str, worst_case: Tokens) -> bool:
        """Count the worst case of a request for a batch as spent, without waiting; False if it does not fit."""
        amount = self.cost(role, worst_case, batch=True)
        if self.limit is not None and self.spent + self.reserved + amount > self.limit:
            return False
        self.spent += amount
        return True

    def settle_batch(self, role: str, worst_case: Tokens, billed: Tokens) -> None:
        """Replace the worst case that `reserve_batch` counted by what the batch billed."""
        self.spent += self.cost(role, billed, batch=True) - self.cost(role, worst_case, batch=True)
        self._changed.set()

    def exceeded_message(self, amount: Decimal) -> str:
        """Why the run stops, and how to go on."""
        unit = " tokens" if self.in_tokens else ""
        return (
            f"budget reached: {self.spent.normalize():f}{unit} of {self.limit:f} spent, and the next call may cost "
            f"{amount.normalize():f}; raise budget to go on"
        )


def discounted_share(discount: float) -> Decimal:
    """The fraction of a price that remains after a discount between 0 and 1."""
    return 1 - Decimal(str(discount))


def check_budget(config: BudgetConfig | None, roles: Mapping[str, Any]) -> None:
    """Check that a budget can be kept (`roles`: ModelConfigs). Raises UserError naming the role and the missing key."""
    if config is None:
        return
    for role, model in roles.items():
        if model.url is None:
            continue
        if not (model.max_tokens or model.extra.get("max_completion_tokens")):
            raise UserError(f"a budget needs {role}.max_tokens: without it one call has no worst case")
        if config.money is not None and model.price is None:
            raise UserError(f"a budget in money needs {role}.price: {{input: ..., output: ...}} for a million tokens")


def billed_tokens(reply: Reply, default: Tokens) -> Tokens:
    """The tokens that a reply was billed for; `default` where the server states none."""
    usage = reply.usage
    return Tokens(usage.get("prompt_tokens", default.prompt), usage.get("completion_tokens", default.completion))


@dataclass
class Tally:
    """Calls and tokens of one role in this run. Of the tokens, `batched` were billed at the price of a Batch API."""

    calls: int = 0
    reused: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    batched: Tokens = NOTHING
    missing_finish_reason: int = 0
    """Replies without a finish reason: they may have been truncated."""

    def add(self, reply: Reply, *, reused: bool, batch: bool = False) -> None:
        """Count a reply: as reused if it came from the ledger or from an equal request in flight, else as a call."""
        tokens = billed_tokens(reply, NOTHING)
        self.reused += reused
        self.calls += not reused
        self.prompt_tokens += tokens.prompt
        self.completion_tokens += tokens.completion
        self.missing_finish_reason += not reply.finish_reason
        if batch:
            self.batched = Tokens(self.batched.prompt + tokens.prompt, self.batched.completion + tokens.completion)


@dataclass
class Spending:
    """The limits on what a role spends: the account billed, the run's budget, and the endpoint's rate limits."""

    account: str
    budget: Budget
    requests: Rate = field(default_factory=lambda: Rate(None))
    tokens: Rate = field(default_factory=lambda: Rate(None))
