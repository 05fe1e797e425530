"""Pages in headless Chromium: opened at a width, and measured by a script."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = "EMLOC_BROWSER_TESTS"
MISSING = "no Chromium on this machine; install it with: apt-get install -y chromium"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--allow-file-access-from-files", "--enable-logging=stderr", "--hide-scrollbars"),
)

# Each page is a frame, as wide as its screen: a window of Chromium is never as narrow as a phone.
_WRAPPER = """<!doctype html><title>measure</title>
{frames}
<pre id="measured"></pre>
<script>
function measure(frame) {{
  const page = frame.contentWindow, doc = page.document, width = page.innerWidth;
  const name = element => element.tagName + " " + element.textContent.trim().slice(0, 60);
  const isSeen = element => !element.closest(".cards thead, .cards td.empty");
  const lettersOf = element => {{
    const range = doc.createRange();
    range.selectNodeContents(element);
    return range.getBoundingClientRect();
  }};
  const sticksOut = element => {{
    const box = element.getBoundingClientRect(), letters = lettersOf(element);
    const outside = Math.max(letters.right - box.right, box.left - letters.left);
    if (!letters.width) return false;
    return outside > 1 || box.right > width + 1 || box.left < -1 || letters.right > width + 1;
  }};
  const blocks = [...doc.querySelectorAll("h1, h2, p, li, th, td, figcaption, dt, dd, summary")];
  return {{
    width,
    scrollWidth: doc.documentElement.scrollWidth,
    overflowing: blocks.filter(isSeen).filter(sticksOut).map(name),
    scrolled: [...doc.querySelectorAll("*")]
      .filter(isSeen).filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(name),
    cells: blocks.filter(e => e.closest("tbody")).length,
    unseen: blocks.filter(isSeen).filter(e => e.closest("tbody"))
      .filter(e => !e.getBoundingClientRect().width || !e.getBoundingClientRect().height).map(name),
    cards: doc.querySelectorAll("table.cards").length,
    images: [...doc.images].map(i => [decodeURI(i.currentSrc), i.naturalWidth, i.alt]),
    links: [...doc.links].map(link => decodeURI(link.href)),
    ids: [...doc.querySelectorAll("[id]")].map(element => element.id),
  }};
}}
addEventListener("load", () => {{
  const measured = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("measured").textContent = JSON.stringify(measured);
}});
</script>
"""


def browser() -> str:
    """Path of Chromium. A test without it is skipped, or fails where CI requires it."""
    paths = [path for name in NAMES if (path := shutil.which(name))]
    if paths:
        return paths[0]
    if os.environ.get(REQUIRED) == "required":
        pytest.fail(f"{REQUIRED}=required: {MISSING}")
    pytest.skip(MISSING)


def measure(pages: Sequence[tuple[Path, int]], folder: Path) -> list[dict[str, Any]]:
    """Open each page at its width in CSS pixels and return what the script measures.

    `console` holds the messages of all pages: errors, warnings and files that did not load.
    """
    program = browser()
    frames = "".join(
        f'<iframe src="{path.as_uri()}" width="{width}" height="900" frameborder="0"></iframe>'
        for path, width in pages
    )
    wrapper = folder / "measure.html"
    wrapper.write_text(_WRAPPER.format(frames=frames))
    done = subprocess.run(
        [
            *(program, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1500,1000"),
            *("--virtual-time-budget=10000", "--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-2000:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return [one | {"console": console} for one in json.loads(html.unescape(match[1]))]
