"""What a passing test cannot say by passing, as whether a real cluster was there: conftest.py prints it at the end."""

NOTES: list[str] = []
