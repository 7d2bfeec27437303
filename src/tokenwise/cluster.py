"""Connecting to a Ray cluster."""

from __future__ import annotations

import importlib.util
import logging

from tokenwise.errors import InputError, Problem


def require_ray(field: str = "--ray") -> None:
    """Check that Ray is installed.

    Raises:
        InputError: when it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(Problem(field, "Ray is not installed.", "Install it: pip install 'tokenwise[ray]'."))


def connect(address: str, field: str = "--ray") -> bool:
    """Connect this process to a cluster, unless it is connected already; returns whether it was this call that did.

    Args:
        address: as `ray.init` takes it; ``local`` starts a cluster on this machine.
        field: the field to name in an error.

    Raises:
        InputError: when there is no cluster at the address.
    """
    import ray

    if ray.is_initialized():
        return False
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        message = f"there is no Ray cluster at {address!r} ({error})."
        raise InputError(Problem(field, message, "Start one (ray start --head), or write local.")) from error
    return True


def worker_resources() -> tuple[int, int]:
    """Threads and GPUs of one worker: the threads this process has, or fewer where no node has as many."""
    import ray
    import torch

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    threads = min(torch.get_num_threads(), max(int(node.get("CPU", 1)) for node in nodes))
    gpus = int(any(node.get("GPU", 0) >= 1 for node in nodes))
    return threads, gpus
