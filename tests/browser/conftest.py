"""A real Chromium without a window. Where there is none these tests fail: what they promise was not seen."""

import shutil
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, Request, sync_playwright


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Ends with its module: while it is there this thread has an event loop, and tests elsewhere start their own."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        # a container has no namespaces for Chromium's own sandbox
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page as a person would, and fails at the end if anything was complained of, asked or fetched."""
    complaints: list[str] = []
    contexts: list[BrowserContext] = []

    def dialog_opened(dialog: Dialog) -> None:
        complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def asked(request: Request) -> None:
        if not request.url.startswith(("file://", "about:")):
            complaints.append(f"request: {request.url}")

    def open_page(
        url: str, width: int = 1280, height: int = 800, scheme: Literal["light", "dark"] = "light"
    ) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("popup", lambda popup: complaints.append("a window opened"))
        page.on("dialog", dialog_opened)
        page.on("request", asked)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
