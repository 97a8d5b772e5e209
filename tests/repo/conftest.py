"""Tests of this folder import the repository's own tools, which no distribution installs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
