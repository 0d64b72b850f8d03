"""The page in a real browser: Playwright drives the system's Chromium; without one these tests are skipped.

Screenshots of every tab go to the folder that SPARSEDM_SCREENSHOTS names.
"""

import os
from pathlib import Path

import pytest

from sparsedm.demo import models, page, visitors

WAIT = 90_000  # ms; generous, for other work may share the machine
DONE = "document.querySelector('#verdict')?.innerText.includes('SSIM between')"
TABS = {  # and what is there when the tab has been filled
    "Compare": "#verdict",
    "Blind test": "#blind img >> nth=1",
    "Masks": r"text=/2:\d keeps/",
    "Trade-off": ".scatter .point >> nth=0",
    "Speed here": "button:text-is('Measure')",
    "Fine-tune": "button:text-is('Train')",
}


def opened(browser, url, wrong, width=1440, theme="light", errors=()):
    """The page after its first word. Requests to other places are noted in `wrong`, and errors without a word of `errors`."""

    def note(text: str) -> None:
        if not any(word in text for word in errors):
            wrong.append(text)

    sheet = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    sheet.on("pageerror", lambda error: note(str(error)))
    sheet.on("console", lambda message: note(message.text) if message.type == "error" else None)
    sheet.on("request", lambda sent: None if sent.url.startswith((url, "data:", "blob:")) else wrong.append(sent.url))
    sheet.goto(f"{url}?__theme={theme}")
    sheet.wait_for_function(DONE, timeout=WAIT)
    return sheet


@pytest.fixture
def open_page(browser, url):
    """`open_page(width, theme)`: a page of its own. What goes wrong on it fails the test at its end."""
    wrong, sheets = [], []

    def open_one(width=1440, theme="light", errors=(), url=url):
        sheets.append(opened(browser, url, wrong, width, theme, errors))
        return sheets[-1]

    yield open_one
    for sheet in sheets:
        sheet.context.close()
    assert not wrong


@pytest.fixture(scope="module")
def gallery(url, portraits):
    """Where the page is served that opens on faces, of a model with random weights."""
    demo = page.build(models.Catalogue([portraits]), "portraits", "portraits")
    yield page.launch(demo, prevent_thread_lock=True, quiet=True)
    demo.close()


@pytest.fixture(scope="module")
def shared(browser, url):
    """The pages that tests share: a wide one in light, a narrow one in dark; and what went wrong on both until now."""
    wrong = []
    return {theme: opened(browser, url, wrong, width, theme) for theme, width in (("light", 1440), ("dark", 390))}, wrong


@pytest.fixture
def sheet(shared):
    """The shared wide page, with its first tab open. What goes wrong on it fails the test at its end."""
    sheets, wrong = shared
    sheets["light"].set_viewport_size({"width": 1440, "height": 900})
    show(sheets["light"], "Compare")
    yield sheets["light"]
    told, wrong[:] = [*wrong], []
    assert not told


def show(sheet, tab: str) -> None:
    """Go to a tab, wherever the page has room for its name."""
    button = sheet.locator(f"button[role=tab]:has-text('{tab}')").first
    if not button.is_visible():
        sheet.locator(".overflow-menu button").first.click()
        button = sheet.locator(f".overflow-dropdown button:has-text('{tab}')").first
    button.click()


def test_a_blind_pair_is_judged_and_the_next_one_dealt(sheet):
    show(sheet, "Blind test")
    picture = sheet.locator("#blind img").first
    picture.wait_for(timeout=WAIT)
    before = picture.get_attribute("src")
    sheet.get_by_role("button", name="The left one is 2:4").click()
    sheet.wait_for_function("document.querySelector('#blind-score')?.innerText.includes('of 1 right')", timeout=WAIT)
    sheet.wait_for_function(f"document.querySelector('#blind img').getAttribute('src') != {before!r}", timeout=WAIT)
    show(sheet, "Masks")
    show(sheet, "Blind test")  # the score is kept
    assert "of 1 right" in sheet.locator("#blind-score").inner_text()


