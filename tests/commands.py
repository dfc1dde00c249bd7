"""The command line within the tests' own process."""

from __future__ import annotations

from hlip.cli import main as cli


def run(*words: object) -> int:
    """Run `hlip` with these words; the exit status, also of words that it does not take."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
