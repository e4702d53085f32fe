"""Where the memory of large tensors lies in a process that is timed."""

import json
import subprocess
import sys

from ttkit.verify.launcher import scrubbed_environment
from ttkit.verify.race import PAD_BYTES, shift

RUNS = """
import json, sys, types
import torch
from ttkit.verify.runner import Runner

class Model(torch.nn.Module):
    def forward(self, x):
        kept = []
        for n in range(20):
            x = torch.clamp(x, -2.0, 2.0)
            kept.append(torch.zeros(n + 1))
        return x

task = types.SimpleNamespace(get_init_inputs=lambda: [])
runner = Runner(Model, task, 0, "cpu")
x = torch.randn(256, 1024)
places = []
for pad in json.loads(sys.argv[1]):
    runner.forget()
    runner.inputs = [(x.view_as(x),)]
    runner.shift(pad)
    runner.run([0])
    behind = runner.pad[-1].data_ptr() + runner.pad[-1].numel()
    places.append((behind, runner.outputs[0].data_ptr() - behind))
print(json.dumps(places))
"""


def test_what_a_run_allocates_lies_behind_its_shift_and_mostly_at_the_same_distance(tmp_path):
    pads = [PAD_BYTES, *(shift() for _ in range(30))]
    found = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(pads)],
        env=scrubbed_environment(str(tmp_path), "cpu"),
        capture_output=True,
        text=True,
        check=True,
    )
    places = json.loads(found.stdout)
    distances = [distance for _, distance in places]
    # A few runs of some processes use a hole that an object of the first run has left: noise.
    assert max(map(distances.count, distances)) > len(pads) / 2
    assert max(b for b, _ in places) - min(b for b, _ in places) > PAD_BYTES // 2
