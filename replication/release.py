"""Which release of Tiered this process runs.

Holders and the coordinator outlive the processes that start them, so a cluster may run another
release than its user. Their messages are Python objects of one release: two do not mix. And a call
of a method that an older process of the same actor does not have ends that process, with all that
it holds (ray 2.60). So each release is told in an answer that every release has given, before
anything else is asked.
"""

from typing import Any

RELEASE = "0.1.0"


def release_of(answer: Any) -> str:
    """The release that an answer names; releases that did not name theirs are older than 0.1.0."""
    release = answer if isinstance(answer, str) else getattr(answer, "release", "")
    return release or "an unnamed older one"
