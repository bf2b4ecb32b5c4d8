"""Several endpoints of the same model: requests go to the least loaded one; a dead one is tried again later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clair.core.progress import print_line
from clair.inference.model import Model, Refused, Unreachable

_FIRST_PAUSE = 2.0
_MAX_PAUSE = 60.0


@dataclass(slots=True)
class _Endpoint:
    model: Model
    in_flight: int = 0
    paused_until: float = 0.0
    pause_seconds: float = 0.0
    refused: bool = False
    """True if it refused its last request."""
    reported: bool = False
    """True if its refusal was printed."""


class EndpointPool:
    """Several endpoints as one model. The first URL gives its identity, unless the recipe gives an `id`."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._endpoints = [_Endpoint(model) for model in models]
        self.name = models[0].name
        self.identity = models[0].identity
        self.timeout = max(getattr(model, "timeout", 0.0) for model in models)

    async def check(self) -> None:
        """Check that at least one endpoint is there; others may come later. Raises the error of the last one."""
        results = await asyncio.gather(
            *(endpoint.model.check() for endpoint in self._endpoints), return_exceptions=True
        )
        for endpoint, result in zip(self._endpoints, results, strict=True):
            if isinstance(result, Refused | Unreachable):
                self._pause(endpoint)
            elif isinstance(result, BaseException):
                raise result
        failed = [result for result in results if isinstance(result, Refused | Unreachable)]
        if len(failed) == len(self._endpoints):
            raise next((error for error in failed if isinstance(error, Unreachable)), failed[-1])

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """Return the completion of the least loaded living endpoint.

        If it refuses and others do not, raises Unreachable, so that the request is sent again, to another one.
        """
        now = time.monotonic()
        living = [endpoint for endpoint in self._endpoints if endpoint.paused_until <= now]
        endpoint = (
            min(living, key=lambda e: e.in_flight) if living else min(self._endpoints, key=lambda e: e.paused_until)
        )
        endpoint.in_flight += 1
        try:
            raw = await endpoint.model.complete(request, sample)
        except (Unreachable, Refused) as error:
            self._pause(endpoint)
            endpoint.refused = isinstance(error, Refused)
            if not endpoint.refused or all(e.refused for e in self._endpoints):
                raise
            if not endpoint.reported:
                endpoint.reported = True
                print_line(f"{error}; its requests go to the other servers")
            raise Unreachable(str(error)) from error
        finally:
            endpoint.in_flight -= 1
        endpoint.pause_seconds, endpoint.refused = 0.0, False
        return raw

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(endpoint.model.close() for endpoint in self._endpoints))

    def _pause(self, endpoint: _Endpoint) -> None:
        endpoint.pause_seconds = min(_MAX_PAUSE, max(_FIRST_PAUSE, 2 * endpoint.pause_seconds))
        endpoint.paused_until = time.monotonic() + endpoint.pause_seconds
