import time
from pathlib import Path

from sdpo_megatron.run_dir.phases import PhaseFile, read_phase


def test_the_file_says_what_the_rank_does(tmp_path: Path):
    path = tmp_path / "rank_1.json"
    assert read_phase(path) is None
    phases = PhaseFile(path, rank=1)
    before = time.time()
    phases.enter(3, "rollout")
    phases.enter(3, "learn")
    phase = read_phase(path)
    assert phase is not None
    assert (phase["rank"], phase["step"], phase["phase"]) == (1, 3, "learn")
    assert before <= phase["since"] <= time.time()
