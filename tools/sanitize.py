"""Runs the kernels' tests on a GPU under compute-sanitizer, all of its tools at once.

    python3 tools/sanitize.py --seconds 90 --out build/sanitizer

All tools take the tests marked `smallest`, in which each kernel does all it can at its least sizes;
memcheck then goes on with the whole suite, as far as it comes. Each of several processes has its
share of the tests and ends with the time. Kernels whose blocks wait for one another have processes
of their own: where such a tool makes one wait in vain, it ends all that its process could do. What
concerns our kernels is counted and fails the run, and so do a failed test and one of `smallest`
that did not run; initcheck looks at torch's kernels too, for it must see them write, and what it
says of those is told apart. At last there is a line for each file of kernels.

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
_TO_RUN = re.compile(r"^to run: (tests\S+::.*)$", re.MULTILINE)
_ENDED = re.compile(r"^(tests\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
# The file of the kernel that a test of `smallest` is there for.
_SOURCE_OF_TEST = re.compile(r"::test_smallest\[(\w+): ")
_KERNEL = re.compile(
    r"__global__\s+void\s+(?:\w+\s+)?(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\("
)
# By words in the names of their tests, or of the files of these.
WAITING = "persistent"


@dataclass(frozen=True)
class Check:
    """A tool of compute-sanitizer over some of the tests (of marks, of names), in shards."""

    name: str
    tool: str
    marks: str
    names: str
    processes: int
    options: tuple[str, ...] = (ONLY_OURS,)
    fresh_memory: bool = True  # torch keeps none, so that what lies beyond a tensor is not its own


_ALSO_TORCH = ("--print-limit=1000",)
CHECKS = (
    Check("racecheck", "racecheck", "smallest", f"not ({WAITING})", 3),
    Check("racecheck of waiting blocks", "racecheck", "smallest", WAITING, 1),
    Check("memcheck", "memcheck", "not captures", f"not ({WAITING})", 3),
    Check("memcheck of waiting blocks", "memcheck", "not captures", WAITING, 1),
    Check("memcheck of graphs", "memcheck", "captures", "", 1, fresh_memory=False),
    Check("initcheck", "initcheck", "smallest", f"not ({WAITING})", 3, _ALSO_TORCH),
    Check("initcheck of waiting blocks", "initcheck", "smallest", WAITING, 1, _ALSO_TORCH),
    Check("synccheck", "synccheck", "smallest", f"not ({WAITING})", 1),
    Check("synccheck of waiting blocks", "synccheck", "smallest", WAITING, 1),
)


@dataclass
class Found:
    """What the processes of a check brought to light."""

    ended: dict[str, str] = field(default_factory=dict)  # how, by test
    to_run: set[str] = field(default_factory=set)
    ours: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    @property
    def missed(self) -> set[str]:
        """What has to run within the time, and did not."""
        return {test for test in self.to_run - {*self.ended} if source_of(test)}


def source_of(test: str) -> str | None:
    """The file of kernels, without its ending, that a test of `smallest` is there for."""
    found = _SOURCE_OF_TEST.search(test)
    return found[1] if found else None


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
    pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    pytest += ["-m", check.marks, "-k", check.names]
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
        to_run, ended = set(_TO_RUN.findall(lines)), dict(_ENDED.findall(lines))
        if not to_run:
            found.trouble.append(f"{log.name} collected nothing: {lines[-500:] or said[-500:]}")
            continue
        found.to_run |= to_run
        found.ended |= ended
        if code not in (0, -signal.SIGKILL) and "FAILED" not in ended.values():
            found.trouble.append(f"{log.name} ended with {code}: {(said or lines)[-500:]}")
    return found


def show(check: Check, found: Found) -> bool:
    """Print the counts and the first reports; whether the check is clean."""
    ends = Counter(found.ended.values())
    ran = ", ".join(f"{n} {end.lower()}" for end, n in sorted(ends.items())) or "none ran"
    left = len(found.to_run - {*found.ended})
    print(f"{check.name}: tests {ran}, {left} not reached; "
          f"reports: {len(found.ours)} of ours, {len(found.others)} of others")  # fmt: skip
    for report in found.ours[:5] or found.others[:2]:
        print("  " + report.replace("\n", "\n  ")[:1500])
    for text in found.trouble:
        print("  " + text.replace("\n", "\n  "))
    for test, end in found.ended.items():
        if end in ("FAILED", "ERROR"):
            print(f"  {end} {test}")
    bad = ends["FAILED"] + ends["ERROR"] + len(found.ours) + len(found.trouble)
    return not bad and bool(ends["PASSED"]) and not found.missed


def show_sources(results: list[tuple[Check, Found]]) -> None:
    """A line for each file of kernels: by each tool the tests that ran of those that are there for
    it, how many failed, and the reports that name one of its kernels.
    """
    asked: dict[str, Counter[str]] = {}
    ran: Counter[tuple[str, str]] = Counter()
    failed: Counter[str] = Counter()
    reported: Counter[str] = Counter()
    kernels = kernel_files()
    for check, found in results:
        for test in found.to_run:
            if source := source_of(test):
                asked.setdefault(source, Counter())[check.tool] += 1
        for test, end in found.ended.items():
            if source := source_of(test):
                ran[source, check.tool] += 1
                failed[source] += end in ("FAILED", "ERROR")
        for report in found.ours:
            reported.update({kernels[w] for w in re.findall(r"\w+", report) if w in kernels})
    for source in sorted({*asked, *reported}):
        tools = asked.get(source, Counter())
        counts = ", ".join(f"{t} {ran[source, t]} of {n}" for t, n in tools.items()) or "no test"
        print(f"{source}: {counts}; {failed[source]} failed, {reported[source]} reports")


def kernel_files() -> dict[str, str]:
    """By the name of a kernel, the file that it is in, without its ending."""
    paths = (ROOT / "kernels/csrc/cuda").glob("*.cu*")
    return {name: path.stem for path in paths for name in _KERNEL.findall(path.read_text())}


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
    results = []
    for check in checks:
        own = [code for (of, _), code in zip(shards, codes, strict=True) if of is check]
        results.append((check, read(check, args.out, own)))
        clean &= show(*results[-1])
    show_sources(results)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
