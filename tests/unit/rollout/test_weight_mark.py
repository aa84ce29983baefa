import pytest

from sdpo_megatron.errors import ServerLost, UserError
from sdpo_megatron.rollout.weight_mark import WeightMark

URL = "http://127.0.0.1:5"


@pytest.mark.parametrize("version", [0, 7, 12345])
def test_there_and_back(version: int):
    mark = WeightMark("0a1b2c3d")
    assert mark.read(mark.write(version), URL) == version


@pytest.mark.parametrize("version", ["default", "0", "v-1", "ab-", "-1", "ab-1-2", ""])
def test_a_server_that_nobody_pushed_to(version: str):
    with pytest.raises(ServerLost, match=f"the server at {URL} was started anew, without the run's weights"):
        WeightMark("ab").read(version, URL)


def test_a_server_that_another_run_pushed_to():
    """Versions alone would not tell: both runs count from 0."""
    with pytest.raises(UserError) as caught:
        WeightMark("ab").read("cd-3", URL)
    assert str(caught.value) == (
        f"The server at {URL} has weights that another run pushed (cd-3; this run's begin with ab): give each run "
        "servers of its own."
    )
