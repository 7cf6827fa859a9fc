"""The comparison page in a real browser: every figure drawn, no text over another, nothing wider than the screen.

Headless Chromium opens the page with a probe appended, which measures boxes and leaves what it found in the document.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from typing import Any

import pytest
from patience import patient
from test_compare import write

from flashcomm_megatron.tools.compare import command, plots

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000"),
]

# A window is never narrower than 500 pixels, so the page sits in a frame as wide as the screen in question.
FRAME = """<!doctype html><body style="margin: 0"><pre id="report"></pre>
<script>addEventListener("message", event => document.getElementById("report").textContent = event.data)</script>
<iframe style="border: 0; width: {width}px; height: 2000px" srcdoc="{page}"></iframe></body>"""

# Texts are boxes of words as painted: of an SVG's <text>, else of the text nodes' client rectangles.
PROBE = """
<script>
function words(root) {
  const found = [], walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, range = document.createRange();
    if (!node.data.trim() || node.parentElement.closest("style, script, title")) continue;
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width > 0) found.push({text: node.data.trim(), x: box.x, y: box.y, r: box.right, b: box.bottom});
  }
  return found;
}
function overlaps(boxes) {
  const bad = [];
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (Math.min(a.r, b.r) - Math.max(a.x, b.x) > 1 && Math.min(a.b, b.b) - Math.max(a.y, b.y) > 2)
      bad.push([a.text, b.text]);
  }));
  return bad;
}
function figure(node) {
  const svg = node.querySelector("svg");
  if (!svg) return null;
  const frame = svg.getBoundingClientRect(), texts = words(svg), colours = {};
  const inside = t => t.x > frame.x - 1 && t.r < frame.right + 1 && t.y > frame.y - 1 && t.b < frame.bottom + 1;
  for (const shape of svg.querySelectorAll("path, use, rect")) {
    const box = shape.getBoundingClientRect(), look = getComputedStyle(shape);
    if (shape.closest("defs") || box.width * frame.width < 1) continue;
    const curve = parseFloat(look.strokeWidth) > 1;  // axes and grid are thinner
    for (const colour of [curve ? look.stroke : "", look.fill])
      colours[colour] = Math.max(colours[colour] || 0, box.width, box.height);
  }
  return {colours, texts: texts.length, width: frame.width, height: frame.height, overlaps: overlaps(texts),
    outside: texts.filter(t => !inside(t))};
}
const result = {width: innerWidth, scroll: document.documentElement.scrollWidth, figures: {},
  overlaps: overlaps(words(document.body)), ink: getComputedStyle(document.body).color};
for (const node of document.querySelectorAll("figure")) result.figures[node.id] = figure(node);
parent.postMessage(JSON.stringify(result), "*");
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A comparison of seven runs, one with a long name, one without our metrics, of different lengths."""
    folder = tmp_path_factory.mktemp("page")
    names = ["exact", "flash-8", "flash-6", "flash-4-block-32-two-step-seed-1234-on-the-big-machine", "a", "b"]
    runs = [write(folder / f"{name}.jsonl", loss=2 + 0.1 * index) for index, name in enumerate(names)]
    runs.append(write(folder / "plain.jsonl", ours=False, steps=6))
    assert command.main([*map(str, runs), "--out", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text().replace("</body>", PROBE + "</body>")


@pytest.fixture(scope="module", params=[390, 1280], ids=["phone", "desktop"])
def seen(request: pytest.FixtureRequest, page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the probe found on a screen of this width."""
    if BROWSER is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=request.param, page=html.escape(page)))
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={folder}/profile", "--window-size=1400,2000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=patient(120),
        env={**os.environ, "HOME": str(folder)},
    )
    found = re.search(r'<pre id="report">(.+?)</pre>', done.stdout, re.S)
    assert found, f"the browser gave no report: {done.stderr[-2000:]}"
    report: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert report["width"] == request.param
    return report


def rgb(colour: str, ink: str) -> str:
    if colour == plots.INK:
        return ink
    return "rgb({}, {}, {})".format(*bytes.fromhex(colour[1:]))


def test_every_figure_is_drawn(seen: dict[str, Any]) -> None:
    assert list(seen["figures"]) == [plot.name for plot in plots.PLOTS]
    for name, figure in seen["figures"].items():
        shown = range(7) if name in ("loss", "loss-difference", "throughput") else range(6)  # plain has the loss only
        for index in shown:
            colour = rgb(plots.style(index).colour, seen["ink"])
            assert figure["colours"].get(colour, 0) > 20, f"{name}: run {index} ({colour}) is not drawn"
        assert figure["texts"] > 6 and figure["height"] > 150, name


def test_no_text_lies_over_another(seen: dict[str, Any]) -> None:
    assert seen["overlaps"] == []
    for name, figure in seen["figures"].items():
        assert figure["overlaps"] == [] and figure["outside"] == [], name


def test_nothing_is_wider_than_the_screen(seen: dict[str, Any]) -> None:
    assert seen["scroll"] <= seen["width"]
    assert all(figure["width"] <= seen["width"] for figure in seen["figures"].values())
