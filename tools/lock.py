"""Resolves requirements/*.lock from pyproject.toml in one resolution: images and tests agree."""

from __future__ import annotations

import setup


def main() -> None:
    """dev.lock holds everything; the other locks (images, build) are subsets, by constraint."""
    uv = setup.ensure_uv()
    common = (
        "pip",
        "compile",
        "--quiet",
        "--python-version",
        "3.11",
        "--python-platform",
        "x86_64-manylinux_2_28",
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "pyproject.toml",
    )
    folder = setup.ROOT / "requirements"
    setup.run(uv, *common, "--upgrade", "--extra", "dev", "-o", folder / "dev.lock")
    for extra in ("server", "operator", "build", "cuda"):
        lock = folder / f"{extra}.lock"
        lock.unlink(missing_ok=True)
        setup.run(uv, *common, "--extra", extra, "-c", folder / "dev.lock", "-o", lock)


if __name__ == "__main__":
    main()
