"""Secrets: a key from the environment, a password in a URL, a `${NAME}` header. None is written down or printed."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path

import pytest

from clair.core.urls import parse_endpoint, without_secrets
from clair.reporting.review import fingerprint
from tests.clair.building import CommandResult, clair, drops, pairs, scripted_rows, write_prompts, write_recipe

KEY = "sk-planted-key-4f5e6d"
PASSWORD = "planted/pass word-77"
QUOTED = "planted%2Fpass%20word-77"
USER = "planted-user-88"
HEADER = "planted-header-99"
QUERY = "planted-query-55"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = (KEY, PASSWORD, QUOTED, USER, HEADER, QUERY, BASIC)


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", KEY)
    monkeypatch.setenv("PLANTED_HEADER", HEADER)


def recipe(tmp_path: Path, url: str, scripts: list[str]) -> Path:
    """A recipe with all kinds of secrets: a key for the target, a password for the reviser, headers for both.

    The reviser follows a script that begins with `m`, since its row has an answer; the target the others.
    """
    rows = []
    for n, script in enumerate(scripts):
        answer = {"answer": "bad"} if script.startswith("m ") else {}
        rows.append({"id": n, "prompt": f"Task {n} [[{script.removeprefix('m ')}]]"} | answer)
    write_prompts(tmp_path / "prompts.jsonl", rows)
    extra = {"headers": {"X-Secret": "${PLANTED_HEADER}", "X-Mixed": "Token ${PLANTED_HEADER};"}}
    with_password = url.replace("http://", f"http://{USER}:{QUOTED}@") + f"?api-key={QUERY}"
    target = {"url": url, "model": "t", "api_key_env": "PLANTED_KEY", "extra": extra}
    reviser = {"url": with_password, "model": "m", "extra": extra}
    return write_recipe(tmp_path, url, target=target, reviser=reviser, attempts=1)


def assert_nowhere(tmp_path: Path, *results: CommandResult) -> int:
    """No file under out/ and no output holds a secret. Returns the number of files checked."""
    count = 0
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            count += 1
            for secret in SECRETS:
                assert secret.encode() not in content, (file, secret)
    for end in results:
        for secret in SECRETS:
            assert secret not in end.out + end.err, secret
    return count


def decisions(out: Path) -> Path:
    """A decisions file that keeps everything."""
    file = out / "decisions.json"
    dataset = fingerprint(json.loads((out / "manifest.json").read_text()))
    file.write_text(json.dumps({"format": 1, "dataset": dataset, "decisions": {}}))
    return file


def test_secrets_reach_the_endpoint_and_nothing_else(tmp_path, server, secrets, caplog):
    caplog.set_level(logging.DEBUG)
    file = recipe(tmp_path, server.url, ["ok", "ok", "400", "m html", "m drop", "m tool"])
    out = tmp_path / "out"
    dry, probed, built = (
        clair("build", file, "--dry-run"),
        clair("estimate", file, "--probe", "3"),
        clair("build", file),
    )
    results = clair("stats", out), clair("show", out), clair("report", out), clair("push", out, "org/name")
    handed = (
        clair("export", out, out / "pairs.jsonl"),
        clair("next", out, "--model", "runs/tuned", "--out", out / "round-2"),
        clair("keep", out, decisions(out), "--out", out / "kept"),
    )
    assert [dry.code, probed.code, built.code] == [0, 0, 3]
    assert [result.code for result in (*results, *handed)] == [0] * 7
    assert assert_nowhere(tmp_path, dry, probed, built, *results, *handed) >= 15
    assert "HTTP Request: POST" in caplog.text
    assert not [secret for secret in SECRETS if secret in caplog.text]
    sent = {}
    for request in server.requests():
        headers = {name.lower(): value for name, value in request["headers"].items()}
        assert headers["x-secret"] == HEADER
        assert headers["x-mixed"] == f"Token {HEADER};"
        sent[request["body"]["model"]] = headers["authorization"], request["query"]
    assert sent == {"t": (f"Bearer {KEY}", ""), "m": (f"Basic {BASIC}", f"api-key={QUERY}")}


def test_a_server_that_echoes_what_it_was_sent_betrays_nothing(tmp_path, server, secrets):
    """Errors that end the run, and errors of one row, which dropped.jsonl and the ledger store."""
    result = clair("build", recipe(tmp_path, server.url, ["ok", "echo400", "m echo400", "echo200", "m echo200"]))
    assert result.code == 3
    dropped = drops(tmp_path / "out")
    assert [(row["stage"], row["reason"]) for row in dropped] == [
        ("target", "http_400"),
        ("reviser", "http_400"),
        ("target", "malformed_reply"),
        ("reviser", "malformed_reply"),
    ]
    assert all("[secret]" in row["detail"] for row in dropped)
    assert_nowhere(tmp_path, result)
    for script in ("echo401", "m echo401", "echo404", "m echo404"):
        result = clair("build", recipe(tmp_path, server.url, [script]))
        assert result.code == 2
        assert "Wrong credentials" in result.err
        assert "[secret]" in result.err
        assert_nowhere(tmp_path, result)


def test_a_url_that_cannot_be_reached_is_reported_without_its_password(tmp_path, secrets):
    for url in ("http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"):
        result = clair("build", recipe(tmp_path, url, ["ok"]))
        assert result.code == 2
        assert url in result.err
        assert_nowhere(tmp_path, result)


def test_an_invalid_url_is_reported_without_its_password(tmp_path, secrets):
    url = f"ftp://{USER}:{QUOTED}@host/v1"
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    result = clair("build", write_recipe(tmp_path, url))
    assert result.code == 2
    assert "ftp://host/v1" in result.err
    assert_nowhere(tmp_path, result)


@pytest.mark.parametrize("setting", ["reviser.temprature=1", "reviser.timeout=no", "reviser.extra.headers.X-Key=abc"])
def test_a_wrong_recipe_is_reported_without_its_secrets(tmp_path, server, secrets, setting):
    result = clair("build", recipe(tmp_path, server.url, ["ok"]), "--set", setting)
    assert result.code == 2
    assert_nowhere(tmp_path, result)


def test_a_short_secret_is_not_searched_in_every_word(tmp_path, server, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", "a")
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["400"]))
    reviser = {"url": server.url, "model": "m", "api_key_env": "PLANTED_KEY"}
    assert clair("build", write_recipe(tmp_path, server.url, reviser=reviser)).code == 3
    assert "This prompt is too long." in (tmp_path / "out" / "dropped.jsonl").read_text()


HIDDEN = {
    "api_key": "planted-one-11",
    "extra_headers": {"Authorization": "Token planted-two-22", "X-Note": "Bearer planted-three-33"},
    "headers": {"X-Auth": "planted-four-44"},
    "metadata": {"auth": {"user": "planted-five-55"}, "note": "with sk-planted6 in it", "list": ["sk-planted-seven"]},
    "client_secret": "short8",
}
OPEN = {"eos_token": "<|end|>", "prompt_cache_key": "cache-of-mine", "stop": ["Basic sums"], "seed": 7}


def test_secrets_under_other_names_are_in_nothing_that_is_written(tmp_path, server, caplog):
    caplog.set_level(logging.DEBUG)
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok", "400"]))
    reviser = {"url": server.url + "?api-version=2024-06-01&code=a&token=planted-eight", "model": "m"}
    file = write_recipe(tmp_path, server.url, reviser=reviser | {"extra": HIDDEN | OPEN})
    results = [clair("build", file, "--dry-run"), clair("build", file), clair("push", tmp_path / "out", "org/name")]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix != ".sqlite"]
    assert len(written) >= 6
    texts = [end.out + end.err for end in results] + [path.read_bytes().decode("utf-8", "replace") for path in written]
    for secret in ("planted", "short8"):
        assert not [text for text in texts if secret in text]
    assert "planted" not in caplog.text
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())["reviser"]
    assert {name: recipe["extra"][name] for name in OPEN} == OPEN
    assert recipe["extra"]["metadata"]["note"] == "with [secret] in it"
    assert recipe["url"] == server.url + "?api-version=2024-06-01&code=a"
    sent = server.requests()[0]
    assert {name: sent["body"][name] for name in HIDDEN if name != "headers"} == {
        name: value for name, value in HIDDEN.items() if name != "headers"
    }
    assert {name.lower(): value for name, value in sent["headers"].items()}["x-auth"] == "planted-four-44"
    assert "token=planted-eight" in sent["query"]


def test_secrets_of_the_environment_in_extra_and_in_a_query_are_sent_and_written_nowhere(tmp_path, server, secrets):
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "What is ${PLANTED_KEY}? [[ok echo400]]", "answer": "bad"}])
    url = server.url + "?pass=${PLANTED_KEY}"
    extra = {"user": "${PLANTED_HEADER}", "metadata": {"who": ["me ${PLANTED_HEADER}"]}}
    result = clair("build", write_recipe(tmp_path, server.url, reviser={"url": url, "model": "m", "extra": extra}))
    assert result.code == 0
    assert_nowhere(tmp_path, result)
    (sent,) = server.requests()
    assert sent["query"] == f"pass={KEY}"
    assert (sent["body"]["user"], sent["body"]["metadata"]) == (HEADER, {"who": [f"me {HEADER}"]})
    assert "What is ${PLANTED_KEY}?" in sent["body"]["messages"][0]["content"]


@pytest.mark.parametrize("extra", [{"user": "${NO_SUCH_NAME}"}, {"api_key": "[secret]"}])
def test_an_unset_variable_and_a_redacted_secret_are_reported_before_any_request(tmp_path, server, extra):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    result = clair(
        "build", write_recipe(tmp_path, server.url, reviser={"url": server.url, "model": "m", "extra": extra})
    )
    assert (result.code, server.requests()) == (2, [])
    assert f"reviser.extra.{next(iter(extra))}" in result.err


def test_a_key_written_instead_of_its_variables_name_is_not_repeated(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    reviser = {"url": server.url, "model": "m", "api_key_env": "sk-planted-nine"}
    result = clair("build", write_recipe(tmp_path, server.url, reviser=reviser))
    assert result.code == 2
    assert "api_key_env" in result.err
    assert "planted" not in result.err


def test_an_answer_is_kept_as_it_was_sent_whatever_the_secrets_are(tmp_path, server, monkeypatch):
    """Keys that are words, short or long, values of headers, of a query: none of them is cut out of a reply."""
    monkeypatch.setenv("PLANTED_KEY", "answers-of-mine")
    monkeypatch.setenv("PLANTED_HEADER", "test")
    text = "a bad test of answers-of-mine on 2024-06-01"
    write_prompts(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say it", "answer": text}])
    extra = {"headers": {"X-Team": "${PLANTED_HEADER}"}}
    url = server.url + "?api-version=2024-06-01"
    reviser = {"url": url, "model": "m", "api_key_env": "PLANTED_KEY", "extra": extra}
    assert clair("build", write_recipe(tmp_path, server.url, reviser=reviser)).code == 0
    (pair,) = pairs(tmp_path / "out")
    assert pair["rejected"][0]["content"] == text
    assert pair["chosen"][0]["content"] == text.replace("bad", "good")


def test_a_body_of_status_200_that_is_no_completion_is_reported_without_secrets(tmp_path, server, secrets):
    result = clair("build", recipe(tmp_path, server.url, ["m echo200"]))
    assert result.code == 3
    assert "[secret]" in drops(tmp_path / "out")[0]["detail"]
    assert_nowhere(tmp_path, result)


def test_replies_of_one_deployment_are_not_those_of_another_at_the_same_url(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    for query, code, request_count in [
        ("deployment=a&key=one", 0, 1),
        ("deployment=a&key=two", 0, 1),
        ("deployment=b", 2, 1),
    ]:
        reviser = {"url": f"{server.url}?{query}", "model": "m"}
        result = clair("build", write_recipe(tmp_path, server.url, reviser=reviser))
        assert (result.code, len(server.requests())) == (code, request_count), query
    assert "differs in reviser.url" in result.err
    assert clair("build", tmp_path / "recipe.yaml", "--update").code == 0
    assert len(server.requests()) == 2
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["recipe"]["reviser"]["url"] == content["models"]["reviser"]["identity"].partition("@")[2]
    assert content["recipe"]["reviser"]["url"].endswith("?deployment=b")


DEPLOYMENT = "0123456789abcdef0123456789abcdef"


def test_deployments_with_names_of_hex_digits_are_distinguished_and_recorded(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    for name, code, requests in [(DEPLOYMENT, 0, 1), (DEPLOYMENT[::-1], 2, 1)]:
        reviser = {"url": f"{server.url}?deployment={name}", "model": "m"}
        build = clair("build", write_recipe(tmp_path, server.url, reviser=reviser))
        assert (build.code, len(server.requests())) == (code, requests), name
    assert "differs in reviser.url" in build.err
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())["reviser"]
    assert recipe["url"] == f"{server.url}?deployment={DEPLOYMENT}"


@pytest.mark.parametrize(
    "query",
    [f"deployment={DEPLOYMENT}", "api-version=2024-06-01", "model=sketch-1", f"route={DEPLOYMENT.upper()}x9",
     "deployment=${NAME}", "api_key=${NAME}", "code=a", "max_tokens=9"],
)  # fmt: skip
def test_a_value_of_a_query_is_no_secret(query):
    endpoint = parse_endpoint(f"https://host/v1?{query}")
    assert endpoint.public == f"https://host/v1?{query}"
    assert not any(endpoint.secrets)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, "planted") for name in ("key", "api-key", "apikey", "api_key", "token", "access_token", "sig", "signature",
                                    "X-Amz-Signature", "subscription-key", "client_secret", "password", "auth")]
    + [("code", DEPLOYMENT), ("user", "sk-planted1"), ("id", "AKIA0123456789ABCDEF")],
)  # fmt: skip
def test_a_value_of_a_query_is_a_secret_by_its_name_or_as_a_key_of_a_known_form(name, value):
    endpoint = parse_endpoint(f"https://host/v1?deployment=a&{name}={value}")
    assert endpoint.public == "https://host/v1?deployment=a"
    assert endpoint.secrets == (value,)
    assert endpoint.query[name] == value


NAMES = [
    "X-Auth-Value",
    "auth_header",
    "api_key_2",
    "clientSecret2",
    "private_key_pem",
    "PASSWORD1",
    "db_pass",
    "credentials_json",
]
OPEN_NAMES = [
    "max_tokens",
    "author",
    "keyboard",
    "passage",
    "tokenizer",
    "prompt_cache_key",
    "stop_token_ids",
    "keyword",
]


def test_a_key_whose_name_says_so_is_a_secret_everywhere():
    redacted = without_secrets(dict.fromkeys([*NAMES, *OPEN_NAMES], "planted"))
    assert redacted == dict.fromkeys(NAMES, "[secret]") | dict.fromkeys(OPEN_NAMES, "planted")


@pytest.mark.parametrize(
    "text",
    [
        "Token planted12345",
        "ya29.planted-abcdef12",
        "https://who:planted@host/v1",
        "https://host/v1?api_key=planted1",
        "-----BEGIN RSA PRIVATE KEY-----\nplanted\nplanted",
    ],
)
def test_text_that_looks_like_a_key_is_redacted_everywhere(text):
    assert "planted" not in without_secrets({"note": [text]})["note"][0]
    for plain in ("Token generated", "https://host/v1?page=planted1", "BEGIN", "who: planted@host"):
        assert without_secrets(plain) == plain
