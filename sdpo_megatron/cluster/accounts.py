"""In whose name a user may ask, as `sacctmgr` prints it: pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Association:
    """An account that a user may use, in one partition or in all."""

    account: str
    partition: str
    """Empty: in all."""
    qos: frozenset[str]


def sacctmgr(user: str) -> list[str]:
    return ["sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account,partition,qos"]


def parse_associations(text: str) -> list[Association]:
    """Returns the associations in what `sacctmgr` prints. Slurm keeps these names in lower case."""
    found: list[Association] = []
    for line in text.lower().splitlines():
        account, partition, qos = [*line.split("|"), "", ""][:3]
        if account:
            of = frozenset(name for name in qos.split(",") if name)
            found.append(Association(account=account, partition=partition, qos=of))
    return found


def check_account(hardware: HardwareSettings, associations: Sequence[Association]) -> None:
    """Raises ConfigError for an account or a qos that the user, whose `associations` these are, has not."""
    account, qos = hardware.account, hardware.qos
    own = [one for one in associations if account is None or one.account == account.lower()]
    if not own:
        raise ConfigError(
            f"hardware.account is {account}, which is none of yours: take {_or(one.account for one in associations)}."
        )
    partitions = None if hardware.partition is None else set(hardware.partition.lower().split(","))
    in_it = [one for one in own if partitions is None or not one.partition or one.partition in partitions]
    if not in_it:
        who = "no account of yours may" if account is None else f"{account} may not"
        raise ConfigError(
            f"hardware.account: {who} use hardware.partition={hardware.partition}: take "
            f"{_or(one.partition for one in own)}."
        )
    allowed = frozenset[str]().union(*(one.qos for one in in_it))
    if qos is not None and qos.lower() not in allowed:
        of = "" if account is None else f" with account {account}"
        cure = f"take {_or(allowed)}" if allowed else "leave it out"
        raise ConfigError(f"hardware.qos is {qos}, which you do not have{of}: {cure}.")


def _or(names: Iterable[str]) -> str:
    return " or ".join(sorted(set(names)))
