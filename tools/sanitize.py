"""Runs the kernels' tests on a GPU under compute-sanitizer, all of its tools at once.

    python3 tools/sanitize.py --seconds 200 --out build/sanitizer

All tools take the tests marked `smallest`, in which each kernel does all it can at its least sizes
(racecheck and initcheck, the slowest, not again in float16, which is the same code); memcheck then
goes on with the whole suite, function by function, as far as it comes. Each of several processes
has its share of the tests and ends with the time. One that dies in a test is started again behind
it. Kernels whose blocks wait for one another have processes of their own, in which a tool may make
one wait in vain.

What fails the run: a report that names a kernel of ours, an error of the tool's own, a failed test,
one that its process died in, and one of `smallest` that was not reached. initcheck looks at torch's
kernels too, for it must see them write, and what it says of those is told apart. Reports of one
place are shown once. At last there is a line for each file of kernels, and the verdict.

Standard library only; compute-sanitizer comes with the CUDA toolkit. racecheck took some waits on
mbarriers for races until 2025.4 and 2026.1, says NVIDIA: the first in PATH is taken, before the
toolkit's own. It follows no order through __syncwarp to an mbarrier (2026.3): for it every lane of
a warp that leaves a stage arrives by itself, see kernels/csrc/cuda/launch.h, releasing_lanes().
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
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
_ENDED = re.compile(
    r"^(tests\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)(?: in ([\d.]+) s)?", re.MULTILINE
)
_DONE = re.compile(r"^=+ .* in [\d.]+s.* =+$", re.MULTILINE)  # pytest's last line
# Where a report says that something happened: the kernel and the instruction.
_AT = re.compile(r"\+0x[0-9a-f]+")
# What the tool says of itself: it did not do all that it was asked to.
_OF_ITSELF = re.compile(r"Internal Sanitizer Error|Warning: Detected overflow")
# The file of the kernel that a test of `smallest` is there for.
_SOURCE_OF_TEST = re.compile(r"::test_smallest\[(\w+): ")
_KERNEL = re.compile(
    r"__global__\s+void\s+(?:\w+\s+)?(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\("
)
# Files whose kernels run in the tests that are there for another's.
RUN_WITH = {"decode_plan": "decode_attention", "logprobs": "sampling", "moe_route": "moe"}
# By words in the names of their tests, or of the files of these.
WAITING = "persistent"
ONE_HALF = "(bfloat16 or not float16)"


@dataclass(frozen=True)
class Check:
    """A tool of compute-sanitizer over some of the tests (of marks, of names), in shards."""

    name: str
    tool: str
    marks: str
    names: str
    processes: int
    only_ours: bool = True
    fresh_memory: bool = False  # torch keeps none, so that what lies beyond a tensor is not its own


CHECKS = (
    Check("racecheck", "racecheck", "smallest", f"not {WAITING} and {ONE_HALF}", 3),
    Check("racecheck of waiting blocks", "racecheck", "smallest", f"{WAITING} and {ONE_HALF}", 1),
    Check("initcheck", "initcheck", "smallest", f"not {WAITING} and {ONE_HALF}", 3, False, True),
    Check("initcheck of waiting blocks", "initcheck", "smallest", f"{WAITING} and {ONE_HALF}", 1,
          False, True),
    Check("synccheck", "synccheck", "smallest", f"not {WAITING}", 1),
    Check("synccheck of waiting blocks", "synccheck", "smallest", WAITING, 1),
    Check("memcheck", "memcheck", "not captures", f"not {WAITING}", 6, True, True),
    Check("memcheck of waiting blocks", "memcheck", "not captures", WAITING, 1, True, True),
    Check("memcheck of graphs", "memcheck", "captures", "", 1),
)  # fmt: skip


@dataclass
class Found:
    """What the processes of a check brought to light."""

    ended: dict[str, str] = field(default_factory=dict)  # how, by test
    seconds: Counter[str] = field(default_factory=Counter)  # by test
    to_run: set[str] = field(default_factory=set)
    ours: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    of_itself: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    @property
    def missed(self) -> set[str]:
        """What has to run within the time, and did not."""
        return {test for test in self.to_run - {*self.ended} if source_of(test)}

    @property
    def why_not_clean(self) -> list[str]:
        """In words, with how many; nothing where all is clean."""
        ends = Counter(self.ended.values())
        counts = {
            "in which the process died": ends["DIED"],
            "failed": ends["FAILED"] + ends["ERROR"],
            "of the smallest not reached": len(self.missed),
        }
        said = [f"{n} tests {what}" for what, n in counts.items() if n]
        if self.ours:
            said.append(f"{len(places(self.ours))} places of ours reported")
        if self.of_itself:
            said.append("errors of the tool's own")
        if len(self.trouble) > ends["DIED"]:
            said.append(f"{len(self.trouble) - ends['DIED']} processes in trouble")
        return said or ([] if ends["PASSED"] else ["no test passed"])


@dataclass
class Share:
    """One process after another over a shard of a check's tests."""

    check: Check
    shard: int
    out: Path
    program: str
    codes: list[int] = field(default_factory=list)  # of the processes that ended
    behind: int = 0  # so many tests of the shard is the last process

    def log(self, turn: int) -> Path:
        """What its processes write to, without the ending."""
        again = f"-again{turn}" if turn else ""
        return self.out / f"{self.check.name.replace(' ', '-')}-{self.shard}{again}"

    def start(self, ports: Iterator[int]) -> None:
        """The reports and pytest's lines go to files."""
        check, log = self.check, self.log(len(self.codes))
        files = [str(p) for glob in SOURCES for p in sorted((ROOT / "tests/kernels").glob(glob))]
        pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        pytest += ["-m", check.marks, "-k", check.names, "--timeout=0"]
        words = [
            self.program, f"--tool={check.tool}", "--report-api-errors=no",
            "--show-backtrace=device", "--print-limit=5000", f"--port={next(ports)}",
            f"--log-file={log}.san", *([ONLY_OURS] if check.only_ours else []), *pytest, *files,
        ]  # fmt: skip
        shard = f"{self.shard}/{check.processes}+{self.behind}"
        # Oracles on the CPU would otherwise start a thread a core in each of so many processes.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "OCTAVO_TEST_SHARD": shard}
        if check.tool == "racecheck":
            environment["OCTAVO_TEST_RELEASING_LANES"] = "32"
        if check.fresh_memory:
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        with open(f"{log}.txt", "wb") as file:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def goes_on(self, ports: Iterator[int]) -> bool:
        """Whether a process runs; one that died in a test is followed by another."""
        code = self.process.poll()
        if code is None:
            return True
        said = Said(self.log(len(self.codes)))
        self.codes.append(code)
        self.behind += len(said.ended) + 1
        if not said.died_in or said.died_in == said.to_run[-1]:
            return False
        self.start(ports)
        return True

    def stop(self) -> None:
        """The time is over."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.codes.append(self.process.wait())


class Said:
    """What a process wrote: pytest's lines, and compute-sanitizer's."""

    def __init__(self, log: Path) -> None:
        self.name = log.name
        self.lines = Path(f"{log}.txt").read_text(errors="replace")
        san = Path(f"{log}.san")
        self.reports = san.read_text(errors="replace") if san.exists() else ""
        self.to_run: list[str] = _TO_RUN.findall(self.lines)
        ends = _ENDED.findall(self.lines)
        self.ended: dict[str, str] = {test: end for test, end, _ in ends}
        self.seconds: dict[str, float] = {test: float(s) for test, _, s in ends if s}

    @property
    def died_in(self) -> str | None:
        """The first test without an end, of a process that ended before its tests did."""
        left = [test for test in self.to_run if test not in self.ended]
        return left[0] if left and not _DONE.search(self.lines) else None

    @property
    def last_words(self) -> str:
        """Of Python, where it was aborted, or else of whoever spoke last."""
        _, fatal, where = self.lines.partition("Fatal Python error: ")
        return (fatal + where)[:600] if fatal else (self.reports or self.lines)[-500:]


def source_of(test: str) -> str | None:
    """The file of kernels, without its ending, that a test of `smallest` is there for."""
    found = _SOURCE_OF_TEST.search(test)
    return found[1] if found else None


def places(of: list[str]) -> dict[str, list[str]]:
    """Reports by what they say happened in which instructions, whatever the thread and address."""
    found: dict[str, list[str]] = {}
    for report in of:
        first, *rest = report.splitlines()
        lines = [first, *(line for line in rest if _AT.search(line))]
        found.setdefault(re.sub(r" \[\d+ hazards?\]", "", "\n".join(lines)), []).append(report)
    return found


def sanitizer() -> str:
    """The program's path; exits with what to install where there is none."""
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    places = [os.environ.get("PATH", ""), *map(str, toolkits)]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if found is None:
        sys.exit("no compute-sanitizer in PATH or /usr/local/cuda*/bin: install the CUDA toolkit")
    return found


