"""The openai client, which the Batch API uses: replies of limited size, and no redirect to another server.

It is imported when a batch is sent, because httpx2 and openai are slow to import.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
from openai import AsyncOpenAI, DefaultAioHttpClient

from clair.core.urls import public_url
from clair.inference.http import requests
from clair.inference.http.requests import CONNECT_SECONDS, Redirected, TooLarge, invalid_http, origin_of

_GET_REDIRECTS = (301, 302, 303)
"""Redirects after which the openai client would send GET without the prompt; 307 keeps method and body."""


def openai_client(
    base: str, *, key: str, headers: Mapping[str, str], query: Mapping[str, str], timeout: float
) -> AsyncOpenAI:
    """An openai client without retries; `headers` and `query` are sent with every request."""
    logging.getLogger("httpx2").addFilter(_WITHOUT_QUERIES)
    limit = httpx2.Timeout(timeout, connect=CONNECT_SECONDS)
    limits = httpx2.Limits(max_connections=0, max_keepalive_connections=None)  # for aiohttp, 0 means no limit
    return AsyncOpenAI(
        base_url=base,
        api_key=key,
        default_headers=headers,
        default_query=query,
        max_retries=0,
        timeout=limit,
        http_client=GuardedClient(base, timeout=limit, limits=limits),
    )


class _WithoutQueries(logging.Filter):
    """Remove queries from the URLs that httpx2 logs: a query may hold a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(public_url(str(a)) if type(a).__name__ == "URL" else a for a in record.args)
        return True


_WITHOUT_QUERIES = _WithoutQueries()


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
        origin = origin_of(str(request.url))
        if origin != self._origin:  # a redirect: the openai client itself requests no other server
            raise Redirected(origin)
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.RequestError:
            raise
        except Exception as error:  # aiohttp raises many kinds for an invalid HTTP response
            raise httpx2.RemoteProtocolError(invalid_http(error)) from error
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
                if size > requests.MAX_REPLY_BYTES:
                    raise TooLarge(beginning)
                yield chunk
        except (httpx2.RequestError, TooLarge):
            raise
        except Exception as error:
            raise httpx2.RemoteProtocolError(invalid_http(error)) from error

    async def aclose(self) -> None:
        """Close the connection."""
        await self._response.aclose()
