"""The page of `clair report` in a real browser: it sorts, filters, marks and saves, and no text in it does anything."""

from __future__ import annotations

import json

import pytest

from clair.data.dataset import read_rows
from clair.reporting.dataset_report import report
from clair.reporting.review import apply_decisions, read_decisions
from clair.reporting.sampling import METRICS, PairColumns
from tests.browser.conftest import DROPS, PAIRS, visit
from tests.browser.synthetic import DROPS as DROPPED
from tests.browser.synthetic import INJECTIONS, OTHER_TEXTS, synthetic_pairs, write_dataset

ACTIVE = ("script", "img", "iframe", "style", "link", "meta", "object", "embed", "base", "form")
STRANGE = len(INJECTIONS) + len(OTHER_TEXTS)


@pytest.fixture(scope="module")
def rows(folder) -> PairColumns:
    """The pairs as the page has them, in the order of the files."""
    rows_read = PairColumns()
    for split in ("train", "test"):
        for row in read_rows(folder, [split]):
            rows_read.add(row, split, lambda _: True)
    return rows_read


def ids(page) -> list[str]:
    """The ids of the rows that are in sight, from the top."""
    return page.locator("#list .row .id").all_text_contents()


def shown_count(page) -> int:
    """The number of rows that the list shows."""
    return int(page.text_content("#told").split()[0].replace(",", ""))


def search(page, text: str) -> None:
    page.fill("#search", text)
    page.wait_for_timeout(250)


# ---- nothing in a text does anything


def test_text_that_means_harm_is_only_text(tab, file, pairs):
    page = tab(file, "#pairs")
    count = "(name) => document.querySelectorAll(name).length"
    counts = {name: page.evaluate(count, name) for name in ACTIVE}
    for number in range(STRANGE + 3):
        for view in ("one", "two"):
            page.keyboard.press("s")
            assert page.locator("#detail .answer").count() in (1, 2), (number, view)
        page.keyboard.press("j")
    search(page, "alert")
    visit(page, "dropped")
    for _ in range(DROPS):
        page.keyboard.press("j")
    visit(page, "overview")
    assert page.evaluate("() => window.hacked") is None
    assert {name: page.evaluate(count, name) for name in ACTIVE} == counts


def test_both_texts_of_a_pair_are_shown_exactly(tab, file, pairs):
    page = tab(file, "#pairs")
    page.keyboard.press("s")
    by_id = {pair.id: pair for pair in pairs}
    for number in range(40):
        pair = by_id[page.text_content("#detail .id")]
        loser, winner = page.locator("#detail .answer").all_text_contents()
        assert (loser, winner) == (pair.rejected, pair.chosen), number
        assert page.text_content("#detail .turn") == pair.messages[0]["content"]
        page.keyboard.press("j")


def test_the_diff_in_one_text_says_what_is_new_and_what_is_gone(tab, file, pairs):
    page = tab(file, "#pairs")
    pair = next(p for p in pairs if p.rejected == OTHER_TEXTS[0][1])
    search(page, pair.id)
    assert page.locator("#detail .answer del").all_text_contents() == ["run"]
    assert page.locator("#detail .answer ins").all_text_contents() == ["runs", "מהר."]


def test_the_policy_of_the_page_refuses_markup_scripts_and_requests(tab, file):
    page = tab(file)
    assert "TrustedHTML" in page.evaluate(
        "() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.message; } }"
    )
    page.evaluate(
        """() => { try { const made = document.createElement('script'); made.append('window.hacked = 1');
                         document.body.append(made); } catch { } }"""
    )
    assert page.evaluate("() => window.hacked") is None
    assert page.evaluate("() => fetch('https://example.com/').then(() => 'fetched', () => 'refused')") == "refused"
    for refusal in ("example.com", "TrustedScript", "TrustedHTML"):
        assert any(refusal in message for message in page.wrong), refusal
    assert any("example.com" in message and "\"default-src 'none'\"" in message for message in page.wrong)
    page.wrong.clear()  # this test provoked them


def test_right_to_left_text_runs_from_the_right(tab, file):
    page = tab(file, "#pairs")
    search(page, "תרגם")
    assert shown_count(page) == 1
    assert page.evaluate("() => getComputedStyle(document.querySelector('.row .opening')).direction") == "rtl"
    assert page.evaluate("() => getComputedStyle(document.querySelector('#detail .turn .text')).direction") == "rtl"


# ---- the list


