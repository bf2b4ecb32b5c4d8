"""Bytes that servers send: no answer ends a run, holds a try for ever or fills the memory, and none leads away."""

from __future__ import annotations

import asyncio
import gzip
import html
import json
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest

from clair.inference.http import requests as wire
from clair.inference.model import RateLimited, Refused, RequestFailed, Unreachable
from clair.inference.rate_limit import ServerQueue
from tests.clair.raw_server import GOOD, Answer, http, model_at, serving, writes
from tests.clair.virtual_time import now, run

REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


async def ask(*answers: Answer, query: str = "", timeout: float = 20.0) -> str:
    """The outcome of one request."""
    async with serving(*answers) as url, model_at(url + query, timeout=timeout) as model:
        return await asyncio.wait_for(model.complete(REQUEST), 60)


# ---- garbled answers

GARBLED = {
    "a length below nothing": http(b"{}", length=-5),
    "a length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
    "a header without end": http(GOOD, "X-Long: " + "a" * 200_000),
    "many headers": http(GOOD, *(f"X-{n}: a" for n in range(5000))),
    "a header that is none": b"HTTP/1.1 200 OK\r\nno header\r\n\r\n{}",
    "another protocol": b"SSH-2.0-OpenSSH_9\r\n",
    "a broken chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "half an answer": http(GOOD[:20], length=len(GOOD)),
    "nothing": b"",
    "a redirect to no address": http(b"", "Location: http://127.0.0.1:99999999/", status="307 X"),
    "an encoding that it is not in": http(GOOD, "Content-Encoding: gzip"),
}


@pytest.mark.parametrize("name", GARBLED)
def test_a_garbled_answer_fails_its_request_and_the_query_is_not_printed(name):
    with pytest.raises(Unreachable) as caught:
        asyncio.run(ask(writes(GARBLED[name]), query="?api-key=sk-secret-1"))
    assert "sk-secret-1" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.billed


WORDED = {
    b'{"error": "model is not loaded"}': "model is not loaded",
    b'{"detail": "model is not loaded"}': "model is not loaded",
    b'{"detail": [{"loc": ["body"], "msg": "model is not loaded", "input": "sk-1"}]}': "model is not loaded",
    b'{"message": "model is not loaded", "code": 7}': "model is not loaded",
    b'{"object": "model is not loaded"}': '{"object": "model is not loaded"}',
    b"model is not loaded": "model is not loaded",
    b"<html><head><title>x</title></head><body>model is <b>not</b> loaded</body></html>": "model is not loaded",
}


@pytest.mark.parametrize("body", WORDED)
@pytest.mark.parametrize("status", ["400 X", "402 X", "503 X"])
def test_an_errors_message_is_read_in_every_form(body, status):
    with pytest.raises((RequestFailed, Refused, Unreachable), match="model is") as caught:
        asyncio.run(ask(writes(http(body, status=status))))
    assert f"{status[:3]}: {WORDED[body]}" in str(caught.value)


@pytest.mark.parametrize(
    "body", [b'{"choices": null, "error": {"code": %s}}', b'{"choices": [], "error": {"code": %s}}']
)
@pytest.mark.parametrize(
    ("code", "kind"), [(b"402", Refused), (b'"insufficient_quota"', Refused), (b"429", RateLimited)]
)
def test_an_error_in_a_reply_of_status_200_means_what_its_code_says(body, code, kind):
    with pytest.raises(kind):
        asyncio.run(ask(writes(http(body % code))))


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}',
        b'{"error": {"message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}',
        b'{"code": "DataInspectionFailed", "message": "no"}',
        b'{"error": {"message": "Your prompt was flagged as violating our usage policy", "code": "invalid_prompt"}}',
        b'{"error": {"message": "The prompt is blocked due to safety", "status": "INVALID_ARGUMENT"}}',
        b'{"error": {"message": "no", "type": "content_filter"}}',
    ],
)
def test_a_content_filter_is_known_by_its_code_or_its_words(body):
    assert b"content_filter" in asyncio.run(ask(writes(http(body, status="400 Bad")))).encode()


