"""What rank 0 last told of a run: its step, and when. The controller reads it after a failure.

It is in Ray's GCS, because every process of the job may be gone when it is wanted. One small write
at a time, every `PULSE_S` at most and at once after a restore, from a thread of rank 0's, never
from the training thread.
"""

import json
from dataclasses import asdict, fields

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from replication.holder import NAMESPACE
from tiered.ray_train.timeline import Pulse

PULSE_S = 0.5
PULSE_NAMESPACE = f"{NAMESPACE}-ray-train"


def read_pulse(job: str) -> Pulse | None:
    """The newest pulse of a job; None when there was none."""
    data: bytes | None = _internal_kv_get(job, namespace=PULSE_NAMESPACE)
    if data is None:
        return None
    known = {field.name for field in fields(Pulse)}
    return Pulse(**{k: v for k, v in json.loads(data).items() if k in known})


def write_pulse(job: str, pulse: Pulse) -> None:
    """Leave this as the newest pulse of a job."""
    data = json.dumps(asdict(pulse)).encode()
    _internal_kv_put(job, data, overwrite=True, namespace=PULSE_NAMESPACE)
