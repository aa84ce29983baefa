"""What Slurm says, as a job reads it."""

import pytest

from sdpo_megatron.job.slurm import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5:30", 330.0),
        ("45", 45.0),
        ("1:02:03", 3723.0),
        ("2-01:00:00", 176400.0),
        ("0:00", 0.0),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_times(text: str, seconds: float | None):
    assert seconds_of(text) == seconds
