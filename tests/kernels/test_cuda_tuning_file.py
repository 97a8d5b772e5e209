"""What a search found, kept for the next start."""

import json
from pathlib import Path

import pytest
import torch

from octavo_kernels import ops

if "cuda" not in ops.implementations("cuda"):
    pytest.skip("octavo_kernels._cuda is not built", allow_module_level=True)

from octavo_kernels import cuda_tuning_file
from octavo_kernels.cuda_lt import Size

SIZE = Size("bfloat16", False, 64, 32, 8)
ENTRY = {"size": list(SIZE), "algorithm": "00" * 64}
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(cuda_tuning_file, "_file", lambda folder, device: folder / "products.json")
    monkeypatch.setattr(cuda_tuning_file, "_read", {})
    monkeypatch.setattr(cuda_tuning_file, "_refused", set())


def next_process() -> None:
    cuda_tuning_file._read.clear()


def test_what_was_found_is_found_by_the_next_process(tmp_path, caplog) -> None:
    folder = tmp_path / "not" / "there"
    assert cuda_tuning_file.read(folder, GPU) == {}
    found = {SIZE: bytes(range(64)), SIZE._replace(rows=16): None}
    cuda_tuning_file.add(folder, GPU, found)
    next_process()
    assert cuda_tuning_file.read(folder, GPU) == found
    assert [file.name for file in folder.iterdir()] == ["products.json"]
    assert not caplog.records


def test_what_another_process_found_meanwhile_stays(tmp_path) -> None:
    cuda_tuning_file.add(tmp_path, GPU, {SIZE: None, SIZE._replace(n=8): bytes(64)})
    cuda_tuning_file.add(tmp_path, GPU, {SIZE: b"1" * 64, SIZE._replace(n=16): None})
    assert cuda_tuning_file.read(tmp_path, GPU) == {
        SIZE: b"1" * 64,
        SIZE._replace(n=8): bytes(64),
        SIZE._replace(n=16): None,
    }


def of(*rows: object) -> str:
    return json.dumps({"format": cuda_tuning_file._FORMAT, "found": list(rows)})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[1]", b"3", b"\xff\xfe", b'{"format": 1, "found": []}', b'{"found": []}',
        of(3), of({}), of({"size": [1], "algorithm": None}), of({**ENTRY, "algorithm": "00"}),
        of({**ENTRY, "algorithm": 5}), of({**ENTRY, "algorithm": "zz" * 64}),
        of({**ENTRY, "size": ["bfloat16", False, 64, 32, 0]}),
        of({**ENTRY, "size": ["bfloat16", False, 64, 32, True]}),
        of({**ENTRY, "size": ["bfloat16", 0, 64, 32, 8]}),
        of({**ENTRY, "size": [[], False, 64, 32, 8]}),
        of(ENTRY, {"size": list(SIZE)}),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_said_once_and_written_anew(
    content, tmp_path, caplog
) -> None:
    file = tmp_path / "products.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cuda_tuning_file.read(tmp_path, GPU) == cuda_tuning_file.read(tmp_path, GPU) == {}
    [record] = caplog.records
    assert "products.json cannot be used, sizes are searched again" in record.getMessage()
    cuda_tuning_file.add(tmp_path, GPU, {SIZE: None})
    next_process()
    assert cuda_tuning_file.read(tmp_path, GPU) == {SIZE: None}


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level("INFO"):
        for _ in range(2):
            cuda_tuning_file.add(tmp_path / "file" / "folder", GPU, {SIZE: None})
    written = [record for record in caplog.records if "is not written" in record.getMessage()]
    assert len(written) == 1


def test_pods_that_write_at_the_same_time_leave_a_whole_file(tmp_path, monkeypatch, caplog) -> None:
    """Of a shared folder; in containers both may even have the same process id."""
    mine, others = {SIZE: bytes(64)}, {SIZE._replace(n=8): None}
    real, inner = Path.write_text, []

    def write_text(file, *args, **named):
        written = real(file, *args, **named)
        if not inner:
            inner.append(file)
            cuda_tuning_file.add(tmp_path, GPU, others)
        return written

    monkeypatch.setattr(Path, "write_text", write_text)
    with caplog.at_level("INFO"):
        cuda_tuning_file.add(tmp_path, GPU, mine)
    assert not caplog.records
    assert cuda_tuning_file.read(tmp_path, GPU) == mine
    cuda_tuning_file.add(tmp_path, GPU, others)  # as every later find does
    next_process()
    assert cuda_tuning_file.read(tmp_path, GPU) == mine | others
    assert [file.name for file in tmp_path.iterdir()] == ["products.json"]


def test_a_full_disk_keeps_no_part_of_a_file(tmp_path, monkeypatch) -> None:
    def write_text(file, *args, **named):
        file.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    cuda_tuning_file.add(tmp_path, GPU, {SIZE: None})
    assert not list(tmp_path.iterdir())
