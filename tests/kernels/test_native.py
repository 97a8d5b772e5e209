"""The compiled module: its stub is true, it is chosen, and its absence is said and survived."""

import ast
import contextlib
import importlib.util
import inspect
import platform
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from gpu import needs_gpu_module

from octavo_kernels import ops

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels/octavo_kernels"
native = pytest.mark.skipif(
    "cpu" not in ops.implementations(), reason="octavo_kernels._core is not built"
)


@pytest.mark.parametrize(
    "name", [pytest.param("_core", marks=native), pytest.param("_cuda", marks=needs_gpu_module)]
)
def test_stub_and_module_agree(name: str) -> None:
    """Function and parameter names of the stub are those that pybind11 wrote in the docstrings."""
    module = importlib.import_module(f"octavo_kernels.{name}")
    stub = ast.parse((PACKAGE / f"{name}.pyi").read_text()).body
    classes = [node for node in stub if isinstance(node, ast.ClassDef)]
    assert parameters_in_stub(stub) == parameters_in_docstrings(module)
    for node in classes:
        assert parameters_in_stub(node.body) == parameters_in_docstrings(getattr(module, node.name))
    in_module = {key for key, value in vars(module).items() if isinstance(value, type)}
    assert {node.name for node in classes} == in_module


def parameters_in_stub(body: list[ast.stmt]) -> dict[str, list[str]]:
    """The functions' parameter names; properties have none and are left out."""
    return {
        node.name: [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list
    }


def parameters_in_docstrings(owner: object) -> dict[str, list[str]]:
    return {
        key: re.findall(r"(\w+):", (value.__doc__ or "").splitlines()[0])
        for key, value in vars(owner).items()
        if callable(value) and not isinstance(value, type)
        if key == "__init__" or not key.startswith("_")
    }


@pytest.mark.parametrize(
    "name", [pytest.param("cpu", marks=native), pytest.param("cuda", marks=needs_gpu_module)]
)
def test_back_ends_take_what_the_reference_takes(name: str) -> None:
    """Equal names mean equal positional parameters; what a back end knows beyond comes after."""
    back_end = importlib.import_module(f"octavo_kernels.{name}")
    reference = importlib.import_module("octavo_kernels.reference")

    def positional(function) -> list[str]:
        found = inspect.signature(function).parameters.values()
        return [p.name for p in found if p.kind == p.POSITIONAL_OR_KEYWORD]

    shared = [op for op in ops.__all__ if inspect.isfunction(getattr(reference, op, None))]
    shared = [op for op in shared if hasattr(back_end, op)]
    assert len(shared) >= 8
    for op in shared:
        wanted, got = positional(getattr(reference, op)), positional(getattr(back_end, op))
        assert got[: len(wanted)] == wanted, op


@needs_gpu_module
def test_the_gpu_module_imports_without_a_driver_and_says_what_is_missing() -> None:
    """It has the CUDA runtime within, so that no library's place matters."""
    module = importlib.import_module("octavo_kernels._cuda")
    linked = subprocess.run(
        ["ldd", module.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libcuda" not in linked
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="--device cpu"):
            ops.device_report()


@needs_gpu_module
def test_the_gpu_module_has_code_for_hopper_and_ptx_for_the_rest() -> None:
    """Read from the fat binaries' headers: a kind (1 PTX, 2 machine code) and an architecture."""
    module = importlib.import_module("octavo_kernels._cuda")
    content = Path(module.__file__).read_bytes()
    found = Counter()
    container = struct.pack("<IHH", 0xBA55ED50, 1, 16)
    for match in re.finditer(re.escape(container), content):
        at = match.end() + 8
        end = at + struct.unpack_from("<Q", content, match.end())[0]
        while at < end:
            kind, header, size = struct.unpack_from("<HxxIQ", content, at)
            (architecture,) = struct.unpack_from("<I", content, at + 28)
            found[kind, architecture] += 1
            at += header + size
    sources = len(list((ROOT / "kernels/csrc/cuda").glob("*.cu")))
    assert found.keys() == {(1, 80), (2, 90)}, found
    assert found[2, 90] == found[1, 80] <= sources


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


@native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86 machine")
@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_is_compiled(name: str) -> None:
    """Whatever this host can run: the table of functions that dispatch.cpp chooses from."""
    module = importlib.import_module("octavo_kernels._core")
    assert name.encode() + b"\0" in Path(module.__file__).read_bytes()
    assert set(ops.instruction_sets()) <= {"avx512", "avx2", "baseline"}


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


def test_who_is_known_is_not_checked_and_others_are_again() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="act_and_mul: x must have dimensions"):
        ops.act_and_mul(x[0], "silu")
    with ops.forced("reference"), contextlib.suppress(ZeroDivisionError), ops.unchecked():
        assert ops.act_and_mul(x[0], "silu").shape == (4,)
        assert torch.equal(ops.linear(x, weight), torch.full((2, 4), 8.0))
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="act_and_mul: x must have dimensions"):
        ops.act_and_mul(x[0], "silu")