@pytest.mark.parametrize("name", METRICS)
def test_the_list_sorts_by_every_number_both_ways(tab, file, rows, name):
    page = tab(file, "#pairs")
    column = rows.numbers[name]
    upwards = sorted(range(PAIRS), key=lambda i: (column[i], i))
    downwards = sorted(range(PAIRS), key=lambda i: (-column[i], i))
    page.select_option("#sort", name)
    assert ids(page)[:12] == [rows.ids[i] for i in upwards[:12]]
    page.click("#order")
    assert ids(page)[:12] == [rows.ids[i] for i in downwards[:12]]
    page.select_option("#sort", "file")
    assert ids(page)[:12] == rows.ids[::-1][:12]


def test_the_search_finds_words_in_any_part_of_a_pair(tab, file, pairs, rows):
    page = tab(file, "#pairs")
    for text, expected in {
        pairs[30].id: 1,
        f'"{pairs[30].reasoning.upper()}"': 1,
        "HACKED script": 2,
        "onload=alert(7)": 1,
        "no such words anywhere": 0,
        "  ": PAIRS,
    }.items():
        search(page, text)
        assert shown_count(page) == expected, text
    search(page, "no such words anywhere")
    assert "Nothing fits" in page.text_content("#detail")


def test_the_list_shows_a_split_or_what_was_marked(tab, file, rows):
    page = tab(file, "#pairs")
    page.select_option("#show", "test")
    assert shown_count(page) == sum(rows.test) > 0
    page.select_option("#show", "unmarked")
    first = ids(page)[0]
    page.focus("#list")
    page.keyboard.press("d")
    assert shown_count(page) == PAIRS - 1
    assert first not in ids(page)
    page.select_option("#show", "drop")
    assert ids(page) == [first]


def test_a_bar_of_a_distribution_leads_to_its_pairs(tab, file, rows):
    page = tab(file)
    bar = page.locator("figure", has_text="jaccard").locator(".bin").nth(18)
    count = int(bar.get_attribute("aria-label").split(": ")[1].split()[0])
    bar.locator(".hit").click()
    assert count == sum(0.9 <= value < 0.95 for value in rows.numbers["jaccard"]) > 0
    assert shown_count(page) == count
    values = [float(value.removesuffix("jaccard")) for value in page.locator(".row .value").all_text_contents()]
    assert values == sorted(values)
    assert all(0.9 <= value <= 0.95 for value in values)
    page.click("#ranges button")
    assert shown_count(page) == PAIRS


def test_bars_can_be_reached_by_keyboard(tab, file):
    page = tab(file)
    page.focus("figure:has-text('kept') .bin >> nth=0")
    for _ in range(19):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ranges button:has-text('kept 0.95 to 1')")


def test_a_drop_reason_leads_to_its_rows(tab, file):
    page = tab(file)
    chip = page.locator(".chip", has_text="truncated")
    count = int(chip.locator("b").text_content().removeprefix("−"))
    chip.click()
    assert (
        shown_count(page)
        == count
        == sum(DROPPED[n * 7 % 11 % len(DROPPED)].reason == "truncated" for n in range(DROPS))
    )
    assert page.locator("#detail dd").all_text_contents() == ["target", "truncated", "the answer ran into max_tokens"]
    assert "raise target.max_tokens" in page.text_content("#detail .answer")
    page.select_option("#show", "all")
    assert shown_count(page) == DROPS
    page.select_option("#sort", "reason")
    shown = page.locator(".row .value small").all_text_contents()
    assert shown == sorted(shown)


def test_only_rows_in_sight_are_in_the_document(tab, file, rows):
    page = tab(file, "#pairs")
    page.keyboard.press("End")
    assert page.locator(".row").count() < 50
    assert ids(page)[-1] == rows.ids[-1]
    assert page.text_content("#detail .id") == rows.ids[-1]
    page.keyboard.press("Home")
    assert ids(page)[0] == rows.ids[0]
    page.evaluate("() => { document.querySelector('#list').scrollTop = 58 * 60; }")
    page.wait_for_selector("#row-60")
    assert page.locator(".row").count() < 50


def test_space_reads_on_in_a_long_pair(tab, file, pairs, rows):
    page = tab(file, "#pairs")
    page.set_viewport_size({"width": 1000, "height": 400})
    longest = max(range(PAIRS), key=lambda i: rows.numbers["chosen_words"][i])
    search(page, rows.ids[longest])
    page.focus("#list")
    page.keyboard.press("Space")
    assert page.evaluate("() => document.querySelector('#detail').scrollTop") > 100
    page.keyboard.press("Shift+Space")
    assert page.evaluate("() => document.querySelector('#detail').scrollTop") == 0


# ---- marking


