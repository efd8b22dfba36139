"""The page at / in a browser: reasoning folded, tool calls as cards, facts of the engine; nothing foreign is asked."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.scripted_engine import LiveServer, live_server

CALL = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="sum">\n'
    '<｜DSML｜parameter name="numbers" string="false">[17, 25]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls><｜end▁of▁sentence｜>"
)
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Where the page's picture goes, for whoever wants to see it.
PICTURE = os.environ.get("SEEKFORGE_PAGE_PICTURE")


def script(prompt: str) -> str:
    """Think, call `sum` if it is there and has not answered, and answer with what must not run."""
    thought = "17 and 25: I will add them.</think>" if prompt.endswith("<think>") else ""
    if '"sum"' in prompt and "<result>42</result>" not in prompt:
        return thought + "I will use a tool." + CALL
    return thought + f"17 + 25 = 42. {HOSTILE}<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    with live_server(tiny_checkpoint, script, api_keys=("key",)) as made:
        yield made


@pytest.fixture
def page(server: LiveServer) -> Iterator[Any]:
    """A browser's page at the server; what it asked for is in `requests`, what it complained of in `complaints`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 760})
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(server.url)
        yield page
        browser.close()


@pytest.mark.slow
def test_a_conversation_with_a_tool_is_shown(page: Any, server: LiveServer) -> None:
    page.wait_for_selector("#keyline:not([hidden])")  # it needs a key, and asks for it
    page.fill("#key", "key")
    page.dispatch_event("#key", "change")
    until(page, "document.querySelector('#facts').textContent.includes('scripted')")
    page.check("#tools")
    page.fill("#text", "What is 17 + 25?")
    page.press("#text", "Enter")
    until(page, "[...document.querySelectorAll('.note')].length === 2 && !running")
    if PICTURE:
        page.screenshot(path=PICTURE)
    assert [one.inner_text() for one in page.query_selector_all(".tool b")] == ["sum"]
    assert [one.inner_text() for one in page.query_selector_all(".tool pre")] == ['{"numbers": [17, 25]}', "→ 42"]
    folded = page.query_selector_all("details")
    assert len(folded) == 2 and not any(one.get_attribute("open") is not None for one in folded)
    assert page.query_selector_all(".answer")[-1].inner_text() == f"17 + 25 = 42. {HOSTILE}"
    assert "tokens/s" in page.query_selector_all(".note")[-1].inner_text()
    assert page.title() == "seekforge" and page.query_selector("img") is None
    assert all(url.startswith(server.url) for url in page.requests)
    assert [one for one in page.complaints if "401" not in one] == []


@pytest.mark.slow
def test_an_answer_can_be_stopped_and_the_next_one_asked(page: Any, server: LiveServer) -> None:
    page.fill("#key", "key")
    server.engine.hold = True
    try:
        page.fill("#text", "Wait.")
        page.press("#text", "Enter")
        until(page, "document.querySelector('#send').textContent === 'Stop'")
        page.click("#send")
        until(page, "document.querySelector('.note.bad') !== null")
    finally:
        server.engine.hold = False
    page.fill("#text", "And now?")
    page.press("#text", "Enter")
    until(page, "document.querySelectorAll('.answer').length === 1 && !running")
    assert "Wait." not in server.engine.prompts[-1]


def until(page: Any, expression: str) -> None:
    """Wait for something in the page, whose policy lets no text be run by itself."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)
