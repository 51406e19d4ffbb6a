"""Names of parametrized cases that are the same in every process."""

import re


def name_of(value: object) -> str:
    """As `repr`, but without addresses, and a set's members in order."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__} of {sorted(map(name_of, value))}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
