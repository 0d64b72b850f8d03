"""Record docs/demo.gif from the real app: `python docs/record.py` (needs playwright and Chromium, as the browser's tests do)."""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from sparsedm.demo import models, page

OUT = Path(__file__).with_name("demo.gif")
SIZE, SCALE, COLOURS = {"width": 1060, "height": 880}, 0.65, 256
WORDS = "blue hair, round glasses, big smile"


def frame(sheet: Page) -> Image.Image:
    image = Image.open(io.BytesIO(sheet.screenshot())).convert("RGB")
    return image.resize((round(image.width * SCALE), round(image.height * SCALE)), Image.Resampling.LANCZOS)


def done(sheet: Page) -> bool:
    return "SSIM between" in sheet.locator("#verdict").inner_text()


def film(sheet: Page) -> list[tuple[Image.Image, int]]:
    """Frames, each with the milliseconds that it stays: words typed, both sides drawing, the slider dragged."""
    frames = []
    line = sheet.get_by_role("textbox", name="Words")
    line.fill("")
    for word in WORDS.split(" "):
        line.press_sequentially(f"{word} ")
        frames.append((frame(sheet), 350))
    sheet.keyboard.press("Enter")
    sheet.wait_for_function("document.querySelector('#verdict').innerText.includes('Denoising')")
    while not done(sheet):
        frames.append((frame(sheet), 250))
    frames.append((frame(sheet), 3000))
    handle = sheet.locator("#difference .outer").first
    handle.evaluate("handle => handle.scrollIntoView({block: 'center'})")
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    sheet.mouse.move(x, y)
    sheet.mouse.down()
    for step in (*range(0, 8), *range(8, -9, -1), *range(-8, 1)):
        sheet.mouse.move(x + 40 * step, y)
        frames.append((frame(sheet), 90))
    sheet.mouse.up()
    frames.append((frame(sheet), 2000))
    return frames


def main() -> None:
    catalogue = models.Catalogue()
    demo = page.build(catalogue, *models.pairs()[models.FACES])
    url = page.launch(demo, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        sheet = browser.new_page(viewport=SIZE)
        sheet.goto(f"{url}?__theme=light")
        sheet.wait_for_function("document.querySelector('#verdict')?.innerText.includes('SSIM between')", timeout=90_000)
        frames, durations = zip(*film(sheet), strict=True)
        browser.close()
    demo.close()
    both = Image.fromarray(np.concatenate([frames[0], frames[-1]]))
    palette = both.quantize(COLOURS, Image.Quantize.MAXCOVERAGE)  # rare colours, too
    first, *rest = (image.quantize(COLOURS, palette=palette, dither=Image.Dither.NONE) for image in frames)
    first.save(OUT, save_all=True, append_images=rest, duration=list(durations), loop=0, optimize=True)
    print(f"{OUT}: {len(frames)} frames, {OUT.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
