"""What `sinfo` prints, and requests that can never run."""

import math

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.partitions import check_request, parse_gpus, parse_partitions
from sdpo_megatron.errors import ConfigError, RunFailed

# what a real Slurm 22.05 of four nodes printed, one of them drained and one with a feature
FOUR_NODES = """\
main*|up|infinite|1-infinite|UNLIMITED|1|drained|16|16000|gpu:2|(null)
main*|up|infinite|1-infinite|UNLIMITED|2|idle|16|16000|gpu:2|(null)
main*|up|infinite|1-infinite|UNLIMITED|1|idle|16|16000|gpu:2|fast
high|down|infinite|1-infinite|UNLIMITED|1|drained|16|16000|gpu:2|(null)
high|down|infinite|1-infinite|UNLIMITED|3|idle|16|16000|gpu:2|fast
short|up|2:00|1-infinite|UNLIMITED|4|idle|16|16000|gpu:2|(null)
"""
# in the form of larger sites
MIXED = """\
cpu|up|2-00:00:00|1-8|UNLIMITED|100|mixed|128|515000|(null)|rome,ib
gpu|up|1-00:00:00|1-infinite|UNLIMITED|8|idle|96|1000000|gpu:h100:8(S:0-1),nvme:1|ib,h100
gpu|up|1-00:00:00|1-infinite|UNLIMITED|2|allocated|64|500000|gpu:a100:4(S:0,2)|ib,a100,big
gpu|up|1-00:00:00|1-infinite|UNLIMITED|1|down*|64|2000000|gpu:a100:8|ib,a100
gone|inact|infinite|1-infinite|UNLIMITED|0|n/a|0|0|(null)|(null)
"""


def asked(**values: object) -> HardwareSettings:
    return HardwareSettings.model_validate({"time_limit": "00:01:00"} | values)


def test_what_a_real_sinfo_prints():
    main, high, short = parse_partitions(FOUR_NODES)
    assert (main.name, main.is_default, main.availability) == ("main", True, "up")
    assert main.time_limit_s == main.most_nodes == math.inf
    assert [(kind.count, kind.is_up) for kind in main.nodes] == [(1, False), (2, True), (1, True)]
    last = main.nodes[-1]
    assert (last.cpus, last.memory_mb, last.gpus, last.features) == (16, 16000, {"": 2}, {"fast"})
    assert (high.is_default, high.availability, short.time_limit_s) == (False, "down", 120)


def test_other_sites():
    cpu, gpu, gone = parse_partitions(MIXED)
    assert (cpu.time_limit_s, cpu.most_nodes, gone.nodes) == (2 * 86400, 8, ())
    assert [kind.gpus for kind in gpu.nodes] == [{"h100": 8}, {"a100": 4}, {"a100": 8}]
    # the partition's own bound of CPUs per node
    (bound,) = parse_partitions("p|up|1|1|4|1|idle~|16+|9000|(null)|(null)")
    assert (bound.nodes[0].cpus, bound.most_nodes, bound.nodes[0].is_up) == (4, 1, True)


def test_what_is_no_answer_of_sinfo():
    with pytest.raises(RunFailed, match=r"sinfo answers 'main idle', which has not the 11 fields"):
        parse_partitions("main idle")


def test_gpus():
    assert parse_gpus("(null)") == {}
    assert parse_gpus("gpu:2") == {"": 2} and parse_gpus("gpu") == {"": 1}
    both = "gpu:h100:4(S:0,1),gpu:a100:2,shard:h100:16(S:0-1)"
    assert parse_gpus(both) == {"h100": 4, "a100": 2}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"nodes": 4, "gpus_per_node": 2, "cpus_per_node": 16, "memory_gb_per_node": 16.0},
        {"partition": "short", "time_limit": "00:02:00"},
        {"constraint": "fast"},
        {"nodes": 3, "partition": "high,main"},
    ],
)
def test_what_can_run(values: dict[str, object]):
    check_request(asked(**values), parse_partitions(FOUR_NODES))


def test_what_waits_for_nodes_that_are_down_is_said():
    assert check_request(asked(nodes=3), parse_partitions(FOUR_NODES)) is None
    assert check_request(asked(nodes=4), parse_partitions(FOUR_NODES)) == (
        "The job will wait: of the 4 nodes of partition main that have what it asks, 3 are up now."
    )


