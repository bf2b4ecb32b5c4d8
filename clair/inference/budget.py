"""Money: what calls cost, the most that one can cost, and a limit that is never passed.

Before each call the worst case is reserved, and the call waits or the run stops where it does not fit; afterwards the
true cost takes its place. Decimals throughout, never floats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import Field, model_validator

from clair.core.errors import UserError
from clair.core.files import canonical_json
from clair.core.recipe import Recipe
from clair.ledger.ledger import Tokens

_MILLION = Decimal(1_000_000)
_TOKENS_PER_MESSAGE = 16
"""What a chat template adds to a turn, and more."""


class Price(Recipe):
    """Price of a million tokens, in and out, in any one currency."""

    input: Decimal = Field(ge=0)
    output: Decimal = Field(ge=0)

    def of(self, tokens: Tokens) -> Decimal:
        """What so many tokens cost."""
        return (self.input * tokens.prompt + self.output * tokens.completion) / _MILLION


def prices_of(roles: Mapping[str, Any]) -> dict[str, Price]:
    """The prices of the roles (ModelConfigs by role) that have one, `table` looked up in genai-prices, in US dollars.

    Raises UserError where the table is not installed or does not know the model.
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
        each = [
            calc_price(usage, model_ref=name, provider_api_url=url).total_price
            for usage in (Usage(input_tokens=1_000_000), Usage(output_tokens=1_000_000))
        ]
    except LookupError as error:
        raise UserError(f"{role}.price: genai-prices does not know {name!r} at {url}; give input and output") from error
    return Price(input=each[0], output=each[1])


def table_version() -> str | None:
    """Which genai-prices the prices are from; None without it. Its releases are what dates the table."""
    try:
        return f"genai-prices {version('genai-prices')}"
    except PackageNotFoundError:
        return None


class BudgetConfig(Recipe):
    """`budget:` of a data recipe: in money, by the prices of the roles, or in tokens, in and out together."""

    money: Decimal | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if (self.money is None) == (self.tokens is None):
            raise ValueError("give either money or tokens")
        return self


class BudgetReached(Exception):
    """The next call may cost more than is left."""


def most_tokens(request: Mapping[str, Any]) -> Tokens:
    """The most tokens a request can be billed for. Where no tokenizer is known, a token is at least one UTF-8 byte."""
    messages = request["messages"]
    text = sum(len(str(m["content"] or "").encode("utf-8", "replace")) for m in messages)
    more = [{key: value for key, value in m.items() if key not in ("role", "content")} for m in messages]
    text += sum(len(canonical_json(extra)) for extra in more if extra)
    tools = sum(len(canonical_json(request[key])) for key in ("tools", "response_format") if key in request)
    most = request.get("max_completion_tokens") or request.get("max_tokens") or 0
    return Tokens(text + tools + _TOKENS_PER_MESSAGE * (len(messages) + 1), int(most))


class Budget:
    """A limit shared by all roles of a run. `limit` None: nothing is ever refused, spending is still counted."""

    def __init__(
        self,
        config: BudgetConfig | None,
        prices: Mapping[str, Price],
        spent: Mapping[str, Tokens],
        *,
        in_batches: Mapping[str, Tokens] | None = None,
        discounts: Mapping[str, float] | None = None,
    ) -> None:
        """`spent` is by role; `in_batches` what of it went through a Batch API, at `discounts` off the price."""
        self.limit: Decimal | None = None
        self.in_tokens = config is not None and config.tokens is not None
        if config is not None:
            self.limit = Decimal(config.tokens) if config.tokens is not None else config.money
        self._prices, self._discounts = prices, discounts or {}
        self.spent = sum((self.cost(role, tokens) for role, tokens in spent.items()), Decimal(0))
        for role, tokens in (in_batches or {}).items():
            self.spent += self.cost(role, tokens, batch=True) - self.cost(role, tokens)
        self.reserved = Decimal(0)
        self._changed = asyncio.Event()

    def cost(self, role: str, tokens: Tokens, *, batch: bool = False) -> Decimal:
        """What tokens of a role count against the limit: their number, or their price (0 without one)."""
        if self.in_tokens:
            return Decimal(tokens.prompt + tokens.completion)
        full = self._prices[role].of(tokens) if role in self._prices else Decimal(0)
        return full * share_left(self._discounts.get(role, 0.0)) if batch else full

    async def reserve(self, role: str, most: Tokens) -> None:
        """Set the worst case aside; waits while calls in flight may still turn out cheaper. Raises BudgetReached."""
        amount = self.cost(role, most)
        while self.limit is not None and self.spent + self.reserved + amount > self.limit:
            if self.spent + amount > self.limit or self.reserved == 0:
                raise BudgetReached(self.told(amount))
            self._changed.clear()
            await self._changed.wait()
        self.reserved += amount

    def settle(self, role: str, most: Tokens, billed: Tokens) -> None:
        """What was set aside is over; `billed` is what came of it."""
        self.reserved -= self.cost(role, most)
        self.spent += self.cost(role, billed)
        self._changed.set()

    def hold(self, role: str, most: Tokens) -> bool:
        """Count the worst case of a request for a batch as spent; False where it does not fit. Never waits."""
        amount = self.cost(role, most, batch=True)
        if self.limit is not None and self.spent + self.reserved + amount > self.limit:
            return False
        self.spent += amount
        return True

    def replace(self, role: str, most: Tokens, billed: Tokens) -> None:
        """What a batch really took, in the place of what `hold` counted."""
        self.spent += self.cost(role, billed, batch=True) - self.cost(role, most, batch=True)
        self._changed.set()

    def told(self, amount: Decimal) -> str:
        """Why it stops here, and how to go on."""
        unit = " tokens" if self.in_tokens else ""
        return (
            f"budget reached: {self.spent.normalize():f}{unit} of {self.limit:f} spent, and the next call may cost "
            f"{amount.normalize():f}; raise budget to go on"
        )


def share_left(discount: float) -> Decimal:
    """What is left of a price after a discount, of 0 to 1."""
    return 1 - Decimal(str(discount))


def check_budget(config: BudgetConfig | None, roles: Mapping[str, Any]) -> None:
    """See that a budget can be kept before anything is spent. Raises UserError naming the role and the key it lacks.

    `roles` are the roles' ModelConfigs.
    """
    if config is None:
        return
    for role, model in roles.items():
        if model.url is None:
            continue
        if not (model.max_tokens or model.extra.get("max_completion_tokens")):
            raise UserError(f"a budget needs {role}.max_tokens: without it one call has no worst case")
        if config.money is not None and model.price is None:
            raise UserError(f"a budget in money needs {role}.price: {{input: ..., output: ...}} for a million tokens")
