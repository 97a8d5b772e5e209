"""tools/sanitize.py with a program in compute-sanitizer's place: what it counts and what it fails.

The reports are in the words of compute-sanitizer 2025.3.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools import sanitize

ROOT = Path(__file__).resolve().parents[2]
MEMCHECK = """
========= Invalid __global__ read of size 2 bytes
=========     at void octavo::cuda::decode_kernel<__half, (int)64>(octavo::cuda::DecodeTask)+0x70
=========     by thread (3,0,0) in block (7,0,0)
=========     Access at 0x7f0000001000 is out of bounds
========="""
INITCHECK = """
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, float>(T1)+0x1f0
=========     by thread (0,0,0) in block (0,0,0)
========="""
RACE = """
========= Error: Race reported between Write access at void octavo::cuda::prefill_kernel<T>()+0x1
=========     and Read access at void octavo::cuda::prefill_kernel<T>()+0x20 [16 hazards]
========="""
INTERNAL = """
========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.
========="""
SUMMARY = "\n========= ERROR SUMMARY: 0 errors\n========= RACECHECK SUMMARY: 0 hazards displayed"
THIRD = "tests/kernels/test_x.py::test_d"
SMALLEST = "tests/kernels/test_x.py::test_smallest[decode_attention: b 1]"
FAKE = """#!{python}
import os, pathlib, re, signal, sys, time
words = dict(re.fullmatch("--([a-z-]+)=(.*)", w).groups() for w in sys.argv[1:] if "=" in w)
pathlib.Path(words["log-file"]).write_text("========= COMPUTE-SANITIZER\\n" + {said!r})
begin = int(os.environ["OCTAVO_TEST_SHARD"].partition("+")[2])
tests = {tests!r}[begin:]
print("lanes: " + os.environ.get("OCTAVO_TEST_RELEASING_LANES", "unsaid"))
for test, _ in tests:
    print("to run: " + test)
