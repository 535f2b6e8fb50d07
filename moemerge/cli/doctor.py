"""`moemerge doctor`."""

from dataclasses import asdict

import typer

from moemerge.cli.command import JsonOption, OfflineOption, print_json
from moemerge.errors import Finding, QualityGateFailed


def doctor(
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check this installation: packages, torch, devices, memory, disk and hub, each with what to do.

    Ends with 9 when something is wrong that commands will fail of; warnings alone end with 0.

    Example: moemerge doctor --offline
    """
    from moemerge.bench.environment import check_environment
    from moemerge.cli.tables import print_table

    checks = check_environment(offline=offline)
    findings = tuple(
        Finding(level=check.level, code="ENVIRONMENT", where=check.name, found=check.found, fix=check.fix)
        for check in checks
        if check.level != "ok"
    )
    wrong = [finding for finding in findings if finding.level == "error"]
    if wrong and as_json:
        raise QualityGateFailed("; ".join(map(str, wrong)), findings)
    if as_json:
        print_json("doctor", {"checks": [asdict(check) for check in checks]}, findings)
        return
    print_table("Checks", ["", "what", "found"], [[check.level, check.name, check.found] for check in checks])
    for check in checks:
        if check.fix:
            typer.echo(f"{check.name}: {check.fix}")
    if wrong:
        raise QualityGateFailed("; ".join(map(str, wrong)), findings)
