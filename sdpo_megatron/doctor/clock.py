"""The machine's clocks."""

import time

from sdpo_megatron.doctor.findings import Finding, failure, ok

FIRST_YEAR, LAST_YEAR = 2025, 2100
WATCHED_S = 0.25
MOST_DRIFT_S = 0.1
TODO = "have the clock set and kept (chrony, ntpd): certificates, file times and logs of several nodes rely on it"


def clock() -> list[Finding]:
    """The wall time is among the figures, for whoever compares several nodes."""
    wall, monotonic = time.time(), time.monotonic()
    time.sleep(WATCHED_S)
    now = time.time()
    passed, counted = now - wall, time.monotonic() - monotonic
    local = time.localtime(now)
    found = time.strftime("%Y-%m-%d %H:%M:%S %Z (UTC%z)", local)
    if not FIRST_YEAR <= local.tm_year < LAST_YEAR:
        return [failure("clock", f"{found}: that cannot be now", TODO, wall_time=now)]
    if abs(passed - counted) > MOST_DRIFT_S:
        jump = f"{found}; it moved by {passed:.3f} s in {counted:.3f} s"
        return [failure("clock", jump, TODO, wall_time=now)]
    return [ok("clock", found, wall_time=now)]
