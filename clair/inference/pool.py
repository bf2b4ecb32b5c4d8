"""Several endpoints that serve the same model: the least loaded is asked, a dead one is set aside and tried again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clair.inference.model import Model, Refused, Unreachable

_FIRST_ASIDE = 2.0
_LONGEST_ASIDE = 60.0


@dataclass(slots=True)
class _Place:
    model: Model
    in_flight: int = 0
    aside_until: float = 0.0
    aside_for: float = 0.0


class Pool:
    """A model behind several endpoints, asked as one. The first URL names it, unless the recipe gives an `id`."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._places = [_Place(model) for model in models]
        self.name = models[0].name
        self.identity = models[0].identity
        self.timeout = max(getattr(model, "timeout", 0.0) for model in models)

    async def check(self) -> None:
        """At least one endpoint must be there; others may come later. Raises as the last one did."""
        results = await asyncio.gather(*(place.model.check() for place in self._places), return_exceptions=True)
        for place, result in zip(self._places, results, strict=True):
            if isinstance(result, Refused | Unreachable):
                self._set_aside(place)
            elif isinstance(result, BaseException):
                raise result
        failed = [result for result in results if isinstance(result, Refused | Unreachable)]
        if len(failed) == len(self._places):
            raise next((error for error in failed if isinstance(error, Unreachable)), failed[-1])

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """As the least loaded living endpoint answers."""
        now = time.monotonic()
        living = [place for place in self._places if place.aside_until <= now]
        place = min(living, key=lambda p: p.in_flight) if living else min(self._places, key=lambda p: p.aside_until)
        place.in_flight += 1
        try:
            raw = await place.model.complete(request, sample)
        except Unreachable:
            self._set_aside(place)
            raise
        finally:
            place.in_flight -= 1
        place.aside_for = 0.0
        return raw

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(place.model.close() for place in self._places))

    def _set_aside(self, place: _Place) -> None:
        place.aside_for = min(_LONGEST_ASIDE, max(_FIRST_ASIDE, 2 * place.aside_for))
        place.aside_until = time.monotonic() + place.aside_for
