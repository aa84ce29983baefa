"""What several nodes found, as one table."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from sdpo_megatron.doctor.findings import Finding, failure, ok, table, warning
from sdpo_megatron.doctor.several import differences, merged


def on(host: str, *findings: Finding) -> list[Finding]:
    return [replace(finding, host=host) for finding in findings]


def test_equal_lines_are_one_and_others_name_their_node():
    findings = on("n1", ok("cores", "8 of 8"), ok("memory", "20 GiB"), ok("ports", "free"))
    findings += on("n2", ok("cores", "8 of 8"), ok("memory", "19 GiB"), failure("ports", "shut", "open them"))
    rows = [(finding.host, finding.status, finding.name, finding.found) for finding in merged(findings)]
    assert rows == [
        ("n1, n2", "ok", "cores", "8 of 8"),
        ("n1, n2", "ok", "memory", "n1: 20 GiB\nn2: 19 GiB"),
        ("n1", "ok", "ports", "free"),
        ("n2", "failure", "ports", "shut"),
    ]
    shown = StringIO()
    Console(file=shown, width=100).print(table(merged(findings)))
    lines = [line.rstrip() for line in shown.getvalue().splitlines()]
    assert "n2      failure  ports   shut" in lines and lines[-1].strip() == "what to do: open them"


def test_nodes_with_unlike_packages_or_gpus_are_told():
    findings = on("n1", ok("trainer environment", "x", torch="2.13", triton="3.8"), ok("GPU", "8", gpus=8))
    findings += on("n2", ok("trainer environment", "y", torch="2.12", triton="3.8"), ok("GPU", "4", gpus=4))
    findings += on("n1", ok("memory", "1", bytes=1)) + on("n2", ok("memory", "2", bytes=2))
    found = differences(findings)
    assert [(finding.host, finding.status, finding.name, finding.found) for finding in found] == [
        ("n1, n2", "failure", "trainer environment: torch", "differs: 2.13 on n1, 2.12 on n2"),
        ("n1, n2", "failure", "GPU: gpus", "differs: 8 on n1, 4 on n2"),
    ]
    assert differences(findings[:2]) == [] == differences([])


def test_a_package_that_one_node_lacks():
    (found,) = differences(
        on("n1", ok("server environment", "x", sglang="0.5"))
        + on("n2", warning("server environment", "y", "install it"))
    )
    assert found.found == "differs: 0.5 on n1, none on n2"
