"""What `sacctmgr` prints, and accounts that the user has not."""

import pytest

from sdpo_megatron.cluster.accounts import check_account, parse_associations
from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.errors import ConfigError

ASSOCIATIONS = "physics||normal,long\nlanguage|gpu|Normal\nlanguage|short|fast\n"


def test_what_is_allowed():
    mine = parse_associations(ASSOCIATIONS)
    for values in (
        {"account": "Physics", "qos": "long", "partition": "cpu"},
        {"account": "language", "partition": "gpu,cpu", "qos": "normal"},
        {"qos": "long"},
        {"account": "language"},
    ):
        check_account(HardwareSettings.model_validate(values), mine)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"account": "chemistry"},
            "hardware.account is chemistry, which is none of yours: take language or physics.",
        ),
        (
            {"account": "language", "partition": "cpu"},
            "hardware.account: language may not use hardware.partition=cpu: take gpu or short.",
        ),
        (
            {"account": "language", "partition": "gpu", "qos": "fast"},
            "hardware.qos is fast, which you do not have with account language: take normal.",
        ),
        ({"qos": "vip"}, "hardware.qos is vip, which you do not have: take fast or long or normal."),
    ],
)
def test_what_is_not(values: dict[str, str], message: str):
    with pytest.raises(ConfigError) as caught:
        check_account(HardwareSettings.model_validate(values), parse_associations(ASSOCIATIONS))
    assert str(caught.value) == message


def test_no_association():
    assert parse_associations("\n") == []