def test_a_word_is_typed_and_both_sides_move(sheet):
    pictures = sheet.locator(".side.left img"), sheet.locator(".side.right img")
    before = [picture.first.get_attribute("src") for picture in pictures]
    sheet.get_by_label("Word").first.fill("24OF4")
    sheet.keyboard.press("Enter")
    sheet.wait_for_function("document.querySelector('#verdict')?.innerText.includes('Denoising')", timeout=WAIT)
    sheet.wait_for_function(DONE, timeout=WAIT)
    assert all(a != picture.first.get_attribute("src") for a, picture in zip(before, pictures))
    figures = sheet.locator(".figures").all_inner_texts()
    assert all("25 of 25 steps" in text and "of 5 right" in text for text in figures)


@pytest.mark.parametrize("width", [1440, 390])
def test_faces_are_asked_for_with_chips_and_letters_are_one_click_away(open_page, gallery, width):
    sheet = open_page(width, url=gallery)
    line, chip = sheet.get_by_role("textbox", name="Word"), sheet.locator("[data-word='blue hair']")
    before = line.input_value()
    chip.focus()
    sheet.keyboard.press("Enter")
    sheet.wait_for_function("document.querySelector('.right .figures')?.innerText.includes('blue hair')", timeout=WAIT)
    assert sheet.evaluate("document.activeElement.dataset.word") == "blue hair"
    assert line.input_value() == f"{before}, blue hair" and chip.get_attribute("aria-pressed") == "true"
    assert sheet.evaluate("document.documentElement.scrollWidth") <= width
    line.fill("sunglases")
    sheet.get_by_text("near it: sunglasses").wait_for(timeout=WAIT)
    sheet.get_by_label("Letters").click()
    sheet.wait_for_function("document.querySelector('.right .figures')?.innerText.includes('of 6 right')", timeout=WAIT)
    assert line.input_value() == "SPARSE" and not chip.is_visible()


def test_one_order_too_many_is_refused_with_words(open_page, monkeypatch):
    sheet = open_page(errors=["429"])
    monkeypatch.setattr(visitors, "limit", lambda name: 0)
    sheet.get_by_role("button", name="Draw", exact=True).click()
    sheet.get_by_text("orders waiting").wait_for(timeout=WAIT)


def test_the_slider_is_dragged(sheet):
    handle = sheet.locator("#difference .outer").first
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    at = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    sheet.mouse.move(*at)
    sheet.mouse.down()
    sheet.mouse.move(at[0] - 150, at[1], steps=5)
    sheet.mouse.up()
    assert abs(handle.bounding_box()["x"] - (box["x"] - 150)) < 10


def test_another_model_is_chosen(sheet):
    sheet.get_by_label("Right", exact=True).click()
    sheet.get_by_role("option", name="U-ViT, Diff-Pruning").click()
    sheet.wait_for_function("document.querySelector('.side.right h2').innerText == 'U-ViT, Diff-Pruning'", timeout=WAIT)
    sheet.wait_for_function(DONE, timeout=WAIT)
    assert "Diff-Pruning needs" in sheet.locator("#verdict").inner_text()


def test_a_point_is_chosen_by_mouse_and_by_key(sheet):
    show(sheet, "Trade-off")
    for name, choose in (
        ("Diff-Pruning", lambda p: p.click()),
        ("one-shot", lambda p: (p.focus(), sheet.keyboard.press("Enter"))),
    ):
        choose(sheet.locator(f".scatter .point[aria-label*='{name}']").first)
        sheet.wait_for_function(f"document.querySelector('#details').innerText.includes('{name}')", timeout=WAIT)
        assert name in sheet.locator(".scatter .chosen").get_attribute("aria-label")


def test_masks_follow_the_slider(sheet):
    show(sheet, "Masks")
    sheet.get_by_text("2:4 keeps").wait_for(timeout=WAIT)
    sheet.get_by_role("radio", name="8").click()
    sheet.get_by_text("2:8 keeps").wait_for(timeout=WAIT)


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "light"), (390, "dark"), (1440, "dark")])
def test_every_tab_fits_the_screen(shared, width, theme):
    sheet, folder = shared[0][theme], os.environ.get("SPARSEDM_SCREENSHOTS")
    sheet.set_viewport_size({"width": width, "height": 900})
    for tab, content in TABS.items():
        show(sheet, tab)
        sheet.locator(content).first.wait_for(timeout=WAIT)
        sheet.wait_for_timeout(300)  # fonts and transitions
        assert sheet.evaluate("document.documentElement.scrollWidth") <= width
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            sheet.screenshot(path=Path(folder, f"{tab.replace(' ', '-').lower()}-{width}-{theme}.png"), full_page=True)
    assert not shared[1]
