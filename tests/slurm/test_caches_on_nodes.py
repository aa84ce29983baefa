"""Compiled code on a real Slurm: kept by rank 0, and on all nodes before the next attempt trains."""

import os
import shlex
import sys
from pathlib import Path

import yaml
from tests.e2e.running import tiny_settings
from tests.slurm.cluster import Cluster
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "trainer/triton/KEY/kernel.cubin"


def test_what_one_attempt_compiled_is_on_each_node_in_the_next(cluster: Cluster, shared_dir: Path):
    """Nothing is compiled on CPUs: the kernel is put there by hand. The ranks are real, and only check their
    settings, which is after they have their caches."""
    model = make_tiny_model(shared_dir / "model")
    parallel = {"micro_batch_tokens": 512, "dp": 4}
    values = tiny_settings(model, Path(sys.executable), shared_dir, parallel=parallel)
    values["rollout"]["problems_per_step"] = 4
    settings = shared_dir / "tiny.yaml"
    settings.write_text(yaml.safe_dump(values))
    run = Path(values["run"]["dir"]) / values["run"]["name"]
    run.mkdir(parents=True)
    scratch = f"/tmp/sdpo_{os.getuid()}"
    rank = (
        f"srun -N2 -n4 --ntasks-per-node=2 --mem=0 -l {shlex.quote(sys.executable)} -m sdpo_megatron.job.rank"
    )
    rest = f"n1 15000 - {settings} --check"
    job = cluster.submit(
        f"set -e; export PYTHONPATH={ROOT} TRITON_CACHE_DIR={scratch}/triton\n"
        f"mkdir -p -m 700 {scratch} && mkdir -p {scratch}/{Path(KERNEL).parent} && echo code > {scratch}/{KERNEL}\n"
        f"{rank} {shared_dir}/begun 0 {rest}\n"
        f"srun -N2 -n2 --mem=0 rm -rf {scratch}\n"
        f"echo NEXT\n{rank} {shared_dir}/begun 1 {rest}\n",
        "--nodes=2",
        "--ntasks-per-node=2",
    )
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=120)
    output = cluster.output(job)
    assert cluster.job(job)["JobState"] == "COMPLETED", output
    (archive,) = (run / "caches").iterdir()
    assert archive.name.startswith("trainer_torch-")
    second = output.partition("NEXT\n")[2]
    # one rank of each node, and each rank's node has it before it goes on
    filled = f"Compiled code: 1 files of {archive.name} are in {scratch}/trainer."
    assert second.count(filled) == 2, output
    for node in ("n1", "n2"):
        assert cluster.on_node(node, f"{scratch}/{KERNEL}").read_text() == "code\n"
        assert cluster.on_node(node, f"{scratch}/trainer").stat().st_mode & 0o777 == 0o700