def run(shares: list[Share], seconds: float) -> None:
    """Until all have ended or the time is over; then none is left."""
    ports = itertools.count(50000, 20)
    end = time.monotonic() + seconds
    for share in shares:
        share.start(ports)
    while shares and time.monotonic() < end:
        shares = [share for share in shares if share.goes_on(ports)]
        time.sleep(0.1)
    for share in shares:
        share.stop()


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


def read(shares: list[Share]) -> Found:
    """What the processes of a check say, one after the other."""
    found = Found()
    turns = [(share, turn, code) for share in shares for turn, code in enumerate(share.codes)]
    for share, turn, code in turns:
        said = Said(share.log(turn))
        for report in reports(said.reports):
            if _OF_ITSELF.match(report):
                found.of_itself.append(report)
            else:
                (found.ours if OURS in report else found.others).append(report)
        found.to_run.update(said.to_run)
        found.ended.update(said.ended)
        found.seconds.update(said.seconds)
        killed = code == -signal.SIGKILL  # by the clock
        if not said.to_run and not killed:
            found.trouble.append(f"{said.name} collected nothing: {said.last_words}")
        elif said.died_in and not killed:
            found.ended[said.died_in] = "DIED"
            found.trouble.append(
                f"{said.name} died with {code} in {said.died_in}: {said.last_words}"
            )
        elif code != 0 and not killed and "FAILED" not in said.ended.values():
            found.trouble.append(f"{said.name} ended with {code}: {said.last_words}")
    return found


