"""What a model computes on, in words: times are comparable where it is the same."""

from __future__ import annotations

import platform

import torch


def name_of(device: torch.device) -> str:
    """The system, and the GPU's name or the CPU's kind: ``Linux x86_64``."""
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{platform.system()} {own}"


def speed_of(device: torch.device) -> str:
    """As `name_of`, with the threads of a CPU: what a duration depends on."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name_of(device)}{threads}"
