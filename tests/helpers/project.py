"""Folders and commands of the project, for tests that read its files or start its commands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
RUN, ANALYSIS = ROOT / "study" / "run.py", ROOT / "study" / "analysis.py"
SHARED = ROOT.parent / "shared"
REAL_DATA = SHARED / "data" / "uts02"
