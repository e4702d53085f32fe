"""Where a result came from: the code's version, the libraries, the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import ttkit

LIBRARIES = """
    torch transformers tokenizers peft trl accelerate datasets numpy scipy pandas pyarrow matplotlib
    papermill ipykernel
""".split()  # noqa: SIM905


def git_version() -> dict[str, Any]:
    """The commit of the working tree this package lies in, and whether it was altered since."""

    def git(*args: str) -> str | None:
        folder = str(Path(ttkit.__file__).parent)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            out = subprocess.run(["git", "-C", folder, *args], capture_output=True, timeout=20)
            return out.stdout.decode().strip() if out.returncode == 0 else None
        return None

    # A package installed into an unrelated repository's environment is not that repository's code.
    if not git("ls-files", "__init__.py"):
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "."))}


def library_versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name() -> str:
    """The GPU in use, or \"cpu\"."""
    # Loading torch only to look would cost a light stage several seconds.
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Python, platform, processor and device, as they go into every manifest."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": device_name(),
    }
