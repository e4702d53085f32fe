"""What several test files run."""

import sys

import pytest

from ttkit import cli


@pytest.fixture
def ttkit(monkeypatch, capsys):
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["ttkit", *map(str, args)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
