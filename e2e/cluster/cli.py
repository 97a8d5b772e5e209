"""`python3 e2e/cluster/cli.py VERB`, from anywhere: the same as `python3 -m e2e.cluster`."""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
runpy.run_module("e2e.cluster", run_name="__main__", alter_sys=True)
