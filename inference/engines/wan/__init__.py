"""Wan2.2 image-to-video on one GPU.

OpenMP keeps a pool of threads for each thread that computes, and lets those with nothing to do spin. Without a GPU the
engine computes in more than one thread, and idle pools take the cores that the busy one and ffmpeg need: a clip of the
tiny preset took 28 s of CPU time instead of 10 (tests/bench/LOG.md). libgomp reads the environment once, when torch
loads it, so this is said before anything here imports torch. With a GPU, where the CPU hardly computes, nothing is
changed; a choice of the operator's stays.
"""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
