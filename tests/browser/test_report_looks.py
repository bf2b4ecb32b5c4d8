"""The look of the page of `clair report`: readable in light and dark, at any width, and the focus can be seen."""

from __future__ import annotations

import pytest

from tests.browser.conftest import too_wide, visit
from tests.browser.contrasts import CONTRASTS


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_is_readable_in_light_and_dark(tab, file, theme):
    page = tab(file, color_scheme=theme)
    red = int(page.evaluate("() => getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert (red > 200) == (theme == "light")
    count = 0
    for view in ("overview", "pairs", "dropped"):
        visit(page, view)
        if view == "pairs":
            page.keyboard.press("a")
            page.keyboard.press("d")
            page.keyboard.press("k")
        contrasts = page.evaluate(CONTRASTS)
        count += len(contrasts)
        assert not [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5]
    print(f"looked at {count} texts")
    assert count > 150


def test_the_theme_can_be_chosen_and_is_remembered(tab, file):
    page = tab(file, color_scheme="light")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) == light
    page.click("#theme")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate(ground) == dark


def test_nothing_is_wider_than_the_window(tab, file):
    for view in ("#overview", "#pairs", "#dropped"):
        page = tab(file, view)
        for width in (1400, 1000, 700, 400):
            assert not too_wide(page, width), (width, view)


def test_the_focused_element_is_outlined(tab, file):
    page = tab(file, "#pairs")
    focus = """() => {
      const node = document.activeElement;
      const shows = node.closest('.open') ?? node.querySelector('.row[aria-selected="true"]') ?? node;
      return [node.id || node.tagName, getComputedStyle(shows).outlineStyle !== 'none'];
    }"""
    outlines = {}
    for _ in range(14):
        page.keyboard.press("Tab")
        name, shown = page.evaluate(focus)
        outlines[name] = shown
    assert {"list", "search", "show", "sort", "order", "theme", "open", "help"} <= set(outlines)
    assert not [name for name, shown in outlines.items() if not shown and name != "BODY"]
