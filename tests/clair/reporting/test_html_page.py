"""The pieces of pages: JSON that no text breaks out of, a policy that fits, diffs that lose nothing, plots."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clair.data.contrast import word_diff
from clair.reporting.html_page import clip, diff, histogram, html_page, json_text, read_asset, round_edges

ASSETS = ("report.html", "report.css", "overview.js", "report.js")
# Any text at all: lone surrogates, control characters, and the tricks that close or open a script element.
TRICKS = ("</script", "<script>", "<!--", "-->", "]]>", "\u2028", "\u2029", "\ud800", "\x00", "\r\n", "&lt;", "a b")
TEXT = st.text(st.characters(), max_size=60) | st.lists(st.sampled_from(TRICKS)).map("".join)


class Elements(HTMLParser):
    """The elements of a page with their attributes and text, read as a browser delimits scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.inside = False
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), ""))
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            tag, attrs, text = self.elements[-1]
            self.elements[-1] = (tag, attrs, text + data)

    def named(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, text) for name, attrs, text in self.elements if name == tag]


@given(TEXT)
def test_any_text_comes_back_and_cannot_leave_its_script_element(text):
    page = html_page(text, ASSETS, {"data": json_text({"text": text, text: [text, None, 1.5]}), "texts": "{}"})
    page.encode("utf-8")
    scripts = Elements(page).named("script")
    assert [attrs.get("id") for attrs, _ in scripts] == ["data", "texts", None]
    assert json.loads(scripts[0][1]) == {"text": text, text: [text, None, 1.5]}
    assert not re.search("[<\u2028\u2029\ud800-\udfff]", json_text(text))


def test_numbers_without_json_become_null():
    assert json_text([math.nan, {"a": (math.inf, 1.5)}, 2]) == '[null,{"a":[null,1.5]},2]'


def test_the_policy_holds_the_hashes_of_what_the_page_runs_and_nothing_more():
    page = Elements(html_page("title", ASSETS, {"data": "{}"}))
    policy = next(attrs["content"] for attrs, _ in page.named("meta") if "http-equiv" in attrs)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    ((_, style),) = page.named("style")
    (script,) = [text for attrs, text in page.named("script") if "type" not in attrs]
    for rule, text in (("style-src", style), ("script-src", script)):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["trusted-types"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"


def test_a_page_refers_to_nothing_outside_of_itself():
    page = html_page("title", ASSETS, {"data": "{}"})
    assert set(re.findall(r"https?://[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}  # a name, never loaded
    assert not re.search(r"\b(?:src|srcset|action)=|url\(|@import|innerHTML|insertAdjacentHTML|document\.write", page)
    elements = Elements(page)
    names = {name for _, attrs, _ in elements.elements for name in attrs}
    assert not [name for name in names if name.startswith("on") or name == "style"]
    assert all(attrs["href"].startswith("#") for _, attrs, _ in elements.elements if "href" in attrs)


def test_templates_are_read_from_the_package():
    templates = [read_asset(name) for name in ("page.css", "page.js", *ASSETS)]
    assert all(templates)
    assert not any(end in text for text in templates for end in ("</script", "</style", "<!--"))


# ---- diffs


@given(TEXT, TEXT)
def test_a_diff_holds_both_texts_exactly(rejected, chosen):
    edits = diff(rejected, chosen)
    assert "".join(edit[1] for edit in edits if edit[0] >= 0) == chosen
    assert "".join(edit[-1] if edit[0] == 0 else edit[1] for edit in edits if edit[0] <= 0) == rejected


def test_a_diff_has_the_words_of_the_one_in_the_terminal():
    rejected, chosen = "The  dog run\nfast today", "The dog runs fast"
    kinds = {"same": 0, "gone": -1, "new": 1}
    in_terminal = [[kinds[kind], text] for kind, text in word_diff(rejected, chosen)]
    assert [edit[:2] for edit in diff(rejected, chosen)] == in_terminal
    assert diff(rejected, chosen) == [
        [0, "The dog", "The  dog"],
        [-1, " run"],
        [1, " runs"],
        [0, " fast", "\nfast"],
        [-1, " today"],
    ]


def test_clip_keeps_the_beginning_and_the_end():
    assert clip("x" * 30, 30) == "x" * 30
    assert clip("ab" + "x" * 1000 + "z", 3) == "ab\n[… 1,000 characters left out …]\nz"


# ---- plots


def test_a_histogram_by_hand():
    drawn = histogram([0, 0.1, 0.5, 1, 1, 2], [0, 0.5, 1])
    assert drawn == {"edges": [0, 0.5, 1], "counts": [2, 4], "n": 6, "mean": 4.6 / 6, "q5": 0, "q50": 0.5, "q95": 2}
    assert histogram([], [0, 1]) == {"edges": [0, 1], "counts": [0], "n": 0}


@given(st.lists(st.floats(-5, 5)), st.lists(st.floats(-4, 4), min_size=2, unique=True).map(sorted))
def test_every_value_falls_into_one_bin(values, edges):
    assert sum(histogram(values, edges)["counts"]) == len(values)


@pytest.mark.parametrize(("top", "last"), [(0, 1), (1, 2), (4, 5), (5, 10), (999, 1000), (1000, 2000)])
def test_round_edges_end_above_the_largest(top, last):
    assert round_edges(top)[-1] == last
