"""What a model writes is shown, never run."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.sync_api import Browser, Page, expect

from sdpo_megatron.report import write_report
from tests.synthetic_run import synthetic_run
from tests.tiny_model import make_tokenizer

RUN = "window.owned = 1; alert('owned'); fetch('http://127.0.0.1:9/owned')"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script><!--",
    f'<img src=x onerror="{RUN}"><svg onload="{RUN}"><iframe srcdoc="<script>parent.owned=1</script>">',
    f'"); {RUN}; //',
    f"'); {RUN}; //\\",
    f"\u2028{RUN}\u2029{RUN}",
    f"<a href=\"javascript:{RUN}\">press</a> <meta http-equiv=refresh content='0;url=https://example.com'>",
    "<style>* { display: none }</style><base href='https://example.com/'>",
    "\x1b[2J\x1b]0;owned\x07 \x9b31m \x00 \x08\x7f",
    "safe \u202e\u2066txt.exe\u2069\u202c \u200f\ufeff\u00ad \U000e0041",
    "${owned} {{owned}} __proto__ constructor",
    "Z" + "\u0335\u0321\u0489" * 400 + " \r\n tab\there",
]
SURROGATES = "\ud800 and \udc00 alone"
LONG = "x" * 10_000_000
Open = Callable[..., Page]
TEXT = """box => [...box.childNodes]
    .filter(node => node.nodeType === 3 || !node.matches(".mark, .joined")).map(node => node.textContent).join("")"""
"""The text without the marks between tokens, and without the dots of tokens that end a character."""


def hostile_texts(step: int) -> list[list[str]]:
    return [HOSTILE, [*HOSTILE[:-2], SURROGATES, LONG]]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("hostile")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path / "model")
    run = synthetic_run(
        path / "<img src=x onerror=alert(1)>",
        hostile_texts,
        steps=1,
        encode=lambda text: tokenizer.encode(text[:5000].encode(errors="replace").decode()),
        model=str(path / "model"),
        feedback=HOSTILE[1] + SURROGATES,
    )
    return write_report(run).as_uri()


def nothing_ran(page: Page) -> None:
    assert page.evaluate("window.owned") is None
    assert page.evaluate("document.scripts.length") == 1
    assert (
        page.evaluate("document.querySelectorAll('img, iframe, base, meta[http-equiv=refresh]').length") == 0
    )
    assert page.evaluate("document.styleSheets.length") == 1
    # every attribute that could run something was ours
    assert page.evaluate(
        "[...document.querySelectorAll('a')].every(a => a.getAttribute('href').startsWith('#'))"
    )
    assert not page.evaluate(
        "[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))"
    )


@pytest.mark.parametrize(
    "address", ["", "#/train/0", "#/train/0/0", "#/train/0/1", "#/eval/0/0", "#/problems"]
)
def test_nothing_runs_in_any_view(opened: Open, url: str, address: str):
    page = opened(f"{url}{address}")
    page.locator("main > div").wait_for()
    if address == "#/train/0":
        page.get_by_role("button", name="responses").click()
        expect(page.locator(".rows .row").first).to_contain_text("<script>window.owned")
    nothing_ran(page)


@pytest.mark.parametrize("group", [0, 1])
def test_each_response_is_shown_as_it_is(opened: Open, url: str, group: int):
    """With tokens in the first group, as text in the second."""
    page = opened(f"{url}#/train/0/{group}/0")
    for g, text in enumerate(HOSTILE[:8]):
        page.evaluate(f"location.hash = '#/train/0/{group}/{g}'")
        expect(page.locator("header nav")).to_contain_text(f"response {12 * group + g}")
        shown = page.locator(".tokens" if group == 0 else ".fold .said").first
        expected = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        assert shown.evaluate(TEXT) == expected
        nothing_ran(page)


def test_what_would_not_be_seen_is_an_escape(opened: Open, url: str):
    page = opened(f"{url}#/train/0/1/8")
    expect(page.locator(".fold .said").first).to_have_text(
        r"\x1b[2J\x1b]0;owned\x07 \x9b31m \x00 \x08\x7f", use_inner_text=True
    )
    page = opened(f"{url}#/train/0/1/9")
    expect(page.locator(".fold .said").first).to_have_text(
        r"safe \u202e\u2066txt.exe\u2069\u202c \u200f\ufeff\xad \u{e0041}", use_inner_text=True
    )
    page = opened(f"{url}#/train/0/1/10")
    expect(page.locator(".fold .said").first).to_have_text(r"\ud800 and \udc00 alone", use_inner_text=True)


def test_10_mb_on_one_line_is_cut_and_grows_when_asked(opened: Open, url: str):
    page = opened(f"{url}#/train/0/1/11")
    more = page.get_by_role("button", name="show more").first
    expect(more).to_have_text("show more (9,980,000 characters left)")
    more.click()
    expect(more).to_have_text("show more (9,780,000 characters left)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.evaluate("location.hash = '#/train/0/1'")
    expect(page.locator(".card")).to_have_count(12)


def test_a_terminal_is_not_steered(url: str):
    root = Path(__file__).parents[2]
    run = Path(unquote(url.removeprefix("file://"))).parents[1]
    command = [sys.executable, str(root / "tools/show_rollouts.py"), str(run), "--step", "0", "--limit", "0"]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=60, check=True)
    said = done.stdout.decode()
    assert not [char for char in said if not char.isprintable() and char != "\n"]
    assert r"\x1b[2J\x1b]0;owned\x07" in said and r"\u202e" in said and r"\ud800" in said
    assert len(said) < 200_000


def test_the_policy_of_the_page_refuses_whatever_is_not_its_own(chromium: Browser, url: str):
    """The second wall: had a text become markup, its scripts would still not run, nor anything be fetched."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(url)
    page.locator("main > div").wait_for()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        page.evaluate(
            """address => {
                const script = document.createElement("script");
                script.textContent = "window.owned = 1";
                document.body.append(script);
                document.body.insertAdjacentHTML("beforeend", `<img src="${address}" onerror="window.owned = 1">
                    <link rel="stylesheet" href="${address}"><a id="bad" href="javascript:window.owned = 1">x</a>`);
                document.getElementById("bad").click();
                fetch(address).catch(() => 0);
            }""",
            f"http://127.0.0.1:{server.getsockname()[1]}/",
        )
        # nobody comes
        with pytest.raises(TimeoutError):
            server.accept()
    assert page.evaluate("window.owned") is None
    context.close()