@pytest.mark.parametrize(
    ("sinfo", "values", "message"),
    [
        (
            FOUR_NODES,
            {"partition": "gpux"},
            "hardware.partition is gpux, which this cluster does not have: take one of main (the default), high, "
            "short.",
        ),
        (
            MIXED,
            {},
            "hardware.partition is not set, and this cluster has no default: take one of cpu, gpu, gone.",
        ),
        (
            FOUR_NODES,
            {"partition": "high"},
            "hardware.partition: partition high is down, and starts no job: take main or short.",
        ),
        (
            FOUR_NODES,
            {"nodes": 9},
            "hardware.nodes is 9, and partition main has 4 in all: make it 4 or less.",
        ),
        (
            MIXED,
            {"partition": "cpu", "nodes": 9},
            "hardware.nodes is 9, and a job of partition cpu may have 8: make it 8 or less.",
        ),
        (
            FOUR_NODES,
            {"gpus_per_node": 8},
            "hardware.gpus_per_node is 8, but no node of partition main has more than 2 GPUs: make it 2 or less.",
        ),
        (
            MIXED,
            {"partition": "cpu", "gpus_per_node": 1},
            "hardware.gpus_per_node is 1, but no node of partition cpu has more than 0 GPUs: take a partition with "
            "GPUs.",
        ),
        (
            MIXED,
            {"partition": "gpu", "gpus_per_node": 1, "gpu_type": "h200"},
            "hardware.gpu_type is h200, which no node of partition gpu has: take a100 or h100.",
        ),
        (
            FOUR_NODES,
            {"gpus_per_node": 1, "gpu_type": "h200"},
            "hardware.gpu_type is h200, which no node of partition main has: leave it out: the site names no types.",
        ),
        (
            FOUR_NODES,
            {"cpus_per_node": 64},
            "hardware.cpus_per_node is 64, but a job has 16 CPUs at most on a node of partition main: make it 16 or "
            "less.",
        ),
        (
            FOUR_NODES,
            {"memory_gb_per_node": 17.0},
            "hardware.memory_gb_per_node is 17, but no node of partition main has more than 16 GB: make it that or "
            "less, or leave it out for all that a node has.",
        ),
        (
            FOUR_NODES,
            {"constraint": "fast&new"},
            "hardware.constraint is fast&new, but no node of partition main has the feature new: there are fast.",
        ),
        (
            MIXED,
            {"partition": "gpu", "constraint": "h100&a100"},
            "hardware.constraint is h100&a100, but no node of partition gpu has these features together: there are "
            "a100, big, h100, ib.",
        ),
        (
            FOUR_NODES,
            {"partition": "short", "time_limit": "1-00:00:00"},
            "hardware.time_limit is 1-00:00:00, and partition short allows 00:02:00: make it that or less; a run that "
            "needs longer goes on in the job's next attempt.",
        ),
        # each alone is there, and not on one node
        (
            MIXED,
            {"partition": "gpu", "nodes": 2, "gpus_per_node": 8, "memory_gb_per_node": 1500.0},
            "hardware.nodes is 2, but only 1 of the 11 nodes of partition gpu have 1 CPU, 8 GPUs and 1500 GB: ask "
            "for fewer nodes, or for less of each.",
        ),
        (
            MIXED,
            {"partition": "gpu", "nodes": 9, "gpu_type": "h100", "gpus_per_node": 8, "constraint": "ib"},
            "hardware.nodes is 9, but only 8 of the 11 nodes of partition gpu have 1 CPU, 8 h100 GPUs and the "
            "features ib: ask for fewer nodes, or for less of each.",
        ),
    ],
)
def test_what_can_never_run_is_refused(sinfo: str, values: dict[str, object], message: str):
    with pytest.raises(ConfigError) as caught:
        check_request(asked(**values), parse_partitions(sinfo))
    assert str(caught.value) == message


@pytest.mark.parametrize("constraint", ["h100|a100", "[h100|a100]", "ib&(h100|a100)", "ib*2", "big,a100"])
def test_features_in_other_forms(constraint: str):
    hardware = asked(partition="gpu", constraint=constraint)
    assert check_request(hardware, parse_partitions(MIXED)) is None
    with pytest.raises(ConfigError, match="has the feature nosuch: there are a100, big, h100, ib"):
        check_request(asked(partition="gpu", constraint=f"nosuch&{constraint}"), parse_partitions(MIXED))


def test_of_several_partitions_one_has_to_do():
    hardware = asked(partition="cpu,gpu", gpus_per_node=8)
    assert check_request(hardware, parse_partitions(MIXED)) is None
    with pytest.raises(ConfigError, match="no node of partition cpu has more than 0 GPUs"):
        check_request(asked(partition="cpu,gpu", gpus_per_node=9), parse_partitions(MIXED))
