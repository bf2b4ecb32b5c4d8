"""The page of `apo compare` in a real browser: its numbers are the comparison's, and no answer in it does anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apo.evaluation.compare.changes import change_kind, changed_answers
from apo.evaluation.compare.compare import comparison
from apo.evaluation.compare.html import write_page
from apo.evaluation.compare.rows import read_comparable
from tests.apo.evaluation.made_results import TEXTS, make_items, write_folder
from tests.browser.conftest import too_wide, visit
from tests.browser.contrasts import CONTRASTS
from tests.browser.synthetic import INJECTIONS

ACTIVE = ("script", "img", "iframe", "style", "link", "meta", "object", "embed", "base", "form", "svg")
HARMFUL = {"right to wrong": f"right {INJECTIONS[0]} then", "wrong to right": f"wrong {INJECTIONS[1]} then"}


def harmful(items, texts):
    """The items, with malicious text wherever a model, a judge or a benchmark could put it."""
    changed = []
    for number, item in enumerate(items):
        harm = INJECTIONS[number % len(INJECTIONS)]
        fields = {
            "prompt": f"{item.prompt} {harm}",
            "target": (harm, *item.target),
            "judgement": f"{item.judgement} {harm}",
        }
        text = texts[0 if item.score >= 0.5 else 1] if number % 4 == 0 else f"{item.response} {harm}"
        changed.append(
            item.model_copy(update={**fields, "response": text, "unresolved": harm if number % 9 == 0 else None})
        )
    return changed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    texts = (HARMFUL["right to wrong"], HARMFUL["wrong to right"])
    paths = [write_folder(folder / "base", harmful(make_items(0.4), texts), "base")]
    for seed, name, shift in ((1, "better", 0.3), (4, "same", 0.0), (3, "<b>worse<", -0.3)):
        paths.append(write_folder(folder / name, harmful(make_items(0.4, seed=seed, shift=shift), texts), name))
    return read_comparable(paths[0], paths[1:])


@pytest.fixture(scope="module")
def numbers(results):
    return comparison(results)


@pytest.fixture(scope="module")
def file(results, numbers, tmp_path_factory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "compare.html", results, numbers)


def listed(page) -> int:
    """The number of answers that the list shows."""
    return int(page.text_content("#told").split()[0].replace(",", ""))


def points(value: float) -> str:
    return f"{100 * abs(value):.1f}"


def test_text_that_means_harm_is_only_text(tab, file):
    page = tab(file)
    count = "(name) => document.querySelectorAll(name).length"
    counts = {name: page.evaluate(count, name) for name in ACTIVE}
    visit(page, "changes")
    page.click("#kinds button >> nth=0")
    page.focus("#list")
    for _ in range(25):
        page.keyboard.press("j")
        page.keyboard.press("s")
    page.select_option("#model", "2")
    page.fill("#search", "hacked alert")
    page.wait_for_timeout(250)
    assert listed(page) > 5
    visit(page, "overview")
    page.select_option("#part-model", "2")
    assert page.evaluate("() => window.hacked") is None
    assert {name: page.evaluate(count, name) for name in ACTIVE} == counts


def test_the_numbers_of_the_page_are_the_comparisons(tab, file, numbers):
    page = tab(file)
    verdicts = page.locator(".verdict").all_text_contents()
    for verdict, model, difference in zip(verdicts, numbers["tuned"], numbers["parts"][0]["tuned"], strict=True):
        assert model["name"] in verdict
        assert points(difference["delta"]) in verdict
        assert f"{difference['better']} rows better, {difference['worse']} worse" in verdict
    assert "is better than" in verdicts[0]
    assert "shows no difference" in verdicts[1]
    assert "is worse than" in verdicts[2]
    scores = page.locator(".scores tbody tr").all_text_contents()
    assert [points(entry["base"]["score"]) in scores[0] for entry in numbers["parts"][:1]] == [True]
    assert "The best of 3, better" in page.text_content(".notice")


def test_the_plot_shows_every_part_with_its_interval(tab, file, numbers):
    page = tab(file)
    plots = page.locator("svg.forest")
    assert plots.count() == 2
    for index in (0, 2):
        page.select_option("#part-model", str(index))
        titles = plots.nth(1).locator("title").all_text_contents()
        assert len(titles) == len(numbers["parts"])
        for title, entry in zip(titles, numbers["parts"], strict=True):
            difference = entry["tuned"][index]
            shown = re.findall(r"\d+\.\d", title)
            expected = [points(difference["delta"]), *map(points, difference["delta_ci95"] or [])]
            assert shown == expected, title
    dot = plots.nth(0).locator("g.better .dot")
    assert float(dot.get_attribute("cx")) > float(plots.nth(0).locator("g.worse .dot").get_attribute("cx"))


def test_flips_are_listed_with_both_answers(tab, file, results):
    page = tab(file, "#changes")
    changed = [(b, a) for index, b, a in changed_answers(results) if index == 0]
    for kind in ("right to wrong", "wrong to right"):
        expected = [(b, a) for b, a in changed if change_kind(b.score, a.score) == kind]
        page.click(f"#kinds button:has-text('{kind}')")
        assert listed(page) == len(expected) > 3
        page.focus("#list")
        for base, tuned in expected[:8]:
            assert page.locator("#detail .answer").all_text_contents() == [base.response, tuned.response]
            assert page.text_content("#detail .turn") == tuned.prompt
            assert page.locator("#detail .targets .text").all_text_contents() == list(tuned.target)
            assert page.locator("#detail .judged").all_text_contents() == [base.judgement, tuned.judgement]
            page.keyboard.press("j")
    page.keyboard.press("Home")
    page.keyboard.press("s")
    assert page.locator("#detail .answer").count() == 1
    assert page.locator("#detail .answer del").count() > 0


def test_the_list_is_narrowed_by_model_benchmark_and_search(tab, file, results):
    page = tab(file, "#changes")
    page.click("#kinds button >> nth=0")
    for index in (0, 1, 2):
        page.select_option("#model", str(index))
        changed = [tuned for model, _, tuned in changed_answers(results) if model == index]
        assert listed(page) == len(changed)
    page.select_option("#benchmark", "free-form DROP")
    expected = [answer for answer in changed if (answer.split, answer.benchmark) == ("free-form", "DROP")]
    assert listed(page) == len(expected) > 0
    page.fill("#search", '"such words nowhere"')
    page.wait_for_timeout(250)
    assert listed(page) == 0
    assert "Nothing fits" in page.text_content("#detail")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_is_readable_in_light_and_dark(tab, file, theme):
    page = tab(file, color_scheme=theme)
    count = 0
    for view in ("overview", "changes"):
        visit(page, view)
        if view == "changes":
            page.keyboard.press("s")
        contrasts = page.evaluate(CONTRASTS)
        count += len(contrasts)
        assert not [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5]
    print(f"looked at {count} texts")
    assert count > 100


def test_nothing_is_wider_than_the_window(tab, file):
    page = tab(file)
    for view in ("overview", "changes"):
        visit(page, view)
        for width in (1400, 700, 400):
            assert not too_wide(page, width), (width, view)


def test_one_model_without_any_change_has_a_page(tab, tmp_path):
    items = make_items(0.4, questions=3, texts=TEXTS)
    paths = [write_folder(tmp_path / name, items, name) for name in ("one", "other")]
    results = read_comparable(paths[0], paths[1:])
    page = tab(write_page(tmp_path / "compare.html", results, comparison(results)), "#changes")
    assert "No answer changed" in page.text_content("#detail")
    assert not page.is_visible("#model")
    visit(page, "overview")
    assert "No error can be estimated" in page.text_content(".verdict")


def test_a_page_that_would_be_too_large_leaves_the_smallest_changes_out(tab, results, numbers, tmp_path):
    page = tab(write_page(tmp_path / "small.html", results, numbers, max_bytes=20_000), "#changes")
    left = int(re.search(r"([\d,]+) smaller changes are not in this page", page.text_content("#told"))[1])
    assert left > 0
    assert page.text_content("#count-changes") == str(len(changed_answers(results)))
