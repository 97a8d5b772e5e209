"""The compiled module: its stub is true, it is chosen, and its absence is said and survived."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo_kernels import ops

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "kernels/octavo_kernels/_core.pyi"
native = pytest.mark.skipif(
    "cpu" not in ops.implementations(), reason="octavo_kernels._core is not built"
)


@native
def test_stub_and_module_agree() -> None:
    """Function and parameter names of the stub are those that pybind11 wrote in the docstrings."""
    core = importlib.import_module("octavo_kernels._core")
    declared = {
        node.name: [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    real = {name: f.__doc__ for name, f in vars(core).items() if callable(f)}
    real = {name: doc for name, doc in real.items() if not name.startswith("_")}
    assert declared.keys() == real.keys()
    for name, doc in real.items():
        signature = doc.splitlines()[0]
        assert re.findall(r"(\w+):", signature) == declared[name], signature


@native
def test_host_memory_goes_to_the_compiled_module() -> None:
    assert ops.implementation("cpu") == "cpu"
    with ops.forced("reference"):
        assert ops.implementation("cpu") == "reference"
    assert ops.implementation("cpu") == "cpu"


@native
def test_unknown_instruction_set_is_refused() -> None:
    before = importlib.import_module("octavo_kernels._core").isa()
    with pytest.raises(ValueError, match="cannot run amx"):
        with ops.forced_instruction_set("amx"):
            pass
    assert before == ops.instruction_sets()[0]


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu' is not here"):
        with ops.forced("tpu"):
            pass


@native
def test_a_type_without_kernel_is_named() -> None:
    with pytest.raises(TypeError, match=r"act_and_mul: no kernel for torch\.float64"):
        ops.act_and_mul(torch.zeros(1, 2, dtype=torch.float64), "silu")


def test_without_the_compiled_module_torch_runs_and_a_line_says_so() -> None:
    """In a fresh interpreter whose finders cannot see `_core`."""
    program = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("octavo_kernels._core", "octavo_kernels._cuda"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
from octavo_kernels import ops
import torch
print(ops.implementations(), ops.act_and_mul(torch.ones(1, 2), "silu").item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=60, check=True,
        env={"PYTHONPATH": str(ROOT / "kernels"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.startswith("('reference',) 0.731")
    assert done.stderr.count("_core is not built") == 1
