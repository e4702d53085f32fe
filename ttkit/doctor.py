"""What works on this machine: the checks behind `ttkit doctor`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ttkit
from ttkit import provenance
from ttkit.journal import write_atomic


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is False for what a default run needs and does not have."""

    name: str
    ok: bool
    text: str


def examine() -> list[Finding]:
    """Try everything that a default run needs. Never raises: a failure is a finding."""
    checks: dict[str, Callable[[], str]] = {
        "python": _python,
        "libraries": _libraries,
        "torch": _torch,
        "training": _training,
        "notebook kernel": _kernel,
        "project folder": _project,
        "disk": _disk,
        "verifier": _verifier,
    }
    found = []
    for name, check in checks.items():
        try:
            found.append(Finding(name, True, check()))
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            found.append(Finding(name, False, first))
    return found


def _python() -> str:
    machine = provenance.machine()
    return f"{machine['python']}, ttkit {ttkit.__version__}, {machine['cpus']} x {machine['cpu']}"


def _libraries() -> str:
    versions = provenance.library_versions()
    if missing := sorted(set(provenance.LIBRARIES) - set(versions)):
        raise RuntimeError(f"missing: {', '.join(missing)}; `make setup` installs them")
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _torch() -> str:
    import torch

    value = (torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
    if value != 512:
        raise RuntimeError(f"an 8x8 product came out as {value} instead of 512")
    if not torch.cuda.is_available():
        return f"{torch.__version__}, {torch.get_num_threads()} threads, no CUDA device"
    torch.ones(8, device="cuda").sum().item()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, CUDA {torch.version.cuda} on {', '.join(names)}"


def _training() -> str:
    from peft import LoraConfig  # noqa: F401
    from trl import GRPOTrainer  # noqa: F401

    return "TRL's GRPOTrainer and PEFT's LoRA can be imported"


def _kernel() -> str:
    from jupyter_client.kernelspec import KernelSpecManager

    command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    if "/" in command and Path(command).resolve() != Path(sys.executable).resolve():
        raise RuntimeError(
            f"the Jupyter kernel python3 starts {command}, not this Python: run "
            "`python -m ipykernel install --sys-prefix`"
        )
    return "python3 starts this Python"


def _project() -> str:
    from ttkit.parameters import load_notebooks, union
    from ttkit.store import project_root

    root = project_root()
    notebooks = load_notebooks(root / "notebooks")
    return f"{root}: {len(notebooks)} notebooks, {len(union(notebooks))} parameters"


def _disk() -> str:
    from ttkit.store import project_root

    root = project_root()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        write_atomic(Path(folder) / "trial", b"trial")
    return (
        f"{shutil.disk_usage(root).free / 2**30:.1f} GiB free, and the project folder is writable"
    )


def _verifier() -> str:
    from ttkit import prompts
    from ttkit.tasks import find_task
    from ttkit.verify import Verifier

    task = find_task("minibench:1/1")
    with Verifier("fast-proxy") as verifier:
        verdict = verifier.verify(task, prompts.candidate_source(task, task.forward_body))
    if not verdict.correct:
        raise RuntimeError(
            f"the reference of {task.key} was judged {verdict.status}: {verdict.reason}"
        )
    return f"judged the reference of {task.key} correct in {verdict.seconds:.1f} s"
