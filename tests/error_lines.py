"""The check that an error message is exactly one line."""


def assert_one_line(err: str, *parts: str) -> None:
    """Asserts that stderr is one line "error: …" that contains all parts."""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    for part in parts:
        assert part in err
