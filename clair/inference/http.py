"""The HTTP client below openai's: it reads no reply without end, and goes to no other server than ours.

Imported when the first endpoint is opened, since httpx2 and openai take their time.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from openai import DefaultAioHttpClient

from clair.core.errors import one_line

MOST_BYTES = 32 * 2**20
"""The most that is read of a reply. One with the log-probs of 20 tokens for each of 16,000 has about as many."""
_TURNING_INTO_GET = (301, 302, 303)
"""Redirects after which the client above would send GET, without the prompt; 307 keeps method and body."""
_IN_URL = re.compile(r"(https?://)(?:[^\s/@'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\")]*)?")


class TooLarge(Exception):
    """A reply of more than MOST_BYTES; `beginning` is its first part."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__(f"the reply is larger than {MOST_BYTES // 2**20} MB")
        self.beginning = beginning


class Redirected(Exception):
    """The server sends us to another one, which would get headers and prompts."""

    def __init__(self, origin: str) -> None:
        super().__init__(f"redirects to {origin}, which is another server")


class GuardedClient(DefaultAioHttpClient):
    """openai's aiohttp client with a guard around each of its transports, a proxy's too."""

    def __init__(self, base: str, **options: Any) -> None:
        self._base = base
        super().__init__(**options)

    def _init_transport(self, **options: Any) -> httpx2.AsyncBaseTransport:
        return GuardedTransport(super()._init_transport(**options), self._base)

    def _init_proxy_transport(self, proxy: httpx2.Proxy, **options: Any) -> httpx2.AsyncBaseTransport:
        return GuardedTransport(super()._init_proxy_transport(proxy, **options), self._base)


class GuardedTransport(httpx2.AsyncBaseTransport):
    """A transport for one server. Whatever its answers do to the one inside is an httpx2.RequestError.

    A file of a Batch API is passed on as it comes, for the caller writes it to disk.
    """

    def __init__(self, inside: httpx2.AsyncBaseTransport, base: str) -> None:
        self._inside = inside
        self._origin = origin_of(base)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request. Raises Redirected, or an httpx2.RequestError; reading the response may raise TooLarge."""
        origin = origin_of(request.url)
        if origin != self._origin:  # a redirect: the client above never asks for another server
            raise Redirected(origin)
        try:
            response = await self._inside.handle_async_request(request)
        except httpx2.RequestError:
            raise
        except Exception as error:  # aiohttp has many for what is no HTTP, and does not promise which
            raise httpx2.RemoteProtocolError(_garbled(error)) from error
        if "/files/" in request.url.path:
            return response
        status = response.status_code
        if status in _TURNING_INTO_GET and "location" in response.headers:
            status = 307
        encoding = (b"content-encoding", b"content-length")
        headers = [(name, value) for name, value in response.headers.raw if name.lower() not in encoding]
        return httpx2.Response(status, headers=headers, stream=_Limited(response), extensions=response.extensions)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inside.aclose()


class _Limited(httpx2.AsyncByteStream):
    """The decoded content of a response, as far as MOST_BYTES."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size, beginning = 0, b""
        try:
            async for part in self._response.aiter_bytes():
                size, beginning = size + len(part), beginning or part[:2000]
                if size > MOST_BYTES:
                    raise TooLarge(beginning)
                yield part
        except (httpx2.RequestError, TooLarge):
            raise
        except Exception as error:
            raise httpx2.RemoteProtocolError(_garbled(error)) from error

    async def aclose(self) -> None:
        """Let the connection go."""
        await self._response.aclose()


def _garbled(error: Exception) -> str:
    return f"no HTTP answer: {one_line(getattr(error, 'message', '') or f'{type(error).__name__} {error}', 150)}"


def origin_of(address: str | httpx2.URL) -> str:
    """Scheme, host and port."""
    url = httpx2.URL(address)
    port = url.port or {"https": 443, "http": 80}.get(url.scheme)
    return f"{url.scheme}://{url.host}:{port}"


def without_queries(text: str) -> str:
    """The text with its URLs cut down to what may be written down: a query or a user name may be secret."""
    return _IN_URL.sub(r"\1\2", text)
