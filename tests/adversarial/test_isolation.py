"""What a hostile candidate leaves behind: seen from outside, whatever its verdict says.

A guard that the system does not grant is recorded in the verdict as absent; what it would have
prevented is then not asserted.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from ttkit.verify import Verdict, Verifier
from ttkit.verify.launcher import scrubbed_environment

from .case import Case, module
from .suite import LIMITS, QUICK, judged, too_busy, verifier
from .tasks import SINES

RIGHT = "WORK\nreturn out"


@pytest.fixture(scope="module")
def judge():
    with verifier() as v:
        yield v


def run(judge: Verifier, body: str, top: str = "") -> Verdict:
    return judged(judge, Case(30, "isolation", SINES, module(SINES, body, top=top)))


def test_who_is_judged_on_the_cpu_finds_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert scrubbed_environment("/nowhere", "cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert scrubbed_environment("/nowhere", "cuda")["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_secrets_of_the_environment_are_not_visible(monkeypatch):
    monkeypatch.setenv("TTKIT_TEST_SECRET", "hunter2")
    top = """
import glob, os
seen = str(dict(os.environ))
for path in (*glob.glob("/proc/[0-9]*/environ"), *glob.glob("/proc/[0-9]*/cmdline")):
    try:
        seen += open(path, errors="replace").read()
    except OSError:
        pass
if "hunter2" in seen or "TTKIT_TEST_SECRET" in seen:
    raise ValueError("leaked")
"""
    # A verifier of its own: its server starts while the secret is there.
    with verifier() as v:
        verdict = run(v, RIGHT, top)
    assert verdict.correct or too_busy(verdict), verdict


@pytest.mark.parametrize("family", ["loopback", "abstract", "path"])
def test_no_connection_arrives(judge, family):
    kind = socket.AF_INET if family == "loopback" else socket.AF_UNIX
    # A folder of its own, which other users may enter: it must be the filter that refuses them.
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(kind, socket.SOCK_STREAM) as listener,
    ):
        path = f"{folder}/line"
        abstract = f"\0ttkit-test-{os.getpid()}"
        listener.bind({"loopback": ("127.0.0.1", 0), "abstract": abstract, "path": path}[family])
        if family == "path":
            os.chmod(folder, 0o777)
            os.chmod(path, 0o777)
        listener.listen()
        listener.settimeout(0.5)
        top = f"""
import socket
try:
    line = socket.socket({int(kind)}, socket.SOCK_STREAM)
    line.settimeout(0.3)
    line.connect({listener.getsockname()!r})
    line.send(b"hello")
except OSError:
    pass
"""
        verdict = run(judge, RIGHT, top)
        # A path lies in no network namespace: there the filter of system calls is in the way.
        guard = "system_call_filter" if family == "path" else "network_namespace"
        if verdict.guards.get(guard):
            with pytest.raises(TimeoutError):
                listener.accept()


def test_files_outside_the_scratch_directory_stay_as_they_are(judge, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("before")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    top = f"""
import os, shutil
open("note", "w").write("fine")
for attempt in (
    lambda: open({str(victim)!r}, "w").write("after"),
    lambda: os.remove({str(victim)!r}),
    lambda: os.rename({str(victim)!r}, {str(victim) + "2"!r}),
    lambda: os.symlink("/etc/passwd", {str(tmp_path / "link")!r}),
    lambda: os.chmod({str(victim)!r}, 0o777),
    lambda: shutil.rmtree({str(tmp_path)!r}),
):
    try:
        attempt()
    except OSError:
        pass
"""
    verdict = run(judge, RIGHT, top)
    if verdict.guards.get("read_only_files"):
        assert victim.read_text() == "before"
        assert victim.stat().st_mode & 0o777 == 0o666
        assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_verdict_cannot_be_written_into_the_cache(tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    tmp_path.chmod(0o777)
    wrong = f"""
for line in ('{{"key": "0", "verdict": {{"status": "correct", "reason": "planted"}}}}\\n',) * 3:
    try:
        open({str(cache)!r}, "a").write(line)
    except OSError:
        pass
return x
"""
    with Verifier(QUICK, limits=LIMITS, cache=cache) as v:
        right = run(v, RIGHT)
        cache.touch()
        cache.chmod(0o666)
        verdict = run(v, wrong)
        again = run(v, wrong)
    assert right.correct or too_busy(right)
    assert not verdict.correct and not again.correct
    if verdict.guards.get("read_only_files"):
        assert "planted" not in cache.read_text()


LEFT_BEHIND = {
    "a daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        named()\n"
    "    os._exit(0)",
    "a child": "if os.fork() == 0:\n    named()",
    "a program": "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # ttkit-orphan'])",
}
NAMED = """
import os, time
def named():
    import ctypes
    ctypes.CDLL(None).prctl(15, b"ttkit-orphan", 0, 0, 0)
    time.sleep(600)
    os._exit(0)
"""


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_nothing_outlives_the_verdict(judge, name):
    run(judge, f"{LEFT_BEHIND[name]}\n{RIGHT}", NAMED)
    for _ in range(200):
        if not _alive("ttkit-orphan"):
            break
        # Ending a process takes the system a moment.
        time.sleep(0.05)
    assert not _alive("ttkit-orphan")


def _alive(word: str) -> bool:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "comm").read_text() + (path / "cmdline").read_text()
        except OSError:
            continue
        if word in text:
            return True
    return False


STOPPERS = {
    "kill all": "import os\nos.kill(-1, 9)",
    "kill the parent": "import os\nos.kill(os.getppid() or os.getpid(), 9)",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fill the disk": "n = 0\nwhile True:\n    n += 1\n"
    "    open(f'part{n}', 'wb').write(bytes(1 << 24))",
    "descriptors": "import os\nkept = [os.dup(0) for _ in range(10**6)]",
    "hang up": "import os\nos.closerange(0, 100)",
    "memory": "kept = []\nwhile True:\n    kept.append(torch.ones(1 << 24))",
}


@pytest.mark.parametrize("name", STOPPERS)
def test_one_candidate_costs_one_verdict(judge, name):
    verdict = run(judge, f"{STOPPERS[name]}\nreturn x")
    assert verdict.status not in ("correct", "infra_error"), verdict
    # A body that was not verified before, so that no kept verdict answers.
    after = run(judge, f"name = {name!r}\n{RIGHT}")
    assert after.correct or too_busy(after), after
