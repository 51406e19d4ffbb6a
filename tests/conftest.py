import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class OneClusterAtATime(LoadScopeScheduling):
    """One process has the tests that start clusters, others all other tests.

    Groups (`--dist loadgroup`) would do; pytest-xdist 3.8 does not see them under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if nodeid.startswith("tests/integration/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return OneClusterAtATime(config, log)
