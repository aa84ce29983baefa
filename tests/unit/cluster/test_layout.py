"""Who trains and who serves where, for clusters that nobody has here."""

from typing import Any

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.layout import FIRST_PORT, PORTS_EACH, Layout, first_port_of, plan_layout
from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import ConfigError


def hardware(**values: Any) -> HardwareSettings:
    return HardwareSettings.model_validate(values)


def served(layout: Layout) -> list[tuple[int, tuple[int, ...]]]:
    return [(place.node, place.gpus) for place in layout.servers]


def test_colocated_all_gpus_train_and_all_serve():
    layout = plan_layout(hardware(nodes=2, gpus_per_node=4), ParallelSettings(tp=2, dp=4), 2)
    assert [(place.node, place.gpu) for place in layout.ranks] == [(n, g) for n in (0, 1) for g in range(4)]
    assert served(layout) == [(0, (0, 1)), (0, (2, 3)), (1, (0, 1)), (1, (2, 3))]
    assert layout.trainer_nodes == [0, 1] and layout.ranks_per_node == 4


def test_split_nodes_have_both():
    layout = plan_layout(
        hardware(nodes=2, gpus_per_node=8, placement="split_node", server_gpus_per_node=2),
        *(ParallelSettings(tp=2, pp=3, dp=2), 1),
    )
    assert [place.gpu for place in layout.ranks] == [2, 3, 4, 5, 6, 7] * 2
    assert [place.node for place in layout.ranks] == [0] * 6 + [1] * 6
    assert served(layout) == [(n, (g,)) for n in (0, 1) for g in (0, 1)]


def test_separate_nodes_train_first_and_the_first_host_is_the_master():
    layout = plan_layout(
        hardware(nodes=16, gpus_per_node=8, placement="separate_nodes", server_nodes=4),
        *(ParallelSettings(tp=8, pp=2, dp=6), 4),
    )
    assert layout.trainer_nodes == [*range(12)] and layout.ranks[0].node == 0 and len(layout.ranks) == 96
    assert sorted({place.node for place in layout.servers}) == [12, 13, 14, 15] and len(layout.servers) == 8
    hosts = [f"h{node}" for node in range(16)]
    first = first_port_of(0, 0)
    assert layout.urls(hosts)[:3] == [
        f"http://h12:{first + 1}",
        f"http://h12:{first + 2}",
        f"http://h13:{first + 1}",
    ]


def test_on_cpus_ranks_are_shared_out_and_each_node_that_serves_has_a_server():
    layout = plan_layout(
        hardware(nodes=3, placement="separate_nodes", server_nodes=1), ParallelSettings(pp=2, dp=2), 1
    )
    assert [(place.rank, place.node, place.gpu) for place in layout.ranks] == [
        *((0, 0, None), (1, 0, None), (2, 1, None), (3, 1, None))
    ]
    assert served(layout) == [(2, ())]


def test_one_machine_is_the_same_code():
    layout = plan_layout(hardware(), ParallelSettings(dp=2), 1)
    assert len(layout.ranks) == 2 and served(layout) == [(0, ())]


def test_another_attempt_has_other_ports_and_a_job_has_enough():
    for job in (1, 77, 123456, 999999):
        ports = {first_port_of(job, attempt) for attempt in range(100)}
        assert len(ports) == 100
        assert min(ports) >= FIRST_PORT and max(ports) + PORTS_EACH <= 32768
    layout = plan_layout(hardware(gpus_per_node=8), ParallelSettings(dp=8), 1, job=77, attempt=3)
    used = [layout.master_port, *(place.port for place in layout.servers)]
    assert len(set(used)) == 9 and max(used) < layout.master_port + PORTS_EACH


@pytest.mark.parametrize(
    ("values", "sizes", "server_tp", "message"),
    [
        (
            {"nodes": 2, "gpus_per_node": 8},
            {"tp": 2, "dp": 4},
            1,
            "The trainer has 8 ranks (parallel.dp * pp * tp), but the hardware has 16 GPUs for it (2 nodes with 8): "
            "set parallel.dp=8, or change hardware.nodes.",
        ),
        (
            {"nodes": 1, "gpus_per_node": 8},
            {"tp": 3, "dp": 2},
            1,
            "The trainer has 6 ranks (parallel.dp * pp * tp), but the hardware has 8 GPUs for it (1 node with 8): "
            "parallel.tp * pp = 3 must divide 8, or change hardware.nodes.",
        ),
        (
            {"nodes": 2, "gpus_per_node": 4},
            {"tp": 8, "dp": 1},
            1,
            "parallel.tp is 8, but each node trains with 4 ranks, and a tensor-parallel group must lie on one node: "
            "take a parallel.tp that divides 4.",
        ),
        (
            {"nodes": 1, "gpus_per_node": 8},
            {"tp": 1, "dp": 8},
            3,
            "server.tp is 3, but each node that serves has 8 GPUs for servers, and a server must lie on one node: take "
            "a server.tp that divides 8.",
        ),
        (
            {"nodes": 2},
            {"tp": 1, "dp": 3},
            1,
            "The trainer has 3 ranks (parallel.dp * pp * tp), which 2 nodes cannot share evenly: change "
            "parallel.dp, or hardware.nodes.",
        ),
    ],
)
def test_what_does_not_fit(values: dict[str, Any], sizes: dict[str, int], server_tp: int, message: str):
    with pytest.raises(ConfigError) as raised:
        plan_layout(hardware(**values), ParallelSettings.model_validate(sizes), server_tp)
    assert str(raised.value) == message
