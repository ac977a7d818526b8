from typing import Any

from tests.study.clusters import NOTES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a passing test can't say by passing: whether a real cluster was there."""
    for note in NOTES:
        terminalreporter.write_line(note, yellow=note.startswith("NO "), bold=True)
