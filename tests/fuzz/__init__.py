"""Fuzzing of everything that reads files; `PYTHONPATH=tests python -m fuzz --help` says how to run it.

An input is a line with the name of a file and, behind it, the file's content: so one corpus holds files of many kinds.
"""
