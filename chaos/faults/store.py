"""S3, through the proxy in front of a real server, and the server itself."""

import os
import signal
from collections.abc import Callable, Mapping
from functools import partial

from chaos.s3_faults import Fault
from chaos.schedule import Planned
from chaos.world import Aim, World

SLOW_S = 2.0
SHARE = 0.5  # of the requests, where not all are hit

FAULTS: Mapping[str, tuple[Fault, ...]] = {
    "s3-down": (Fault("cut_request", times=None, at_bytes=0),),
    "s3-slow": (Fault("slow", times=None, delay_s=SLOW_S),),
    "s3-errors": (Fault("status", times=None, probability=SHARE),),
    "s3-throttled": (Fault("status", times=None, probability=SHARE, status=503, code="SlowDown"),),
    "s3-forbidden": (Fault("status", times=None, status=403, code="AccessDenied"),),
    "s3-truncated": (
        Fault("truncate", match="^(GetObject|ListObjects)", times=None, probability=SHARE),
    ),
    "s3-wrong-bytes": (
        Fault("flip", match="^GetObject", times=None, probability=SHARE),
        Fault("flip_request", match="^(PutObject|UploadPart)", times=None, probability=SHARE),
    ),
    "s3-cut": (
        Fault("cut_request", match="^(PutObject|UploadPart)", times=None, probability=SHARE),
        Fault("cut_response", match="^(GetObject|ListObjects)", times=None, probability=SHARE),
    ),
    # Of a manifest, or of a claim: whoever asks again finds that it exists, and that it is his.
    "s3-lost-replies": (
        Fault("drop_reply", match="^(Put|Upload|Create|Complete)", times=None, probability=SHARE),
    ),
}


def _disturb(faults: tuple[Fault, ...], world: World, planned: Planned) -> Aim | None:
    proxy = world.proxy
    if proxy is None or world.is_s3_busy:
        return None
    return Aim("S3", lambda: proxy.set_faults(*faults), proxy.set_faults, is_s3=True)


def s3_hung(world: World, planned: Planned) -> Aim | None:
    """SIGSTOP the server: connections open, and nothing comes."""
    server = world.server
    if server is None or world.is_s3_busy:
        return None
    return Aim(
        "the S3 server",
        lambda: os.killpg(server.process_group, signal.SIGSTOP),
        lambda: os.killpg(server.process_group, signal.SIGCONT),
        is_s3=True,
    )


MECHANISMS: Mapping[str, Callable[[World, Planned], Aim | None]] = {
    **{name: partial(_disturb, faults) for name, faults in FAULTS.items()},
    "s3-hung": s3_hung,
}
