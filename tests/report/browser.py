"""A page in headless Chromium: run a script in it and return what it returns."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {NAMES} is installed")

_INSIDE = """
<script>(async () => {
  try {
    while (document.querySelector(".plot") && !document.documentElement.dataset.drawn)
      await new Promise((done) => setTimeout(done, 50));
    parent.postMessage(JSON.stringify(await (async () => { %s })()), "*");
  } catch (error) { parent.postMessage(JSON.stringify({error: String(error)}), "*"); }
})();</script></body>"""
# Windows of Chromium are at least 500 pixels wide, frames are not.
_FRAME = """<!doctype html><pre id="result"></pre>
<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>onmessage = ({{ data }}) => {{ document.getElementById("result").textContent = data; }};
</script>"""


def run(
    folder: Path,
    page: str,
    script: str,
    *,
    width: int = 1280,
    dark: bool = False,
    library: str = "",
) -> Any:
    """Run a script in a page that has drawn its figures.

    Args:
        folder: Folder for temporary files.
        page: The page as HTML text.
        script: Body of an asynchronous function in JavaScript; it returns a JSON value.
        width: Width of the page [px].
        dark: Prefer dark colors.
        library: JavaScript to load first.
    """
    assert CHROMIUM is not None
    library = library.replace("</script", "<\\/script")
    added = f"<script>{library}</script>{_INSIDE % script}"
    (folder / "page.html").write_text(page.replace("</body>", added), "utf-8")
    (folder / "frame.html").write_text(_FRAME.format(width=width), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=60000", f"--window-size={max(width, 500)},1000"]
    command += [f"--user-data-dir={folder / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command += [f"file://{folder / 'frame.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
    found = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
