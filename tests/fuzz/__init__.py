"""Fuzzing of everything that reads files; `python -m tests.fuzz --help` says how to run it.

An input is a line with the name of a file and, behind it, the file's content: so one corpus holds files of many kinds.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "train")]  # helpers of other tests