def test_a_parameter_that_is_refused_is_no_content_filter():
    body = b'{"error": {"message": "Unsupported parameter: content_filter and safety_identifier"}}'
    with pytest.raises(RequestFailed) as caught:
        asyncio.run(ask(writes(http(body, status="400 Bad"))))
    assert (caught.value.reason, caught.value.moderated) == ("http_400", False)


SECRET = 'a+b/"se<ret>\\77'


@pytest.mark.parametrize(
    "form",
    [str, urllib.parse.quote, urllib.parse.quote_plus, html.escape, json.dumps, lambda s: json.dumps(json.dumps(s))],
)
def test_a_secret_is_redacted_in_each_form_in_which_a_server_may_repeat_it(form):
    async def error_text() -> str:
        echo = writes(http(f"<p>{form(SECRET)}</p>".encode(), status="500 X"))
        async with serving(echo) as url, model_at(url, secrets=[SECRET]) as model:
            with pytest.raises(Unreachable) as caught:
                await model.complete(REQUEST)
            return str(caught.value)

    assert asyncio.run(error_text()).replace('"', "").replace("\\", "").replace(" ", "") == "500:[secret]"


def test_an_unexpected_exception_is_a_failure_too(monkeypatch):
    async def odd(*_: Any) -> None:
        raise ZeroDivisionError("at http://me:word@h/v1/chat?api-key=sk-secret-1 in the parser")

    monkeypatch.setattr(wire.HttpClient, "request", odd)
    with pytest.raises(Unreachable, match="ZeroDivisionError: at http://h/v1/chat in the parser"):
        asyncio.run(ask(writes(http(GOOD))))


# ---- answers that do not end


async def trickle(writer: asyncio.StreamWriter) -> None:
    writer.write(http(b"", length=1000))
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


def test_the_timeout_is_that_of_the_whole_try():
    with pytest.raises(Unreachable, match="timeout") as caught:
        asyncio.run(ask(trickle, timeout=0.5))
    assert caught.value.busy
    assert caught.value.billed


def test_a_reply_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(wire, "MAX_REPLY_BYTES", 2**20)
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
            sent += 65536
            await writer.drain()

    with pytest.raises(RequestFailed, match="the reply is larger than 1 MB") as caught:
        asyncio.run(ask(endless))
    assert caught.value.reason == "malformed_reply"
    assert caught.value.raw == "a" * 2000
    assert sent < 50 * 2**20  # what the system's buffers hold


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "500 Internal Server Error"])
def test_a_small_reply_that_unpacks_to_a_large_one_is_not_unpacked_to_its_end(monkeypatch, status):
    monkeypatch.setattr(wire, "MAX_REPLY_BYTES", 2**20)
    packed = gzip.compress(b"a" * 2**24)
    with pytest.raises(RequestFailed, match="larger than 1 MB"):
        asyncio.run(ask(writes(http(packed, "Content-Encoding: gzip", status=status))))


def test_a_reply_may_begin_with_a_byte_order_mark():
    assert json.loads(asyncio.run(ask(writes(http(b"\xef\xbb\xbf" + GOOD)))))


def test_a_packed_reply_is_read():
    assert asyncio.run(ask(writes(http(gzip.compress(GOOD), "Content-Encoding: gzip")))) == GOOD.decode()


# ---- redirects


def redirect(to: str, status: int = 307) -> Answer:
    return writes(http(b"", f"Location: {to}", status=f"{status} Elsewhere"))


