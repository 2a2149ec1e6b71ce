"""The report in a browser: silent console, sorting, no overflow, sources a click away, readable without scripts."""

import os

import pytest
from browser import Browser, find_chromium

from backbench.common.report.html import write_report

pytest_plugins = ["synthetic_cells"]  # its fixtures

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
ORDER = "[...document.querySelectorAll('#board tbody th')].map(th => th.textContent.trim())"


@pytest.fixture(scope="module")
def page(cells, board, tmp_path_factory):
    """The synthetic board's report."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(cells, board, path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests. BACKBENCH_CI=1 makes its absence an error instead of a skip."""
    if find_chromium() is None:
        if os.environ.get("BACKBENCH_CI") == "1":
            pytest.fail("no Chromium: apt-get install chromium")
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


def test_it_loads_without_a_complaint_and_fits_every_width(browser, page):
    for width in (1280, 360):
        browser.errors.clear()
        browser.open(page, width)
        assert browser.errors == []
        assert browser.value(OVERFLOW) <= 0, f"{width} px: the page scrolls sideways"
        for opened in browser.value("document.querySelectorAll('details').forEach(d => d.open = true)"), None:
            assert opened is None
        assert browser.value(OVERFLOW) <= 0, f"{width} px: the page scrolls sideways when all is unfolded"


def test_the_browser_would_have_complained(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<body><div style='width: 3000px'>wide</div><script>throw new Error('no')</script>")
    browser.errors.clear()
    browser.open(path, 360)
    assert browser.errors and browser.value(OVERFLOW) > 0
    browser.errors.clear()


def test_sorting_by_mouse_and_keyboard(browser, page, board):
    browser.open(page)
    column = board.columns[2]
    scores = {row.label: board.primary(row, column).score.value for row in board.rows}
    best_first = sorted(scores, key=scores.get, reverse=True)
    click = "document.querySelectorAll('#board button.sort')[2]"
    browser.value(f"{click}.click()")
    assert [scores[name] for name in browser.value(ORDER)] == [scores[name] for name in best_first]
    assert browser.value(f"{click}.closest('th').getAttribute('aria-sort')") == "descending"
    browser.value(f"{click}.focus()")
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    browser.send("Input.dispatchKeyEvent", type="keyDown", **key)
    browser.send("Input.dispatchKeyEvent", type="keyUp", **key)
    assert [scores[name] for name in browser.value(ORDER)] == [scores[name] for name in best_first[::-1]]


def test_a_score_leads_to_where_it_is_from(browser, page):
    browser.open(page)
    link = "document.querySelector('#board tbody td a')"
    target = browser.value(f"{link}.getAttribute('href').slice(1)")
    assert not browser.value(f"document.getElementById('{target}').open")
    browser.value(f"{link}.click()")
    opened = f"new Promise(r => setTimeout(() => r(document.getElementById('{target}').open), 200))"
    assert browser.value(opened)


def test_it_reads_without_scripts(browser, page, board):
    browser.errors.clear()
    browser.open(page, scripts=False)
    text = browser.value("document.body.innerText")
    for row in board.rows:
        for column in board.columns:
            assert f"{100 * board.primary(row, column).score.value:.1f}" in text
    assert browser.value(OVERFLOW) <= 0 and browser.value("document.querySelectorAll('svg.bar').length") > 20
    assert browser.value("document.querySelectorAll('svg.photo').length") > 20


def test_everything_to_click_can_be_reached_and_every_picture_has_words(browser, page):
    browser.open(page)
    scrolling = "[...document.querySelectorAll('.wide')].filter(e => e.tabIndex !== 0 || !e.ariaLabel).length"
    assert browser.value(scrolling) == 0
    unnamed = "[...document.querySelectorAll('svg[role=img]')].filter(e => !e.querySelector('title')).length"
    assert browser.value(unnamed) == 0
    broken = "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1)))"
    assert browser.value(f"{broken}.length") == 0
