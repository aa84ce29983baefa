"""Ranks fail together, and each knows where it stands."""

import pytest

from tests.ranks import run_ranks


def test_every_rank_raises_what_one_of_them_did():
    zero, one, two = run_ranks(3, "tests.distributed.parallel:fail_everywhere")
    alike = [
        ["ConfigError", "mend\\nthis", "None"],
        ["RunFailed", "the end", "None"],
        ["ServerRefused", "no", "None"],
        ["ServerLost", "first", "None"],
        ["Stopped", "", "None"],
        ["PeerLost", "gone", "None"],
    ]
    assert one[:6] == alike
    assert zero[1:6] == alike[1:]
    assert zero[0] == ["ConfigError", "mend\\nthis\nend of a log", "None"]
    assert two[:3] == alike[:3] and two[4:6] == alike[4:]
    assert two[3] == ["ServerLost", "first", "RunFailed('second')"], "a rank's own failure stays as the cause"


def test_a_bug_of_one_rank_is_raised_there_and_ends_the_others():
    zero, one, two = run_ranks(3, "tests.distributed.parallel:fail_everywhere")
    lost = "Rank 1 failed (ValueError: a bug); its log says more."
    assert one[6] == ["ValueError", "a bug", "None"]
    assert zero[6] == ["PeerLost", lost, "ServerLost('first')"]
    assert two[6] == ["PeerLost", lost, "None"]


def test_that_all_went_well_costs_one_reduction():
    assert run_ranks(2, "tests.distributed.parallel:succeed_everywhere") == [[7, 1], [8, 1]]


@pytest.mark.parametrize(
    ("layout", "ranks", "first_replicas", "leaders", "owners"),
    [
        ({"dp": 2}, 2, [0], [0], [0, 1]),
        ({"tp": 2}, 2, [0, 1], [0], [0]),
        ({"pp": 2}, 2, [0, 1], [0, 1], [1]),
        ({"cp": 2}, 2, [0], [0], [0, 1]),
        ({"dp": 2, "ep": 2}, 2, [0], [0], [0, 1]),
        ({"tp": 2, "cp": 2}, 4, [0, 1], [0], [0, 2]),
        ({"pp": 2, "vpp": 2}, 2, [0, 1], [0, 1], [1]),
    ],
)
def test_each_rank_knows_its_place_and_its_duties(layout, ranks, first_replicas, leaders, owners):
    places = run_ranks(ranks, "tests.distributed.parallel:place", layout)
    for name in ("tp", "pp", "dp", "cp", "ep", "vpp"):
        assert {place[name] for place in places} == {layout.get(name, 1)}
        if name != "vpp":
            assert {place[f"{name}_rank"] for place in places} == set(range(layout.get(name, 1)))
    for duty, expected in (
        ("is_first_replica", first_replicas),
        ("leads_stage", leaders),
        ("owns_tokens", owners),
    ):
        assert [rank for rank, place in enumerate(places) if place[duty]] == expected, duty


def test_ranks_wait_for_rank_0_longer_than_for_each_other():
    """It samples and grades for as long as that takes."""
    assert run_ranks(2, "tests.distributed.parallel:wait_for_rank_0") == [7, 7]


@pytest.mark.parametrize(
    "layout", [{}, {"dp": 2}, {"dp": 2, "pp": 2}, {"dp": 2, "tp": 2}, {"dp": 3}], ids=str
)
def test_each_rank_has_its_own_tokens_and_rank_0_gets_what_is_recorded(layout):
    ranks = layout.get("dp", 1) * layout.get("tp", 1) * layout.get("pp", 1)
    results = run_ranks(ranks, "tests.distributed.parallel:spread_and_gathered", layout)
    places = run_ranks(ranks, "tests.distributed.parallel:place", layout)
    own = {place["dp_rank"]: result["own"] for place, result in zip(places, results, strict=True)}
    assert all(own[place["dp_rank"]] == result["own"] for place, result in zip(places, results, strict=True))
    assert sorted(k for ids in own.values() for k in ids) == [0, 1, 4, 5], "once, and none without a signal"
    ids = [[10.0 * k + t for t in range(k + 2)] for k in range(6)]
    known = [ids[k] if k not in (2, 3) else [0.0] * len(ids[k]) for k in range(6)]
    for found, samples in zip(results[0]["found"], (6, 3, 0), strict=True):
        flat = [value for row in known[:samples] for value in row]
        computed = [float(k not in (2, 3)) for k in range(samples) for _ in ids[k]]
        assert found == {"student": flat, "teacher": [value / 2 for value in flat], "computed": computed}
    assert all(result["found"] == [{}, {}, {}] for result in results[1:])
    # 27 response tokens, of which the 18 of the first and the third group are learned from
    metrics = results[0]["metrics"]
    assert metrics["perf/response_tokens"] == 27 and metrics["perf/trained_tokens"] == 18
    assert metrics["signal/group_fraction"] == pytest.approx(2 / 3)
    gaps = [abs(value + 1.0) for k in (0, 1, 4, 5) for value in ids[k]]
    assert metrics["rollout_gap/mean"] == pytest.approx(sum(gaps) / 18)
    assert metrics["rollout_gap/max"] == max(gaps)
    assert all(result["metrics"] == metrics for result in results)
