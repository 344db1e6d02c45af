"""What a benchmark ran on."""

import platform
from pathlib import Path

import torch


def processor(device: str = "cpu") -> str:
    """The name of the processor, or of the GPU that ``device`` is."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
