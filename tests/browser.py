"""Pages in a real browser: Debian's Chromium (`make chromium`) opens them, and a script of the test looks around."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed; run: make chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"),
]
WATCH = """var problems = [];
addEventListener("error", (event) => problems.push(String(event.message)), true);
addEventListener("securitypolicyviolation", (event) => problems.push("refused: " + event.blockedURI));"""
RUN = """addEventListener("load", async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  let found;
  try { found = await (async () => { %s })(); } catch (error) { problems.push("test: " + error.stack); }
  const loaded = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
  document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "found" }));
  document.querySelector("#found").textContent = JSON.stringify({ found, problems, loaded });
});"""


def chromium(page: Path, *flags: str, fragment: str = "", size: str = "1200,900") -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        line = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size}", *flags]
        url = page.resolve().as_uri() + fragment
        return subprocess.run([*line, url], text=True, capture_output=True, timeout=60, check=True)


def look(page: Path, script: str, fragment: str = "") -> Any:
    """Open a copy of the page into which `script` is put, the body of an async function, and return what it returns.

    Fails if anything on the page failed, was refused by its policy, or was loaded from elsewhere.
    """
    copy = page.with_suffix(".copy.html")
    content = page.read_text()
    scripts = [WATCH, RUN % script]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    content, policies = re.subn(r'(script-src [^"]*)"', lambda found: f'{found[1]} {hashes}"', content)
    assert policies == 1
    content = content.replace('<meta name="viewport"', f'<script>{scripts[0]}</script><meta name="viewport"', 1)
    copy.write_text(content.replace("</html>", f"<script>{scripts[1]}</script></html>"))
    done = chromium(copy, "--virtual-time-budget=5000", "--dump-dom", fragment=fragment)
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert said, done.stdout[-2000:] + done.stderr[-2000:]
    answer = json.loads(said[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert answer["problems"] == []
    assert answer["loaded"] == []
    assert "CONSOLE" not in done.stderr, done.stderr
    return answer["found"]


def screenshot(page: Path, fragment: str = "", size: str = "1200,900") -> npt.NDArray[np.uint8]:
    """Return what the page looks like, [H, W, RGB]."""
    picture = page.with_suffix(".png")
    chromium(page, f"--screenshot={picture}", fragment=fragment, size=size)
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))
