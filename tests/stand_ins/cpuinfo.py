"""Stands in for py-cpuinfo in RunPod workers: their SDK asks it for the name of the processor, for a debug print.

The real one measures the processor for a second, at full load, while `runpod` is imported: in every worker.
"""


def get_cpu_info() -> dict[str, str]:
    """What the SDK reads of it."""
    return {"brand_raw": "a processor"}
