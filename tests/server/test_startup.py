"""What a start does beside the runner: reading ahead, and telling where its time went."""

import os

import pytest

from octavo import wire
from octavo.engine.startup import Reporter, read_ahead


@pytest.mark.parametrize(("most", "expected"), [(0, 0), (100, 0), (250, 1), (300, 2), (10**9, 3)])
def test_weights_are_asked_for_as_far_as_they_fit(tmp_path, monkeypatch, most, expected) -> None:
    for index in range(3):
        (tmp_path / f"model-{index}.safetensors").write_bytes(bytes(150))
    (tmp_path / "a.bin").write_bytes(b"1")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: asked.append(args[1:]))
    read_ahead(tmp_path, most).join(5)
    assert asked == [(0, 0, os.POSIX_FADV_WILLNEED)] * expected


def test_a_folder_that_is_not_there_is_for_others_to_name(tmp_path) -> None:
    read_ahead(tmp_path / "nowhere", 10**9).join(5)


def test_the_timeline_adds_up_each_phase() -> None:
    now, sent = [0.0], []
    report = Reporter(sent.append, clock=lambda: now[0])
    for phase, ratio, seconds in (("import", 0, 2.5), ("weights", 0, 1), ("weights", 1, 0.25)):
        report(phase, ratio)
        now[0] += seconds
    assert report.timeline() == "import 2.50 s, weights 1.25 s"
    assert sent[-1] == wire.Progress("weights", 1, None)