for test, end in tests:
    print(test + " " + end, flush=True)
    if end == "dies":
        print("Fatal Python error: Aborted\\n  File experts.py, line 66", flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if end == "hangs":
        time.sleep(60)
print("===== 2 passed in 1.25s =====" if tests else "no tests")
sys.exit({code})
"""


def run(
    folder: Path, *, said="", second="tests/kernels/test_x.py::test_c", end="SKIPPED", code=0,
    only="synccheck",
):  # fmt: skip
    """Of a program that passes one of `smallest`, ends a second test so, and passes one more."""
    tests = [(SMALLEST, "PASSED in 3.0 s [ 33%]"), (second, end), (THIRD, "PASSED in 12.0 s")]
    program = folder / "compute-sanitizer"
    values = {"said": said + SUMMARY, "tests": tests if second else [], "code": code}
    program.write_text(FAKE.format(python=sys.executable, **values))
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "tools/sanitize.py", "--seconds", "3", "--only", only, "--out",
         str(folder / "out")],
        cwd=ROOT, env=os.environ | {"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_clean_run(tmp_path) -> None:
    code, said = run(tmp_path)
    assert code == 0
    assert "synccheck: tests 2 passed, 1 skipped, 0 not reached; reports: 0 places of ours" in said
    assert "  slowest: 12 s test_d, 3 s test_smallest[decode_attention: b 1]\n" in said
    assert "\ndecode_attention: synccheck 2 of 2; 0 failed, 0 places reported\n" in said
    assert "\ndecode_plan: with decode_attention; 0 failed, 0 places reported\n" in said
    assert said.splitlines()[-1] == (
        "CLEAN: synccheck had each kernel at its smallest, and reported nothing of ours"
    )


@pytest.mark.parametrize(("tool", "lanes"), [("racecheck", "32"), ("memcheck", "unsaid")])
def test_every_lane_leaves_a_stage_by_itself_for_racecheck_alone(tmp_path, tool, lanes) -> None:
    run(tmp_path, only=tool)
    assert f"lanes: {lanes}\n" in (tmp_path / f"out/{tool}-0.txt").read_text()


def test_reports_of_ours_fail_and_others_are_told_apart(tmp_path) -> None:
    code, said = run(tmp_path, said=2 * INITCHECK)
    assert code == 0
    assert "0 places of ours (0), 1 of others (2)" in said
    other_thread = MEMCHECK.replace("(3,0,0)", "(4,0,0)").replace("1000 is", "2000 is")
    other_place = MEMCHECK.replace("+0x70", "+0x80")
    more = RACE.replace("[16 hazards]", "[3 hazards]")
    code, said = run(tmp_path, said=MEMCHECK + other_thread + other_place + INITCHECK + RACE + more)
    assert code == 1
    assert "3 places of ours (5), 1 of others (1)" in said
    assert "  2 times: Invalid __global__ read of size 2 bytes" in said
    assert "  1 times: Invalid __global__ read of size 2 bytes" in said
    assert "  2 times: Error: Race reported between" in said
    assert "Access at 0x7f0000001000 is out of bounds" in said
    assert "Access at 0x7f0000002000 is out of bounds" not in said
    # Of both processes.
    assert "decode_attention: synccheck 2 of 2; 0 failed, 4 places reported" in said
    assert "prefill_attention: no test; 0 failed, 2 places reported" in said
    assert said.splitlines()[-1] == (
        "NOT CLEAN: synccheck: 3 places of ours reported; "
        "synccheck of waiting blocks: 3 places of ours reported"
    )


SECOND = SMALLEST.replace("b 1", "c")


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"end": "FAILED", "code": 1}, ["1 failed, 2 passed", "FAILED tests/kernels/test_x.py"]),
        ({"code": 139}, ["ended with 139", "NOT CLEAN: synccheck: 1 processes in trouble"]),
        ({"second": ""}, ["collected nothing", "synccheck: 1 processes in trouble"]),
        (
            {"second": SECOND, "end": "hangs"},
            [
                "1 passed, 2 not reached", "decode_attention: synccheck 2 of 4; 0 failed",
                f"  not reached: {SECOND}", "synccheck: 1 tests of the smallest not reached",
            ],
        ),
    ],
)  # fmt: skip
def test_what_did_not_run_is_not_clean(tmp_path, changes, texts) -> None:
    code, said = run(tmp_path, **changes)
    assert code == 1
    for text in texts:
        assert text in said


def test_what_the_tool_could_not_do_is_not_clean(tmp_path) -> None:
    code, said = run(tmp_path, said=2 * INTERNAL)
    assert code == 1
    assert "reports: 0 places of ours (0), 0 of others (0)" in said
    assert "  2 times, of the tool itself: Internal Sanitizer Error: The Sanitizer failed" in said
    assert "NOT CLEAN: synccheck: errors of the tool's own; synccheck of" in said


def test_behind_a_test_that_its_process_died_in_another_goes_on(tmp_path) -> None:
    code, said = run(tmp_path, second=SECOND, end="dies")
    assert code == 1
    assert "4 processes" in said
    assert "synccheck: tests 1 died, 2 passed, 0 not reached" in said
    assert f"synccheck-0 died with -6 in {SECOND}: Fatal Python error: Aborted" in said
    assert "experts.py, line 66" in said
    assert "decode_attention: synccheck 2 of 4; 2 failed" in said
    assert "NOT CLEAN: synccheck: 1 tests in which the process died; synccheck of" in said


def test_the_whole_suite_may_be_stopped_by_the_clock(tmp_path) -> None:
    code, said = run(tmp_path, end="hangs", only="memcheck")
    assert code == 0
    assert "memcheck: tests 1 passed, 2 not reached" in said


def test_every_file_of_kernels_has_a_line() -> None:
    cases = (ROOT / "tests/kernels/test_cuda_smallest.py").read_text()
    with_tests = set(re.findall(r'case\(\s*"(\w+)", ', cases))
    assert {*sanitize.RUN_WITH.values()} <= with_tests
    files = set().union(*sanitize.kernel_files().values())
    assert files == {*sanitize.RUN_WITH, *with_tests}
