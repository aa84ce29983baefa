import json
import time
from pathlib import Path

from sdpo_megatron.run_dir.phases import PhaseFile


def test_the_file_says_what_the_rank_does(tmp_path: Path):
    path = tmp_path / "rank_1.json"
    phases = PhaseFile(path, rank=1)
    before = time.time()
    phases.enter(3, "rollout")
    phases.enter(3, "learn")
    phase = json.loads(path.read_text())
    assert (phase["rank"], phase["step"], phase["phase"]) == (1, 3, "learn")
    assert before <= phase["since"] <= time.time()
