"""`octavo serve` with the fake engine in the engine's place.

Usage: serve_with_fake_engine.py ENGINE_FLAG... -- SERVE_ARGUMENT...
"""

import functools
import sys
from pathlib import Path

from octavo import cli
from octavo.api import launch

if __name__ == "__main__":
    at = sys.argv.index("--")
    engine = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), *sys.argv[1:at]]
    launch.serve = functools.partial(launch.serve, engine_command=engine)
    sys.exit(cli.main(["serve", *sys.argv[at + 1 :]]))
