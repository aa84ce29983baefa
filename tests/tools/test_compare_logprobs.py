"""tools/compare_logprobs.py: right servers pass, wrong ones do not, and it says where."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from sdpo_megatron.serving.canary import FLOAT32
from sdpo_megatron.serving.engines_compared import Part, Token, judge, texts_of
from sdpo_megatron.trainer.alone import ONLY_RANK
from tests.stand_in_server import stand_in_python

pytestmark = pytest.mark.distributed


def token(
    place: int, gap: float, part: Part = "read", noise: float = 0.0, likeliest: tuple[int, int] = (1, 1)
) -> Token:
    return Token(
        part=part,
        text=0,
        place=place,
        id=1,
        server=-2.0 + gap,
        trainer=-2.0,
        float32=-2.0 + noise,
        server_likeliest=likeliest[0],
        trainer_likeliest=likeliest[1],
        margin=0.25,
    )


def test_a_gap_is_held_against_rounding_of_the_same_tokens():
    small = judge([token(k, 0.9e-4) for k in range(16)], 4.0)
    assert small.agree and all(row.allowed.mean == 4.0 * FLOAT32.mean for row in small.rows)
    large = judge([token(k, 1.1e-4) for k in range(16)], 4.0)
    assert not large.agree and "differ by 0.00011 nats in the mean" in large.reasons[0]
    assert judge([token(k, 0.1, noise=0.03) for k in range(16)], 4.0).agree
    assert not judge([token(k, 0.13, noise=0.03) for k in range(16)], 4.0).agree
    assert not judge([token(k, float("nan"), noise=0.03) for k in range(16)], 4.0).agree


@pytest.mark.parametrize("gap", [0.5, 0.03])
def test_a_trainer_that_is_wrong_itself_explains_nothing(gap):
    """The server says what float32 says: it is right, or computes in another type."""
    assert not judge([token(k, gap, noise=gap) for k in range(16)], 4.0).agree


def test_what_is_wrong_at_one_depth_alone_is_seen_there():
    """Mean and quantile of all tokens pass: 60 of 2,000 are apart."""
    tokens = [token(k, 0.15 if k >= 1024 else 0.0, noise=0.02) for k in range(1084)] + [
        token(k, 0.0, noise=0.02) for k in range(916)
    ]
    verdict = judge(tokens, 4.0)
    assert [(row.first, row.apart) for row in verdict.rows if row.last is not None] == [
        *((0, False), (16, False), (128, False), (1024, True)),
    ]
    assert verdict.reasons == [
        "on the 60 tokens read from place 1024 on they differ by 0.15 nats in the mean and by 0.15 on a tenth of them; "
        "rounding explains 0.08 and 0.08"
    ]


def test_the_parts_are_judged_alone_and_likeliest_tokens_counted():
    tokens = [token(k, 0.0, likeliest=(1, 2 if k == 3 else 1)) for k in range(10)]
    verdict = judge([*tokens, *(token(k, 1.0, part="sampled") for k in range(2))], 4.0)
    of_all = {row.part: row for row in verdict.rows if row.last is None}
    assert (of_all["read"].asked, of_all["read"].agreed, of_all["read"].margin) == (10, 9, 0.25)
    assert not of_all["read"].apart and of_all["sampled"].apart
    assert all("tokens sampled" in reason for reason in verdict.reasons)


def test_the_texts_do_not_overlap():
    texts = texts_of(range(1000), 500)
    assert [len(text) for text in texts] == [500, 64, 64, 64, 64]
    assert sum(texts, []) == list(range(756))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_server_agrees(a_server, tiny_model, tool, tmp_path, dtype):
    """The stand-in, which computes with transformers: one that runs, and one that is started."""
    model, before = tiny_model("qwen3", tie_embeddings=False), dict(os.environ)
    if dtype == "float32":
        server = ("--server", a_server(model, dtype))
    else:
        server = ("--python", stand_in_python(tmp_path / "python"))
    code, out, err = tool("compare_logprobs", model, *server, "--dtype", dtype, "--tokens", 300, "--json")
    found = json.loads(out)
    assert code == 0 and found["agree"] and found["reasons"] == []
    assert "By its hashes the server holds these weights (" in err
    read = [token for token in found["tokens"] if token["part"] == "read"]
    sampled = [token for token in found["tokens"] if token["part"] == "sampled"]
    assert len(read) == 299 + 4 * 63 and 4 <= len(sampled) <= 4 * 64
    assert {token["place"] for token in read if token["text"] == 0} == set(range(1, 300))
    assert min(token["place"] for token in sampled) == 24
    rows = {(row["part"], row["first"], row["last"]): row for row in found["rows"]}
    assert {key[1] for key in rows if key[0] == "read"} == {0, 16, 128}
    whole = rows["read", 0, None]
    assert whole["tokens"] == len(read) and whole["asked"] == whole["tokens"]
    assert whole["agreed"] == whole["asked"] if dtype == "float32" else whole["agreed"] > 0.9 * whole["asked"]
    # it leaves nothing of a rank behind
    assert {name: os.environ.get(name) for name in ONLY_RANK} == {
        name: before.get(name) for name in ONLY_RANK
    }


def test_other_weights_and_another_rope_do_not(a_server, tiny_model, tool, tmp_path):
    model, other = tiny_model(), tiny_model(seed=1)
    options = ("--dtype", "float32", "--tokens", "64", "--samples", "8")
    code, out, _ = tool("compare_logprobs", model, "--server", a_server(other, "float32"), *options)
    assert (
        code == 1
        and "apart: the server holds other weights in 26 of 26 parameters, such as model.embed" in out
    )
    assert "do NOT compute the same in float32: do not train before you know why.\n" in out
    # what tells a server of another rope is not its weights
    turned = shutil.copytree(model, tmp_path / "model")
    config = json.loads((turned / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (turned / "config.json").write_text(json.dumps(config))
    url = a_server(turned, "float32")
    for path in turned.iterdir():
        # as on another machine
        path.rename(path.with_name(f"hidden-{path.name}"))
    code, out, err = tool("compare_logprobs", model, "--server", url, *options)
    assert code == 1 and "the server holds these weights" in err and "holds other weights" not in out
    assert "  APART\n" in out and "apart: on the 315 tokens read they differ by" in out
    assert re.search(r"apart: on the \d+ tokens sampled they differ by", out)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["{nothing}"],
            "error: MODEL: there is no directory {nothing}; give a Hugging Face model directory.",
        ),
        (
            ["{model}", "--server", "http://127.0.0.1:9"],
            "error: no server answers at http://127.0.0.1:9; start it,",
        ),
        (
            ["{model}", "--server", "nonsense"],
            "error: server.urls holds 'nonsense'; write it as http://HOST:PORT.",
        ),
        (["{model}", "--python", "no/python"], "error: server.python: there is no program no/python in this"),
        (["{model}", "--text", "{text}"], "error: the text has "),
        (["{bare}"], "error: MODEL: {bare} has no tokenizer.json; download the model's tokenizer into it."),
        (["{model}", "--tokens", "3"], "compare_logprobs.py: error: --tokens must be at least 32"),
    ],
)
def test_mistakes_are_one_line(arguments, line, tiny_model, tool, tmp_path: Path):
    (tmp_path / "text").write_text("too short")
    bare = shutil.copytree(
        tiny_model(), tmp_path / "bare", ignore=lambda at, names: [n for n in names if "token" in n]
    )
    places = {"nothing": tmp_path / "nothing", "model": tiny_model(), "text": tmp_path / "text", "bare": bare}
    code, out, err = tool("compare_logprobs", *(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith(line.format(**places))
