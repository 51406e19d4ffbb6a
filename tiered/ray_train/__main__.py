"""`python -m tiered.ray_train`: the settings for fast recovery, as a file of variables."""

import sys

from tiered.ray_train.profile import fast_recovery

sys.stdout.write(fast_recovery().env_file())
