"""Requests to one server over aiohttp: a reply of limited size, and no redirect to another server.

A request has the method, path, query, body and headers that the openai library sends. That library spends three times
the processor time on a request, and its import takes longer than aiohttp's; only the Batch API uses it.

This module is imported when the first endpoint is opened, because aiohttp is slow to import.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NamedTuple
from urllib.parse import urlencode

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from clair.core.errors import one_line

CONNECT_SECONDS = 15.0
MAX_REPLY_BYTES = 32 * 2**20
"""The maximal size of a reply. One with the log-probs of 20 tokens for each of 16,000 has about this size."""
_IDLE_SECONDS = 5.0
"""Seconds after which an idle connection is closed: many servers close theirs after five."""
_LOG = logging.getLogger("clair.http")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 20
_IN_URL = re.compile(r"(https?://)(?:[^\s/@'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\")]*)?")


class TooLarge(Exception):
    """A reply of more than MAX_REPLY_BYTES; `beginning` is its first part."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__(f"the reply is larger than {MAX_REPLY_BYTES // 2**20} MB")
        self.beginning = beginning


class Redirected(Exception):
    """A redirect to another server, which would receive headers and prompts."""

    def __init__(self, origin: str) -> None:
        super().__init__(f"redirects to {origin}, which is another server")


class InvalidResponse(aiohttp.ClientError):
    """A response that is not HTTP."""


class HttpResponse(NamedTuple):
    """A response that was read to its end; `content` is decompressed."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    charset: str | None

    def error(self) -> Any:
        """The `error` object of an error response, or else its whole JSON value, or else its text."""
        encoding = "utf-8"
        with suppress(LookupError):
            encoding = codecs.lookup(self.charset or encoding).name
        text = self.content.decode(encoding, "replace").strip()
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return body.get("error", body) if isinstance(body, dict) else body


class HttpClient:
    """The connections to one server. Close it in the event loop that used it."""

    def __init__(self, base: str, headers: Sequence[Mapping[str, str]], query: Mapping[str, str]) -> None:
        """`headers` and `query` are sent with every request; a later mapping overrides an earlier one."""
        self._base, self._query = base, f"?{urlencode(query)}" if query else ""
        self._origin = origin_of(base)
        self._headers = CIMultiDict(
            {
                "Accept": "application/json",
                "Content-Type": "application/json",
                "Connection": "keep-alive",
                "User-Agent": f"clair-apo/{version('clair-apo')}",
            }
        )
        for name, value in (item for mapping in headers for item in mapping.items()):
            self._headers[name] = value
        self._headers_without_content = self._headers.copy()
        del self._headers_without_content["Content-Type"]
        self._session: aiohttp.ClientSession | None = None

    async def request(self, method: str, path: str, content: bytes | None) -> HttpResponse:
        """Send one request, `content` as JSON; redirects within the server keep method and content.

        Raises Redirected, TooLarge, or an aiohttp.ClientError.
        """
        if self._session is None:
            self._session = self._open()
        url = URL(f"{self._base}{path}{self._query}")
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                response, location = await self._send(self._session, method, url, content)
                if location is None:
                    return response
                url = url.join(URL(location))
                if origin_of(url) != self._origin:
                    raise Redirected(origin_of(url))
        except (Redirected, TooLarge):
            raise
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientHttpProxyError):
            raise
        except Exception as error:  # aiohttp raises many kinds for an invalid HTTP response
            raise InvalidResponse(invalid_http(error)) from error
        raise InvalidResponse(f"more than {_MAX_REDIRECTS} redirects")

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _send(
        self, session: aiohttp.ClientSession, method: str, url: URL, content: bytes | None
    ) -> tuple[HttpResponse, str | None]:
        """One response, and the location to which it redirects, if it does."""
        # Headers of the session would go to a proxy too, the key among them.
        headers = self._headers_without_content if content is None else self._headers
        response = await session.request(method, url, data=content, headers=headers, allow_redirects=False)
        _LOG.info('HTTP Request: %s %s "%d"', method, self._base, response.status)
        try:
            if response.status in _REDIRECTS and (location := response.headers.get("Location")) is not None:
                return HttpResponse(response.status, response.headers, b"", None), location
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise TooLarge(bytes(body[:2000]))
            return HttpResponse(response.status, response.headers, bytes(body), response.charset), None
        finally:
            response.close()  # a response that was read to its end has given its connection back

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,  # the limiter decides the number of connections, and a second limit would hide its effect
            keepalive_timeout=_IDLE_SECONDS,
            ssl=_trusted_certificates() if self._base.startswith("https:") else True,
        )
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS)  # the caller limits the time of a request
        return aiohttp.ClientSession(connector=connector, timeout=timeout, proxy=_environment_proxy(URL(self._base)))


def _trusted_certificates() -> Any:
    """The certificates that the openai library trusts."""
    import httpx2

    return httpx2.create_ssl_context()


def _environment_proxy(url: URL) -> str | None:
    """The proxy that the environment names for a URL (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(f"{url.host}:{url.port}"):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def openai_headers() -> dict[str, str]:
    """The headers that the openai library takes from the environment."""
    names = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    headers = {header: os.environ[name] for header, name in names.items() if name in os.environ}
    lines = (line.partition(":") for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n"))
    return headers | {name.strip(): value.strip() for name, colon, value in lines if colon}


def invalid_http(error: Exception) -> str:
    """The message of an error that aiohttp raises for an invalid response."""
    return f"no HTTP answer: {one_line(getattr(error, 'message', '') or f'{type(error).__name__} {error}', 150)}"


def origin_of(address: str | URL) -> str:
    """Scheme, host and port."""
    url = URL(address)
    return f"{url.scheme}://{url.host}:{url.port}"


def without_queries(text: str) -> str:
    """The text with its URLs cut to their public part: a query or a user name may be secret."""
    return _IN_URL.sub(r"\1\2", text)
