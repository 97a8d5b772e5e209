"""Runs the kernels' tests on a GPU under compute-sanitizer, all of its tools at once.

    python3 tools/sanitize.py --seconds 90 --out build/sanitizer

memcheck takes the whole suite, as far as it comes; the others, which are ten to a hundred times
slower, the tests marked `smallest`, in which each kernel runs once. Each of several processes has
its share of the tests and ends with the time. What concerns our kernels is counted and fails the
run, and so do a failed test and one of `smallest` that did not run; initcheck looks at torch's
kernels too, for it must see them write, and what it says of those is told apart.

Standard library only; compute-sanitizer comes with the CUDA toolkit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "octavo"  # in the mangled name of each of our kernels: their namespace
ONLY_OURS = f"--kernel-name=kernel_substring={OURS}"
SOURCES = ("test_cuda_*.py", "test_batch_state.py")
# The first line of a report is not indented; these are no reports.
_NO_REPORT = re.compile(
    r"COMPUTE-SANITIZER|\w+ SUMMARY|Target application|Saved host|No attachable|$"
)
_ENDED = re.compile(r"^tests\S+::.* (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


@dataclass(frozen=True)
class Check:
    """A tool of compute-sanitizer over some of the tests, in `processes` shards."""

    name: str
    tool: str
    tests: str
    processes: int
    options: tuple[str, ...] = (ONLY_OURS,)
    fresh_memory: bool = True  # torch keeps none, so that what lies beyond a tensor is not its own
    whole: bool = True  # all of its tests have to run within the time


CHECKS = (
    Check("memcheck", "memcheck", "not captures", 5, whole=False),
    Check("memcheck of graphs", "memcheck", "captures", 1, fresh_memory=False),
    Check("racecheck", "racecheck", "smallest", 4),
    Check("synccheck", "synccheck", "smallest", 1),
    Check("initcheck", "initcheck", "smallest", 4, ("--print-limit=1000",)),
)


@dataclass
class Found:
    """What the processes of a check brought to light."""

    tests: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    ours: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


def sanitizer() -> str:
    """The program's path; exits with what to install where there is none."""
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    places = [os.environ.get("PATH", ""), *map(str, toolkits)]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if found is None:
        sys.exit("no compute-sanitizer in PATH or /usr/local/cuda*/bin: install the CUDA toolkit")
    return found


def start(program: str, check: Check, shard: int, port: int, out: Path) -> subprocess.Popen[bytes]:
    """One process with its share of the tests; the reports and pytest's lines go to files."""
    log = out / f"{check.name.replace(' ', '-')}-{shard}"
    files = [str(p) for glob in SOURCES for p in sorted((ROOT / "tests/kernels").glob(glob))]
    pytest = [sys.executable, "-m", "pytest", "-v", "-m", check.tests, "-p", "no:cacheprovider"]
    words = [
        program, f"--tool={check.tool}", "--report-api-errors=no", "--show-backtrace=device",
        f"--port={port}", f"--log-file={log}.san", *check.options, *pytest, "--timeout=0", *files,
    ]  # fmt: skip
    environment = dict(os.environ) | {"OCTAVO_TEST_SHARD": f"{shard}/{check.processes}"}
    if check.fresh_memory:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with open(f"{log}.txt", "wb") as file:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def wait_for(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Until all have ended or the time is over; then none is left."""
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reports(text: str) -> list[str]:
    """The reports in a log of compute-sanitizer, several lines each."""
    found: list[list[str]] = []
    within = False
    for line in text.splitlines():
        said = line.removeprefix("=========").removeprefix(" ")
        if not said.startswith(" "):
            within = not _NO_REPORT.match(said)
            if within:
                found.append([])
        if within:
            found[-1].append(said)
    return ["\n".join(lines) for lines in found]


def read(check: Check, out: Path, codes: list[int]) -> Found:
    """What the files of a check say, process by process."""
    found = Found()
    for shard, code in enumerate(codes):
        log = out / f"{check.name.replace(' ', '-')}-{shard}"
        lines = Path(f"{log}.txt").read_text(errors="replace")
        said = Path(f"{log}.san").read_text(errors="replace") if Path(f"{log}.san").exists() else ""
        for report in reports(said):
            (found.ours if OURS in report else found.others).append(report)
        ended = Counter(_ENDED.findall(lines))
        found.tests += ended
        chosen = re.search(r"collected (\d+) items(?: / (\d+) deselected)?", lines)
        if chosen is None:
            found.trouble.append(f"{log.name} collected nothing: {lines[-500:] or said[-500:]}")
            continue
        found.missing += int(chosen[1]) - int(chosen[2] or 0) - sum(ended.values())
        if code not in (0, -signal.SIGKILL) and not ended["FAILED"]:
            found.trouble.append(f"{log.name} ended with {code}: {(said or lines)[-500:]}")
    return found


def show(check: Check, found: Found) -> bool:
    """Print the counts and the first reports; whether the check is clean."""
    ran = ", ".join(f"{n} {end.lower()}" for end, n in sorted(found.tests.items())) or "none ran"
    print(f"{check.name}: tests {ran}, {found.missing} not reached; "
          f"reports: {len(found.ours)} of ours, {len(found.others)} of others")  # fmt: skip
    for report in found.ours[:5] or found.others[:2]:
        print("  " + report.replace("\n", "\n  ")[:1500])
    for text in found.trouble:
        print("  " + text.replace("\n", "\n  "))
    bad = found.tests["FAILED"] + found.tests["ERROR"] + len(found.ours) + len(found.trouble)
    return not bad and bool(found.tests["PASSED"]) and not (check.whole and found.missing)


def main() -> int:
    """Exit 0 only where every check was clean."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "build/sanitizer")
    parser.add_argument("--only", choices=sorted({check.tool for check in CHECKS}))
    args = parser.parse_args()
    program, clean = sanitizer(), True
    args.out.mkdir(parents=True, exist_ok=True)
    checks = [check for check in CHECKS if args.only in (None, check.tool)]
    shards = [(check, shard) for check in checks for shard in range(check.processes)]
    begin = time.monotonic()
    running = [
        start(program, check, shard, 50000 + 20 * i, args.out)
        for i, (check, shard) in enumerate(shards)
    ]
    wait_for(running, args.seconds)
    print(f"{len(running)} processes, {time.monotonic() - begin:.0f} s")
    codes = [process.returncode for process in running]
    for check in checks:
        own = [code for (of, _), code in zip(shards, codes, strict=True) if of is check]
        clean &= show(check, read(check, args.out, own))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
