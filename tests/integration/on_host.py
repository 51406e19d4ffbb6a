"""on_host.py ADDRESS SCRIPT: run SCRIPT as a process of the Ray host that has this address."""

import os
import runpy
import sys

import ray

ray.init(
    address=os.environ["RAY_ADDRESS"],
    _node_ip_address=sys.argv[1],  # else Ray takes the head for this machine's host
    log_to_driver=False,
    logging_level="WARNING",
)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