@pytest.mark.parametrize("status", [301, 307])
@pytest.mark.parametrize(
    "to", ["http://localhost:{port}/v1", "http://127.0.0.1:{other}/v1", "https://127.0.0.1:{port}/v1"]
)
def test_no_redirect_to_another_server_is_followed_and_it_is_reported(to, status):
    async def ask() -> list[str]:
        paths: list[str] = []
        async with serving(writes(http(GOOD)), path=paths) as second:
            location = to.format(port="{port}", other=second.split(":")[2].split("/")[0])

            async def lead_away(writer: asyncio.StreamWriter) -> None:
                port = writer.get_extra_info("sockname")[1]
                await redirect(location.format(port=port), status)(writer)

            async with serving(lead_away) as url, model_at(url) as model:
                with pytest.raises(Refused) as caught:
                    await model.check()
                origin = location.format(port=url.split(":")[2].split("/")[0]).removesuffix("/v1")
                assert f"{url} redirects to {origin}, which is another server" in str(caught.value)
                assert "put its address into the recipe" in str(caught.value)
        return paths

    assert asyncio.run(ask()) == []


def test_a_redirect_of_one_request_among_answered_ones_is_a_failure_of_that_one():
    async def ask() -> None:
        async with (
            serving(writes(http(GOOD)), redirect("http://127.0.0.2:9/login")) as url,
            model_at(url) as model,
        ):
            assert await model.complete(REQUEST) == GOOD.decode()
            with pytest.raises(RequestFailed, match=r"redirects to http://127\.0\.0\.2:9") as caught:
                await model.complete(REQUEST)
            assert caught.value.reason == "redirected"

    asyncio.run(ask())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_server_is_followed_with_the_prompt(status):
    paths: list[str] = []
    bodies: list[bytes] = []

    async def ask() -> str:
        answers = redirect("/v2/chat", status), writes(http(GOOD))
        async with serving(*answers, path=paths, bodies=bodies) as url, model_at(url) as model:
            return await model.complete(REQUEST)

    assert asyncio.run(ask()) == GOOD.decode()
    assert paths == ["POST /v1/chat/completions HTTP/1.1", "POST /v2/chat HTTP/1.1"]
    assert bodies[0] == bodies[1]
    assert json.loads(bodies[1])["messages"] == REQUEST["messages"]


# ---- turns at a server that answers few at once


async def finish_times(
    slots: int, seconds: Callable[[int], float], requests: int, timeout: float
) -> list[float | None]:
    """When each of some requests, sent at once, is answered; None where its time was over."""
    turns, server = ServerQueue(), asyncio.Semaphore(slots)

    async def send(number: int) -> float | None:
        try:
            async with turns.time_limit(timeout), server:
                await asyncio.sleep(seconds(number))
        except TimeoutError:
            return None
        return now()

    return await asyncio.gather(*(send(number) for number in range(requests)))


@pytest.mark.parametrize("slots", [1, 3])
def test_waiting_for_a_slot_at_the_server_is_no_failure(slots):
    times, _ = run(finish_times(slots, lambda _: 1.0, 60, timeout=2.5))
    assert times == pytest.approx([1 + number // slots for number in range(60)], abs=0.001)


def test_a_request_whose_turn_has_come_has_its_timeout_and_no_more():
    times, seconds = run(finish_times(1, lambda number: 1.0 if number < 5 else 1e6, 6, timeout=2.5))
    assert times[5] is None
    assert times[:5] == pytest.approx([1, 2, 3, 4, 5], abs=0.001)
    assert seconds == pytest.approx(7.5, abs=0.001)


def test_answers_to_later_requests_do_not_prolong_the_time_of_an_earlier_one():
    times, _ = run(finish_times(100, lambda number: 1e6 if number == 0 else 0.5 * number, 20, timeout=3.0))
    assert times[0] is None
    assert times[1:7] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], abs=0.001)


def test_a_server_that_answers_nobody_is_given_up_after_one_timeout():
    times, seconds = run(finish_times(1, lambda _: 1e6, 50, timeout=3.0))
    assert times == [None] * 50
    assert seconds == pytest.approx(3.0, abs=0.001)


def test_the_memory_of_answers_does_not_grow():
    async def work() -> int:
        turns, max_answers = ServerQueue(), 0
        for number in range(2000):
            async with turns.time_limit(1.0):
                await asyncio.sleep(0.001)
            max_answers = max(max_answers, len(turns._answers))
            assert turns._previous_answer_time(number + 1) == pytest.approx(now(), abs=0.0001)
        return max_answers

    assert run(work())[0] < 50
