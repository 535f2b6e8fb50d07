"""What every test may use. Checkpoints come from `tests.factories`."""

import os
import signal

import torch
from hypothesis import HealthCheck, settings

# No test may reach the real hub; those that need one start their own (`tests/e2e/hub_server.py`).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Programs that tests start take one thread, too: threads without a processor of their own stall the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started in the background, a process ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile("moemerge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moemerge")
