"""Spans of time as people read them."""


def clock(seconds: float) -> str:
    """1:02:03 for an hour, two minutes and three seconds; 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