def show(check: Check, found: Found) -> None:
    """Print the counts, the reports place by place, and what else there is to look into."""
    ends = Counter(found.ended.values())
    ran = ", ".join(f"{n} {end.lower()}" for end, n in sorted(ends.items())) or "none ran"
    left = len(found.to_run - {*found.ended})
    ours, others = places(found.ours), places(found.others)
    print(f"{check.name}: tests {ran}, {left} not reached; reports: {len(ours)} places of ours "
          f"({len(found.ours)}), {len(others)} of others ({len(found.others)})")  # fmt: skip
    for same in [*list(ours.values())[:20], *list(others.values())[:3]]:
        print(f"  {len(same)} times: " + same[0].replace("\n", "\n    ")[:1500])
    for same in places(found.of_itself).values():
        print(f"  {len(same)} times, of the tool itself: " + same[0].replace("\n", "\n    ")[:500])
    for text in found.trouble:
        print("  " + text.replace("\n", "\n    "))
    for test, end in found.ended.items():
        if end in ("FAILED", "ERROR"):
            print(f"  {end} {test}")
    for test in sorted(found.missed):
        print(f"  not reached: {test}")
    slowest = ", ".join(f"{s:.0f} s {test.split('::')[1]}" for test, s in
                        found.seconds.most_common(3))  # fmt: skip
    print(f"  slowest: {slowest}")


def show_sources(results: list[tuple[Check, Found]]) -> None:
    """A line for each file of kernels: by each tool the tests that ran of those that are there for
    it, how many failed, and the places that reports name in its kernels.
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
                ran[source, check.tool] += end == "PASSED"
                failed[source] += end in ("FAILED", "ERROR", "DIED")
        for place in places(found.ours):
            words = set(re.findall(r"\w+", place))
            reported.update(
                set().union(*(files for name, files in kernels.items() if name in words))
            )
    for source in sorted({*asked, *reported, *RUN_WITH}):
        tools = asked.get(source, Counter())
        counts = ", ".join(f"{t} {ran[source, t]} of {n}" for t, n in tools.items())
        if source in RUN_WITH:
            counts = f"with {RUN_WITH[source]}"
        print(f"{source}: {counts or 'no test'}; {failed[source]} failed, "
              f"{reported[source]} places reported")  # fmt: skip


def show_verdict(results: list[tuple[Check, Found]]) -> bool:
    """The last line; whether all is clean."""
    why = {check.name: found.why_not_clean for check, found in results}
    bad = [f"{name}: {', '.join(said)}" for name, said in why.items() if said]
    tools = ", ".join(dict.fromkeys(check.tool for check, _ in results))
    clean = f"CLEAN: {tools} had each kernel at its smallest, and reported nothing of ours"
    print("NOT CLEAN: " + "; ".join(bad) if bad else clean)
    return not bad


def kernel_files() -> dict[str, set[str]]:
    """By the name of a kernel, the files that have one, without their ending; but for a probe,
    which is loaded and never run.
    """
    found: dict[str, set[str]] = {}
    for path in (ROOT / "kernels/csrc/cuda").glob("*.cu*"):
        for name in _KERNEL.findall(path.read_text()):
            found.setdefault(name, set()).add(path.stem)
    del found["probe"]
    return found


def main() -> int:
    """Exit 0 only where every check was clean."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "build/sanitizer")
    parser.add_argument("--only", choices=sorted({check.tool for check in CHECKS}))
    args = parser.parse_args()
    program = sanitizer()
    args.out.mkdir(parents=True, exist_ok=True)
    checks = [check for check in CHECKS if args.only in (None, check.tool)]
    shares = [
        Share(check, shard, args.out, program)
        for check in checks
        for shard in range(check.processes)
    ]
    begin = time.monotonic()
    run(shares, args.seconds)
    print(f"{sum(len(s.codes) for s in shares)} processes, {time.monotonic() - begin:.0f} s")
    results = [(check, read([s for s in shares if s.check is check])) for check in checks]
    for check, found in results:
        show(check, found)
    show_sources(results)
    return 0 if show_verdict(results) else 1


if __name__ == "__main__":
    sys.exit(main())
