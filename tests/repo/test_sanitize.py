"""tools/sanitize.py with a program in compute-sanitizer's place: what it counts and what it fails.

The reports are in the words of compute-sanitizer 2025.3.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
SUMMARY = "\n========= ERROR SUMMARY: 0 errors\n========= RACECHECK SUMMARY: 0 hazards displayed"
SMALLEST = "tests/kernels/test_x.py::test_smallest[decode_attention: b 1]"
FAKE = """#!{python}
import pathlib, re, sys, time
words = dict(re.fullmatch("--([a-z-]+)=(.*)", w).groups() for w in sys.argv[1:] if "=" in w)
pathlib.Path(words["log-file"]).write_text("========= COMPUTE-SANITIZER\\n" + {said!r})
for test in {to_run!r}:
    print("to run: " + test)
print({ended!r})
sys.stdout.flush()
time.sleep({sleep})
sys.exit({code})
"""


def run(
    folder: Path, *, said="", second="tests/kernels/test_x.py::test_c", end="SKIPPED", code=0,
    sleep=0, only="synccheck",
):  # fmt: skip
    """Of a program that passes one of `smallest`, and ends a second test so."""
    to_run = [SMALLEST, second] if second else []
    values = {"said": said + SUMMARY, "to_run": to_run, "code": code, "sleep": sleep}
    values["ended"] = f"{SMALLEST} PASSED [ 50%]\n{second} {end}"
    program = folder / "compute-sanitizer"
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
    assert "synccheck: tests 1 passed, 1 skipped, 0 not reached; reports: 0 of ours" in said
    assert "\ndecode_attention: synccheck 2 of 2; 0 failed, 0 reports\n" in said


def test_reports_of_ours_fail_and_others_are_told_apart(tmp_path) -> None:
    code, said = run(tmp_path, said=2 * INITCHECK)
    assert code == 0
    assert "0 of ours, 2 of others" in said
    code, said = run(tmp_path, said=2 * MEMCHECK + INITCHECK + RACE)
    assert code == 1
    assert "3 of ours, 1 of others" in said
    assert "Access at 0x7f0000001000 is out of bounds" in said
    assert "Race reported between" in said
    # Of both processes.
    assert "decode_attention: synccheck 2 of 2; 0 failed, 4 reports" in said
    assert "prefill_attention: no test; 0 failed, 2 reports" in said


NOT_ENDED = {"second": SMALLEST.replace("b 1", "c"), "end": "xPASSED", "sleep": 60}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"end": "FAILED", "code": 1}, "1 failed, 1 passed"),
        ({"end": "FAILED", "code": 1}, "FAILED tests/kernels/test_x.py::test_c"),
        ({"code": 139}, "ended with 139"),
        ({"second": ""}, "collected nothing"),
        (NOT_ENDED, "1 passed, 1 not reached"),
        (NOT_ENDED, "decode_attention: synccheck 2 of 4; 0 failed"),
    ],
)
def test_what_did_not_run_is_not_clean(tmp_path, changes, text) -> None:
    code, said = run(tmp_path, **changes)
    assert code == 1
    assert text in said


def test_the_whole_suite_may_be_stopped_by_the_clock(tmp_path) -> None:
    code, said = run(tmp_path, end="", sleep=60, only="memcheck")
    assert code == 0
    assert "memcheck: tests 1 passed, 1 not reached" in said
