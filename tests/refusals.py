"""What every refusal looks like: one line, and no more."""


def assert_one_line(err: str, *parts: str) -> None:
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    for part in parts:
        assert part in err
