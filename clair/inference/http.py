"""The HTTP client below the openai client: it limits the size of a reply and follows no redirect to another server.

It is imported when the first endpoint is opened, because httpx2 and openai are slow to import.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from openai import DefaultAioHttpClient

from clair.core.errors import one_line

MAX_REPLY_BYTES = 32 * 2**20
"""The maximal size of a reply. One with the log-probs of 20 tokens for each of 16,000 has about this size."""
_GET_REDIRECTS = (301, 302, 303)
"""Redirects after which the openai client would send GET without the prompt; 307 keeps method and body."""
_IN_URL = re.compile(r"(https?://)(?:[^\s/@'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\")]*)?")


class TooLarge(Exception):
    """A reply of more than MAX_REPLY_BYTES; `beginning` is its first chunk."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__(f"the reply is larger than {MAX_REPLY_BYTES // 2**20} MB")
        self.beginning = beginning


class Redirected(Exception):
    """A redirect to another server, which would receive headers and prompts."""

    def __init__(self, origin: str) -> None:
        super().__init__(f"redirects to {origin}, which is another server")


class GuardedClient(DefaultAioHttpClient):
    """The openai package's aiohttp client with a guard around each of its transports, a proxy's too."""

    def __init__(self, base: str, **options: Any) -> None:
        self._base = base
        super().__init__(**options)

    def _init_transport(self, **options: Any) -> httpx2.AsyncBaseTransport:  # pyright: ignore[reportIncompatibleMethodOverride]  # options go on as they are
        return GuardedTransport(super()._init_transport(**options), self._base)

    def _init_proxy_transport(self, proxy: httpx2.Proxy, **options: Any) -> httpx2.AsyncBaseTransport:  # pyright: ignore[reportIncompatibleMethodOverride]  # options go on as they are
        return GuardedTransport(super()._init_proxy_transport(proxy, **options), self._base)


class GuardedTransport(httpx2.AsyncBaseTransport):
    """A transport for one server. Every error of the inner transport becomes an httpx2.RequestError.

    A file of a Batch API is streamed without a limit, because the caller writes it to disk.
    """

    def __init__(self, inner: httpx2.AsyncBaseTransport, base: str) -> None:
        self._inner = inner
        self._origin = origin_of(base)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request. Raises Redirected, or an httpx2.RequestError; reading the response may raise TooLarge."""
        origin = origin_of(request.url)
        if origin != self._origin:  # a redirect: the openai client itself requests no other server
            raise Redirected(origin)
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.RequestError:
            raise
        except Exception as error:  # aiohttp raises many kinds for an invalid HTTP response
            raise httpx2.RemoteProtocolError(_invalid_http(error)) from error
        if "/files/" in request.url.path:
            return response
        status = response.status_code
        if status in _GET_REDIRECTS and "location" in response.headers:
            status = 307
        encoding = (b"content-encoding", b"content-length")
        headers = [(name, value) for name, value in response.headers.raw if name.lower() not in encoding]
        return httpx2.Response(status, headers=headers, stream=_LimitedStream(response), extensions=response.extensions)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()


class _LimitedStream(httpx2.AsyncByteStream):
    """The decoded content of a response, up to MAX_REPLY_BYTES."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size, beginning = 0, b""
        try:
            async for chunk in self._response.aiter_bytes():
                size, beginning = size + len(chunk), beginning or chunk[:2000]
                if size > MAX_REPLY_BYTES:
                    raise TooLarge(beginning)
                yield chunk
        except (httpx2.RequestError, TooLarge):
            raise
        except Exception as error:
            raise httpx2.RemoteProtocolError(_invalid_http(error)) from error

    async def aclose(self) -> None:
        """Close the connection."""
        await self._response.aclose()


def _invalid_http(error: Exception) -> str:
    return f"no HTTP answer: {one_line(getattr(error, 'message', '') or f'{type(error).__name__} {error}', 150)}"


def origin_of(address: str | httpx2.URL) -> str:
    """Scheme, host and port."""
    url = httpx2.URL(address)
    port = url.port or {"https": 443, "http": 80}.get(url.scheme)
    return f"{url.scheme}://{url.host}:{port}"


def without_queries(text: str) -> str:
    """The text with its URLs cut to their public part: a query or a user name may be secret."""
    return _IN_URL.sub(r"\1\2", text)
