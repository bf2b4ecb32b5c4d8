"""The health of a role's endpoint: its failures decide whether a request waits, fails, or ends the run."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from clair.core.progress import duration, print_line
from clair.inference.model import LimitReached, RateLimited, Refused, RequestFailed, Unreachable

_SAME_REFUSALS = 5  # refusals in the same words, before any answer, after which all other requests would be refused too
_MAX_MESSAGES = 5  # different messages of a server that are printed; the progress bar shows the last one


@dataclass
class EndpointHealth:
    """The endpoint of a role, from the answers and failures of its requests."""

    role: str
    url: str
    """Its public URL; the name of a model that has none."""
    patience: float = 300.0
    """Seconds without any answer, while requests fail, after which the endpoint counts as dead. Also the longest time
    that it may ask to wait."""
    answered: bool = False
    """True after its first answer."""
    message: str = ""
    """The server's reason to wait; empty once it has answered again."""
    _failing_since: float | None = None
    _refusals: dict[str, list[RequestFailed]] = field(default_factory=dict)
    _printed: set[str] = field(default_factory=set)

    def recover(self) -> None:
        """Record that the endpoint is there."""
        self._failing_since, self.message = None, ""

    def fail(self, sent: float) -> None:
        """Record that a request failed, sent at monotonic time `sent`."""
        self._failing_since = self._failing_since or sent

    def wait(self, error: RateLimited | Unreachable, sent: float) -> None:
        """Record that the server asks to wait; print each of its messages once."""
        self.fail(sent)
        self.message = str(error)
        pattern = re.sub(r"[\d.]+", "#", self.message)  # `try again in 1.2 s`
        if pattern not in self._printed and len(self._printed) < _MAX_MESSAGES:
            self._printed.add(pattern)
            seconds = getattr(error, "retry_after", None)
            print_line(
                f"{self.role}: the server says {self.message}" + (f"; wait for {duration(seconds)}" if seconds else "")
            )

    def is_waiting(self, error: Exception) -> bool:
        """True if the request only waits (for the rate limit, for a connection, or until the server is up): no try."""
        if isinstance(error, RateLimited):
            return not error.in_body
        return isinstance(error, Unreachable) and (error.waiting or (error.starting and not self.answered))

    # ---- errors that end the run

    def dead(self, error: Exception) -> Refused | None:
        """The error that ends the run if nothing was answered for longer than `patience`; else None."""
        silent = self._silent_seconds()
        return self._unreachable(silent, error) if silent > self.patience else None

    def out_of_patience(self, error: Exception, in_flight: int) -> Refused | None:
        """The error that ends the run if the server asks to wait longer than `patience`; else None.

        While other requests are in flight, silence alone does not end the run.
        """
        retry_after, silent = getattr(error, "retry_after", None) or 0.0, self._silent_seconds()
        if retry_after <= self.patience and (silent <= self.patience or in_flight):
            return None
        if not isinstance(error, RateLimited):
            return self._unreachable(silent, error)
        wait = f"asks to wait for {duration(retry_after)}"
        reason = wait if retry_after > self.patience else f"refuses since {duration(silent)}"
        end = time.strftime("after %Y-%m-%d %H:%M", time.localtime(time.time() + retry_after))
        return LimitReached(
            f"{self.role}: the server {reason} ({error}), and {self.role}.patience is {self.patience:g} s; every reply "
            f"so far is kept: run the same command again {end if retry_after else 'when the limit is over'}"
        )

    def add_refusal(self, error: RequestFailed) -> Refused | None:
        """Count a refused request; the error that ends the run if the first ones were all refused in the same words."""
        if self.answered or error.moderated or not error.reason.startswith("http_"):
            return None
        refusals = self._refusals.setdefault(re.sub(r"\d+", "#", error.detail), [])
        refusals.append(error)
        return self._refuses_all(refusals) if len(self._refusals) == 1 and len(refusals) >= _SAME_REFUSALS else None

    def check_refusals(self) -> None:
        """Raise Refused if a whole run was refused in the same words: then key or recipe are wrong, not a request."""
        for refusals in self._refusals.values():
            enough = 1 if _refuses_key(refusals) else 2
            if not self.answered and len(self._refusals) == 1 and len(refusals) >= enough:
                raise self._refuses_all(refusals)

    def _silent_seconds(self) -> float:
        """Seconds since requests began to fail; 0 if the last one was answered."""
        return time.monotonic() - (self._failing_since or time.monotonic())

    def _unreachable(self, silent: float, error: Exception) -> Refused:
        return Refused(
            f"{self.role}: no answer for {silent:.0f} s ({error}); everything paid for is kept, run the same command "
            f"again when the endpoint is back"
        )

    def _refuses_all(self, refusals: list[RequestFailed]) -> Refused:
        if _refuses_key(refusals):
            problem, advice = "refuses the key", "check api_key_env and the variable it names"
        else:
            problem = f"refuses every request ({len(refusals)} of {len(refusals)})"
            advice = "correct the recipe; no request was answered"
        return Refused(f"{self.role}: {self.url} {problem} ({refusals[0].detail}); {advice}")


def _refuses_key(refusals: list[RequestFailed]) -> bool:
    return refusals[0].reason == "http_403"
