# noqa: INP001 - a folder of files that RunPod's Hub looks for, no package
"""The Hub looks for a handler by this name; the worker is `runpod_handler.py`, at the root of the repository."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runpod_handler import main

if __name__ == "__main__":
    main()
