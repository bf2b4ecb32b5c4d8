"""Requests and errors are those of the openai library, which a request for a chat completion does not use."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from clair.inference.http import openai_library
from clair.inference.http import requests as wire
from clair.inference.openai import OpenAIModel
from tests.clair.raw_server import GOOD, Answer, http, model_at, serving, writes

MESSAGES = [{"role": "system", "content": 'a "b" \\ \n\u2028 é 漢 😀'}, {"role": "user", "content": "Hello"}]
REQUEST: dict[str, Any] = {
    "messages": MESSAGES,
    "temperature": 0.7,
    "max_tokens": 12,
    "seed": None,
    "stop": ["\n\n", "é"],
    "top_k": 20,  # no parameter of the library's own
    "chat_template_kwargs": {"enable_thinking": False},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
}
CLIENTS = ("own", "openai")


async def send(model: OpenAIModel, client: str, request: dict[str, Any] = REQUEST) -> None:
    """One chat completion: by our own client, or by the openai library's."""
    if client == "own":
        await model.complete(request)
        return
    body = model.body({"model": model.name, **request})
    await model.call(lambda openai: openai.post("/chat/completions", cast_to=httpx2.Response, body=body))


# ---- requests


def meaningful(head: str) -> tuple[str, dict[str, str]]:
    """The request line, and the headers apart from the library's reports on itself, and from the compressions known."""
    line, *headers = head.rstrip().split("\r\n")
    by_name = {name.lower(): value for name, _, value in (header.partition(": ") for header in headers)}
    names = [name for name in by_name if not name.startswith("x-stainless-")]
    return line, {name: by_name[name] for name in names if name not in ("user-agent", "accept-encoding")}


SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {  # the URL's end, options, the environment
    "nothing": ("", {}, {}),
    "a key": ("", {"key": "sk-test-1234"}, {}),
    "a slash at the end": ("/", {}, {}),
    "a query": ("?api-version=2026-01-01&deployment=a%20b%2Bc/d%C3%A9&empty=", {}, {}),
    "a path to escape": ("/a b/é/%41%2F", {}, {}),
    "headers": ("", {"headers": {"X-Title": "mine", "accept": "*/*", "Content-Type": "application/json; v=1"}}, {}),
    "a header in place of the key": ("", {"key": "sk-test-1234", "headers": {"authorization": "${TOKEN_A}"}}, {}),
    "the environment": ("", {}, {"OPENAI_ORG_ID": "org-1", "OPENAI_PROJECT_ID": "proj-1"}),
    "headers of the environment": (
        "",
        {"headers": {"X-Title": "mine"}},
        {"OPENAI_CUSTOM_HEADERS": "x-title: theirs\nX-Other:  a: b \nno header\nAuthorization: Custom abc"},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_request_equals_the_openai_librarys_byte_for_byte(name, monkeypatch):
    end, options, environment = SETTINGS[name]
    for variable, value in ({"TOKEN_A": "Token abc"} | environment).items():
        monkeypatch.setenv(variable, value)

    async def record(ask: Callable[[OpenAIModel], Any], answer: bytes) -> tuple[Any, bytes]:
        heads: list[str] = []
        bodies: list[bytes] = []
        async with serving(writes(http(answer)), heads=heads, bodies=bodies) as url:
            port = url.split(":")[2].split("/")[0]
            async with model_at(url + end, **options) as model:
                await ask(model)
        (head,), (body,) = heads, bodies
        return meaningful(head.replace(port, "PORT")), body

    own, library = (asyncio.run(record(lambda model, c=client: send(model, c), GOOD)) for client in CLIENTS)
    assert own == library
    assert own[0][0].startswith("POST /v1")
    assert own[0][1]["authorization"]

    def create(model: OpenAIModel) -> Any:
        extra = {key: REQUEST[key] for key in ("top_k", "chat_template_kwargs")}
        known = {key: value for key, value in REQUEST.items() if key not in extra}
        return model.call(lambda client: client.chat.completions.create(model=model.name, **known, extra_body=extra))

    head, body = asyncio.run(record(create, GOOD))
    assert own[0][0] == head[0]
    assert json.loads(own[1]) == json.loads(body)
    listing = b'{"data": [{"id": "m"}]}'
    own = asyncio.run(record(lambda model: model.model_names(), listing))
    library = asyncio.run(record(lambda model: model.call(lambda client: client.models.list()), listing))
    assert own == library
    assert own[0][0].startswith("GET /v1")


# ---- errors


def error(status: str, body: bytes = b'{"error": {"message": "no", "code": "c"}}', *headers: str) -> Answer:
    return writes(http(body, *headers, status=status))


STATUSES = ("304 X", "307 X", "400 X", "401 X", "402 X", "403 X", "404 X", "408 X", "409 X", "422 X", "425 X", "451 X")
ERRORS: dict[str, Answer] = {
    **{status: error(status) for status in (*STATUSES, "500 X", "502 X", "503 X", "529 X", "600 X", "429 X")},
    "429 with a time": error("429 X", b"{}", "Retry-After: 7"),
    "429 with milliseconds": error("429 X", b"{}", "retry-after-ms: 1500", "Retry-After: 7"),
    "429 without quota": error("429 X", b'{"error": {"code": "insufficient_quota"}}'),
    "a list": error("400 X", b'[{"msg": "no"}]'),
    "no JSON": error("400 X", b" <b>no</b> way "),
    "nothing": error("400 X", b""),
    "deep JSON": error("400 X", b"[" * 100_000),
    "an error that is a text": error("400 X", b'{"error": "no"}'),
    "another charset": error("400 X", "größer".encode("latin-1"), "Content-Type: text/plain; charset=latin-1"),
    "an unknown charset": error("400 X", "größer".encode(), "Content-Type: text/plain; charset=of-mine"),
    "not UTF-8": error("400 X", b"gr\xff\xfe"),
    "compressed": error("400 X", gzip.compress(b'{"error": {"message": "no"}}'), "Content-Encoding: gzip"),
    "filtered": error("400 X", b'{"error": {"message": "no", "type": "content_filter"}}'),
    "moderated": error("403 X", b'{"error": {"message": "flagged"}}'),
    "a redirect without end": error("307 X", b"", "Location: /v1/again"),
    "a redirect to another server": error("301 X", b"", "Location: http://127.0.0.2:9/v1?key=abc"),
    "too large": writes(http(b"a" * 3000)),
    "too large an error": writes(http(b"a" * 3000, status="400 X")),
}
BROKEN: dict[str, Answer] = {  # the libraries word these differently
    "no connection header": writes(b"HTTP/1.1 200 OK\r\n"),
    "another protocol": writes(b"SSH-2.0-OpenSSH_9\r\n"),
    "closed": writes(b""),
    "half": writes(http(GOOD[:20], length=len(GOOD))),
    "a broken chunk": writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
    "no gzip": writes(http(GOOD, "Content-Encoding: gzip")),
    "a length that is none": writes(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}"),
}


async def failure(url: str, client: str) -> BaseException:
    """The error of one request; a filtered prompt is an outcome, and raises nothing from `complete`."""
    async with model_at(url, key="sk-test-1234") as model:
        try:
            if client == "own":
                await model._send("POST", "/chat/completions", b"{}")
            else:
                await model.call(lambda openai: openai.post("/chat/completions", cast_to=httpx2.Response, body={}))
        except Exception as error:
            return error
    pytest.fail("no error")


async def failures(answer: Answer) -> list[BaseException]:
    """The errors of both clients, each on its own connection to the same server."""
    async with serving(answer) as url:
        return [await failure(url, client) for client in CLIENTS]


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_has_the_class_the_words_and_the_attributes_of_the_librarys(name, monkeypatch):
    monkeypatch.setattr(wire, "MAX_REPLY_BYTES", 2500 if "large" in name else 2**20)
    own, library = asyncio.run(failures(ERRORS[name]))
    assert (type(own), vars(own)) == (type(library), vars(library))
    if name != "a redirect without end":
        assert str(own) == str(library)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_has_the_class_and_the_attributes_of_the_librarys(name):
    own, library = asyncio.run(failures(BROKEN[name]))
    assert (type(own), vars(own)) == (type(library), vars(library))
    assert vars(own) == {"billed": True, "busy": False, "waiting": False, "starting": False}


def test_a_refused_connection_was_never_sent_and_is_worded_as_before():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    own, library = (asyncio.run(failure(url, client)) for client in CLIENTS)
    assert (type(own), vars(own), str(own)) == (type(library), vars(library), str(library))
    assert not vars(own)["billed"]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_accepts_no_connection_is_busy_and_bills_nothing(client, monkeypatch):
    for module in (wire, openai_library):
        monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for filler in waiting:  # the system completes one or two, and drops what comes after
            filler.setblocking(False)
            filler.connect_ex(address)
        caught = asyncio.run(failure(f"http://127.0.0.1:{address[1]}/v1", client))
        for filler in waiting:
            filler.close()
    assert str(caught) == "timeout"
    assert vars(caught) == {"billed": False, "busy": True, "waiting": False, "starting": False}


# ---- proxies


@pytest.mark.filterwarnings("ignore:BasicAuth is deprecated", "ignore:The 'proxy_auth' parameter")  # of the library
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_the_proxy_of_the_environment_is_used(client, variable, monkeypatch):
    heads: list[str] = []

    async def ask() -> None:
        async with serving(writes(http(GOOD)), heads=heads) as proxy:
            monkeypatch.setenv(variable, proxy.removesuffix("/v1").replace("//", "//me:word@"))
            async with model_at("http://models.invalid:81/v1") as model:
                await send(model, client)
            monkeypatch.setenv("no_proxy", "models.invalid")
            async with model_at("http://models.invalid:81/v1") as model:
                with pytest.raises(Exception, match=r"models\.invalid"):
                    await send(model, client)

    asyncio.run(ask())
    (head,) = heads
    line, headers = meaningful(head)
    assert line == "POST http://models.invalid:81/v1/chat/completions HTTP/1.1"
    assert headers["proxy-authorization"] == f"Basic {base64.b64encode(b'me:word').decode()}"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_proxy_before_an_encrypted_server_gets_neither_key_nor_prompt(client, monkeypatch):
    heads: list[str] = []

    async def ask() -> None:
        async with serving(writes(http(b"", status="403 No")), heads=heads) as proxy:
            monkeypatch.setenv("https_proxy", proxy.removesuffix("/v1"))
            headers = {"X-Private": "${TOKEN_A}"}
            monkeypatch.setenv("TOKEN_A", "token-12345")
            async with model_at("https://models.invalid/v1", key="sk-test-1234", headers=headers) as model:
                with pytest.raises(Exception, match="403"):
                    await send(model, client)

    asyncio.run(ask())
    assert heads[0].startswith("CONNECT models.invalid:443 HTTP/1.1\r\n")
    assert not any(secret in "".join(heads) for secret in ("sk-test-1234", "token-12345", "Hello"))
