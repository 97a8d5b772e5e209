"""Compiles a CUDA source once a user: the object is kept by the content of what it is made of.

    compile_once.py nvcc ... -MF object.d ... -c source.cu -o object

CMake calls it in front of nvcc (CMAKE_CUDA_COMPILER_LAUNCHER, set by setup.py). A checkout whose
sources were compiled before, here or elsewhere, takes the objects from the user's cache. Standard
library only.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setup import cache_dir

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
KEPT_S = 30 * 86400  # since an object was last wanted


def included(source: Path, folders: list[Path]) -> list[Path]:
    """The source and every header of ours that it includes, directly or not.

    `<...>` are the toolkit's and the compiler's own, for which their versions stand.
    """
    found, open_ends = [source], [source]
    while open_ends:
        here = open_ends.pop()
        for name in INCLUDE.findall(here.read_text()):
            paths = [folder / name for folder in (here.parent, *folders)]
            header = next((p.resolve() for p in paths if p.is_file()), None)
            if header is not None and header not in found:
                found.append(header)
                open_ends.append(header)
    return found


def compiler_version(nvcc: Path) -> bytes:
    """What the compiler, its host compiler and the CUDA runtime's headers call themselves."""
    said = [
        subprocess.run([command, "--version"], capture_output=True).stdout
        for command in (nvcc, "c++")
    ]
    api = nvcc.resolve().parent.parent / "include" / "cuda_runtime_api.h"
    return b"\0".join([*said, api.read_bytes() if api.exists() else b""])


def key_of(command: list[str], sources: list[Path]) -> str:
    """Equal for equal results: options without paths, which differ between checkouts."""
    options = [word for word in command[1:] if "/" not in word]
    h = hashlib.sha256(compiler_version(Path(command[0])) + "\0".join(options).encode())
    for path in sources:
        h.update(path.name.encode() + b"\0" + path.read_bytes())
    return h.hexdigest()


def main(command: list[str]) -> int:
    """Take the object from the cache, or compile and keep it; the compiler's exit code."""
    after = dict(itertools.pairwise(command))
    if "-c" not in after or "-o" not in after:  # CMake asking what the compiler can do
        return subprocess.run(command).returncode
    source, target = Path(after["-c"]), Path(after["-o"])
    folders = [Path(word[2:]) for word in command if word.startswith("-I")]
    sources = included(source.resolve(), folders)
    kept = cache_dir() / "cuda-objects" / f"{key_of(command, sources)}.o"
    if kept.exists():
        shutil.copyfile(kept, target)
        kept.touch()
        if "-MF" in after:
            dependencies = " ".join(str(path) for path in sources)
            Path(after["-MF"]).write_text(f"{after['-MT']}: {dependencies}\n")
        return 0
    code = subprocess.run(command).returncode
    if code == 0:
        keep(target, kept)
    return code


def keep(target: Path, kept: Path) -> None:
    """Put the object into the cache, whole or not at all, and forget what nobody wants."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob("*.o"):
        if time.time() - old.stat().st_mtime > KEPT_S:
            old.unlink(missing_ok=True)
    partial = kept.with_suffix(f".{target.stat().st_ino}")
    shutil.copyfile(target, partial)
    partial.replace(kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
