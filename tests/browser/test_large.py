"""100 steps of 2,048 responses of 2,000 tokens: the report is made a step at a time, and opens at once."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from sdpo_megatron.report import write_report
from sdpo_megatron.report.step_pages import source_of
from tests.synthetic_run import row, synthetic_run
from tests.tiny_model import make_tokenizer

STEPS, GROUPS, SIZE, TOKENS, RECORDED = 100, 256, 8, 2000, 16
OPENS_S, WRITES_S = 2.0, 60.0


def texts(step: int) -> list[list[str]]:
    """Of some 8,000 characters each."""
    words = random.Random(0).choices(["the", "sum", "of", "both", "is", "42,", "because", "wait"], k=TOKENS)
    said = " ".join(words)
    return [[f"response {p * SIZE + g} {said}" for g in range(SIZE)] for p in range(GROUPS)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first step's pages are made, within a bounded time; the other steps have the same, as links."""
    path = tmp_path_factory.mktemp("large")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path / "model")
    whole = tokenizer.encode(texts(0)[0][0])
    ids = (whole * (TOKENS // len(whole) + 1))[:TOKENS]
    run = synthetic_run(
        *(path / "large", texts),
        **{"steps": 1, "recorded_groups": RECORDED, "encode": lambda text: ids, "model": str(path / "model")},
    )
    began = time.monotonic()
    write_report(run)
    assert time.monotonic() - began < WRITES_S
    records, pages = run / "rollouts/train", run / "report/train"
    done = json.loads((pages / "000000/done.json").read_text())
    for step in range(1, STEPS):
        (pages / f"{step:06d}").mkdir()
        for file in (pages / "000000").glob("*.js"):
            # each file says its own name
            content = file.read_text(encoding="ascii")
            if file.name == "step.js" or step == 50:
                content = content.replace("train/000000/", f"train/{step:06d}/", 1)
                (pages / f"{step:06d}" / file.name).write_text(content, encoding="ascii")
            else:
                os.link(file, pages / f"{step:06d}" / file.name)
        for suffix in ("jsonl", "npz"):
            os.link(records / f"000000.{suffix}", records / f"{step:06d}.{suffix}")
        facts = done | {"source": source_of(records / f"{step:06d}.jsonl")}
        (pages / f"{step:06d}/done.json").write_text(json.dumps(facts))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row(step, STEPS)) + "\n" for step in range(STEPS)))
    began = time.monotonic()
    index = write_report(run)
    # nothing but the summary is written again
    assert time.monotonic() - began < 10
    return index.as_uri()


def test_it_opens_and_scrolls_at_once(chromium_page: Callable[[], Page], url: str):
    times = []
    for _ in range(3):
        page = chromium_page()
        began = time.monotonic()
        page.goto(url)
        page.locator(".chart path").first.wait_for()
        page.locator(".rows .row").first.wait_for()
        times.append(time.monotonic() - began)
    assert min(times) < OPENS_S, times
    began = time.monotonic()
    page.goto(f"{url}#/train/50")
    expect(page.locator("[role=status]")).to_have_text("2,048 of 2,048 responses, in 256 groups")
    page.get_by_role("button", name="responses").click()
    port = page.locator(".port")
    port.evaluate("port => port.scrollTop = 1500 * 34")
    expect(page.locator("a[href='#/train/50/187/6']")).to_be_visible()
    assert page.locator(".rows .row").count() < 100
    assert time.monotonic() - began < 2 * OPENS_S
    began = time.monotonic()
    page.goto(f"{url}#/train/50/3/1")
    expect(page.locator(".token")).to_have_count(TOKENS)
    page.goto(f"{url}#/train/50/255")
    expect(page.locator(".card")).to_have_count(SIZE)
    assert time.monotonic() - began < 3 * OPENS_S


def test_all_texts_of_a_step_are_searched(chromium_page: Callable[[], Page], url: str):
    page = chromium_page()
    page.goto(f"{url}#/train/50")
    page.get_by_role("searchbox").fill("response 2047 ")
    page.keyboard.press("Enter")
    expect(page.locator("[role=status]")).to_have_text("1 of 2,048 responses, in 1 groups", timeout=20_000)


@pytest.fixture
def chromium_page(opened: Callable[..., Page]) -> Callable[[], Page]:
    return lambda: opened("about:blank")


def test_a_report_is_made_a_step_at_a_time(tmp_path: Path):
    """Memory does not grow with the number of steps."""
    import tracemalloc

    def peak(steps: int) -> int:
        run = synthetic_run(tmp_path / str(steps), lambda step: [[("x" * 2000)] * 8] * 32, steps=steps)
        tracemalloc.start()
        write_report(run)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(12) < 1.3 * peak(2)
