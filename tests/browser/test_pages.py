"""The report as a person walks through it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from sdpo_megatron.report import write_report
from tests.synthetic_run import synthetic_run
from tests.tiny_model import make_tokenizer


def texts(step: int) -> list[list[str]]:
    return [[f"The answer {p} of step {step} is response{p * 4 + g}." for g in range(4)] for p in range(6)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path / "model")
    model = str(path / "model")
    run = synthetic_run(
        path / "walk", texts, steps=4, recorded_groups=2, encode=tokenizer.encode, model=model
    )
    return write_report(run).as_uri()


Open = Callable[..., Page]


def test_from_the_trend_to_a_token_and_to_the_same_problem_at_another_step(opened: Open, url: str):
    page = opened(url)
    expect(page.locator(".chart h3").first).to_have_text("Reward")
    expect(page.locator(".warnings")).to_have_text("▼ low entropy in step 1")
    # a click at the right third of a trend leads to its step
    plot = page.locator(".chart .hit").first
    box = plot.bounding_box()
    assert box is not None
    plot.hover(position={"x": box["width"] * 0.5, "y": 60})
    expect(page.locator("#tip")).to_contain_text("step 2")
    plot.click(position={"x": box["width"] * 0.5, "y": 60})
    expect(page).to_have_url(f"{url}#/train/2")
    expect(page.locator("[role=status]")).to_have_text("24 of 24 responses, in 6 groups")
    page.locator(".rows .row").nth(1).click()
    expect(page).to_have_url(f"{url}#/train/2/1")
    expect(page.locator(".card")).to_have_count(4)
    expect(page.locator(".card.right")).to_have_count(2)
    expect(page.locator(".history a")).to_have_text(["train 0", "train 1", "train 3"])
    page.locator(".cardhead").nth(2).click()
    expect(page).to_have_url(f"{url}#/train/2/1/2")
    page.locator(".token").nth(2).hover()
    for name in ("student", "teacher", "server", "advantage", "divergence"):
        expect(page.locator("#tip")).to_contain_text(name)
    expect(page.locator("#tip tr", has_text="server")).to_contain_text("-0.5")
    expect(page.locator("main")).to_contain_text("Solution: response 4")
    expect(page.locator("main")).to_contain_text(
        "<|im_start|>user Solution of [7, 4]<|im_end|>", use_inner_text=True
    )
    expect(page.locator(".mark")).to_have_text("the teacher's context ends here")
    page.keyboard.press("u")
    page.locator(".history a").first.click()
    expect(page).to_have_url(f"{url}#/train/0/1")


def test_tokens_are_coloured_by_what_is_chosen(opened: Open, url: str):
    page = opened(f"{url}#/train/1/0/1")

    def colours() -> list[str]:
        return page.locator(".token").evaluate_all(
            "tokens => tokens.map(token => token.style.backgroundColor)"
        )

    page.locator(".token").first.wait_for()
    by_advantage = colours()
    assert any("--blue" in colour for colour in by_advantage)
    assert any("--orange" in colour for colour in by_advantage)
    page.get_by_role("button", name="divergence").click()
    assert all("--violet" in colour for colour in colours())
    page.keyboard.press("c")
    assert not any(colours())
    assert "".join(page.locator(".token").all_inner_texts()) == texts(1)[0][1]
    page.keyboard.press("c")
    assert colours() == by_advantage
    # what has no numbers changes nothing of the choice
    page.evaluate("location.hash = '#/train/1/5'")
    expect(page.locator("main")).to_contain_text("Nothing was recorded per token")
    page.keyboard.press("ArrowLeft")
    page.evaluate("location.hash = '#/train/1/0/1'")
    page.locator(".token").first.wait_for()
    assert colours() == by_advantage


def test_filters_sorting_and_search(opened: Open, url: str):
    page = opened(f"{url}#/train/1")
    status = page.locator("[role=status]")
    page.get_by_role("button", name="responses").click()
    expect(page.locator(".rows .row").first).to_contain_text("response0")
    for flag, count in (("wrong", 12), ("truncated", 6), ("no teacher", 6), ("per token", 8), ("all", 24)):
        page.get_by_role("button", name=flag, exact=True).click()
        expect(status).to_have_text(f"{count} of 24 responses, in {2 if flag == 'per token' else 6} groups")
    page.get_by_role("button", name="largest divergence").click()
    texts = page.locator(".rows .row > :nth-child(4)").all_inner_texts()[:8]
    numbers = [float(text) for text in texts if text != "–"]
    # of eight that were recorded per token two had no teacher
    assert len(numbers) == 6 and numbers == sorted(numbers, reverse=True) and texts[6:] == ["–", "–"]
    page.keyboard.press("/")
    page.keyboard.type("response13")
    expect(status).to_contain_text("1 in what the list shows")
    page.keyboard.press("Enter")
    expect(status).to_have_text("1 of 24 responses, in 1 groups")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{url}#/train/1/3/1")


def test_the_keyboard_alone(opened: Open, url: str):
    page = opened(url)
    page.locator(".chart").first.wait_for()
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()
    for key, address in (
        *(("j", ""), ("j", ""), ("Enter", "/train/1"), ("ArrowRight", "/train/2"), ("ArrowLeft", "/train/1")),
        *(
            ("j", "/train/1"),
            ("ArrowDown", "/train/1"),
            ("Enter", "/train/1/1"),
            ("ArrowRight", "/train/1/2"),
        ),
        *(("u", "/train/1"), ("Escape", "/")),
    ):
        page.keyboard.press(key)
        expect(page).to_have_url(f"{url}#{address}" if address else url)
        page.wait_for_timeout(100)


def test_problems_by_name(opened: Open, url: str):
    page = opened(f"{url}#/problems")
    expect(page.locator(".rows .row")).to_have_count(7)
    page.get_by_role("searchbox").fill("p4")
    page.locator(".rows .row").click()
    expect(page.locator(".history a")).to_have_count(4)


def test_a_link_leads_to_no_file_but_the_reports(opened: Open, url: str):
    page = opened(f"{url}#/..%2F..%2Fother/1")
    expect(page.locator(".notes")).to_have_text(
        "This run has no such step. The report may be older than the link."
    )


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_and_wide_and_can_be_read_light_and_dark(
    opened: Open, url: str, width: int, scheme: str
):
    for address in ("", "#/train/1", "#/train/1/0", "#/train/1/0/1", "#/problems"):
        page = opened(f"{url}{address}", width=width, scheme=scheme)
        page.locator("main > div").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        back, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (light(back) > light(ink)) == (scheme == "light")
        assert abs(light(back) - light(ink)) > 150
        page.context.close()


def light(colour: str) -> float:
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_a_step_whose_files_are_gone_says_so(opened: Open, url: str, tmp_path: Path):
    run = synthetic_run(tmp_path / "x", texts, steps=1)
    index = write_report(run)
    (run / "report/train/000000/0000.js").write_text("")
    page = opened(f"{index.as_uri()}#/train/0/0")
    expect(page.locator(".notes")).to_contain_text("train/000000/0000.js is missing or damaged")
