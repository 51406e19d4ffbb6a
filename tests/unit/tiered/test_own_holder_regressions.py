"""What chaos found in how a rank finds its host's holder."""

from typing import Any

import pytest
import ray

from replication.errors import HolderUnavailableError
from replication.records import HolderId
from tiered import cluster
from tiered.own_holder import OwnHolder


def test_a_holder_that_dies_while_it_is_looked_up_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The coordinator had not noticed yet; Ray's ValueError ended the training."""

    def gone(*_: Any) -> None:
        raise ValueError("Failed to look up actor with name 'holder-host'")

    monkeypatch.setattr(cluster, "ask", lambda *_, **__: HolderId("host", "one"))
    monkeypatch.setattr(ray, "get_actor", gone)
    holder = OwnHolder.__new__(OwnHolder)
    holder.node_id, holder._coordinator = "host", None
    with pytest.raises(HolderUnavailableError, match="it has just died") as raised:
        holder._find()
    assert raised.value.retryable