def test_marks_by_keyboard_are_saved_and_kept(tab, file, folder, rows, tmp_path):
    page = tab(file, "#pairs")
    for key in "jakddjda":  # on the second: keep; back on it: drop, third: drop, skip, fifth: drop, sixth: keep
        page.keyboard.press(key)
    expected = {rows.ids[1]: "keep", rows.ids[2]: "drop", rows.ids[4]: "drop", rows.ids[5]: "keep"}
    marked = page.locator(".row.keep, .row.drop").count()
    page.keyboard.press("k")
    page.keyboard.press("k")
    with page.expect_download() as waiting:
        page.click("#save")
    saved = tmp_path / "decisions.json"
    waiting.value.save_as(saved)
    content = json.loads(saved.read_text("utf-8"))
    assert content["decisions"] == {**expected, rows.ids[1]: "drop"}
    assert marked == 4
    assert waiting.value.suggested_filename == "pairs-decisions.json"
    manifest = apply_decisions(folder, read_decisions(saved), tmp_path / "kept")
    assert manifest["counts"]["pairs"] == PAIRS - 3
    assert not {rows.ids[1], rows.ids[2], rows.ids[4]} & {row["id"] for row in read_rows(tmp_path / "kept")}


def test_a_mark_is_taken_back_by_the_same_key_or_undone(tab, file, rows):
    page = tab(file, "#pairs")
    page.keyboard.press("d")
    assert page.text_content("#tally") == "0 keep, 1 drop"
    page.keyboard.press("k")
    page.keyboard.press("d")
    assert page.text_content("#tally") == ""
    assert page.is_disabled("#save")
    page.keyboard.press("u")
    assert page.text_content("#tally") == "0 keep, 1 drop"
    page.keyboard.press("j")
    page.keyboard.press("u")
    assert page.text_content("#tally") == ""
    assert page.text_content("#detail .id") == rows.ids[0]
    page.click("#detail button.keep")
    assert page.text_content("#tally") == "1 keep, 0 drop"


def test_marks_outlive_a_reload_and_travel_in_a_file(tab, file, rows, tmp_path):
    page = tab(file, "#pairs")
    page.keyboard.press("d")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.text_content("#tally") == "0 keep, 1 drop"
    decisions = tmp_path / "decisions.json"
    content = {"format": 1, "dataset": "old", "decisions": {rows.ids[3]: "keep", "gone": "drop"}}
    decisions.write_text(json.dumps(content))
    page.set_input_files("#open", decisions)
    page.wait_for_selector("#tally:has-text('1 decisions opened, 1 left out')")
    assert page.locator(".row.keep .id").all_text_contents() == [rows.ids[3]]
    decisions.write_text("not json")
    page.set_input_files("#open", decisions)
    page.wait_for_selector("#tally:has-text('could not be opened')")


def test_keys_do_nothing_while_one_types(tab, file):
    page = tab(file, "#pairs")
    page.keyboard.press("/")
    page.keyboard.type("adu?")
    assert page.input_value("#search") == "adu?"
    assert page.text_content("#tally") == ""
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("dialog[open] kbd").count() >= 8
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


# ---- any dataset


def test_a_dataset_without_pairs_or_without_drops_has_a_page(tab, tmp_path):
    page = tab(report(write_dataset(tmp_path / "nothing", [], 3)))
    visit(page, "pairs")
    assert shown_count(page) == 0
    page = tab(report(write_dataset(tmp_path / "all", synthetic_pairs(3), 0)))
    visit(page, "dropped")
    assert "Nothing was dropped" in page.text_content("#detail")


def test_a_pair_without_its_text_says_how_to_read_it(tab, folder, pairs, tmp_path):
    page = tab(report(folder, tmp_path / "one.html", [f"id={pairs[40].id}"]), "#pairs")
    assert ids(page) == [pairs[40].id]
    assert f"and {PAIRS - 1} of which only the numbers are here" in page.text_content("#told")
    page.select_option("#show", "all")
    assert shown_count(page) == PAIRS
    page.keyboard.press("Home")
    page.focus("#list")
    page.keyboard.press("Home")
    first = page.text_content("#detail .id")
    assert f"clair report DIR --filter 'id={first}'" in page.text_content("#detail .notice")


@pytest.mark.slow
def test_fifty_thousand_pairs_of_5_kb_open_with_a_screenful_of_rows(tab, tmp_path):
    page_file = report(write_dataset(tmp_path / "big", synthetic_pairs(50_000), 2_500))
    assert page_file.stat().st_size <= 25_000_000
    page = tab(page_file)  # under 1 s on two quiet cores; how long it takes depends on the machine
    visit(page, "pairs")
    page.select_option("#sort", "levenshtein")
    search(page, "photosynthesis")
    page.wait_for_selector("#told:has-text('searched the openings of those without text')")
    page.select_option("#show", "all")
    search(page, "")
    assert shown_count(page) == 50_000
    assert page.locator(".row").count() < 50
