import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from test_scoring import make_adapter
from toy import make_project

from ttkit import bench_score as module
from ttkit import cli, prompts, store
from ttkit.bench_score import bench_score
from ttkit.errors import UsageError
from ttkit.policy import load
from ttkit.pretrain import pretrain
from ttkit.sampling import SamplingParams, TransformersSampler
from ttkit.tasks import find_task


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run with a small policy, its adapter and 24 samples of two tasks."""
    root = make_project(tmp_path_factory.mktemp("bench"))
    base, drawn = (root / "runs/demo" / s for s in ("01_train_base_policy", "02_best_of_n"))
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "vocab": 300}
    pretrain(base / "model", n_examples=64, batch=16, on_step=lambda *_: None, **sizes)
    make_adapter(base / "model", base / "adapter", 1)
    model, tokenizer = load(base / "model", base / "adapter")
    rows = []
    for key in ("minibench:2/1", "minibench:2/2"):
        chat = prompts.messages(find_task(key), "compact", "body")
        params = SamplingParams(12, 1.0, max_tokens=24)
        for i, c in enumerate(TransformersSampler(model, tokenizer).sample([chat], params)[0]):
            numbers = {name: getattr(c, name) for name in ("nll_sum", "nll_mean", "nll_max")}
            rows.append({"task": key, "index": i, "token_ids": list(c.token_ids), **numbers})
    table = pd.DataFrame(rows)
    for name, dtype in store.SAMPLE_DTYPES.items():
        if name not in table:
            table[name] = {"str": "", "int64": 0, "bool": False}.get(dtype, np.nan)
    drawn.mkdir(parents=True)
    store.check_samples(table.assign(temperature=1.0)).to_parquet(drawn / "samples.parquet")
    for folder in (base, drawn):
        (folder / "DONE").touch()
    return root


def test_both_ways_agree_and_all_is_counted(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    result = bench_score(checkpoints=3, samples=20, singles=5)
    assert result["largest_difference"] <= module.WITHIN
    assert (result["samples"], result["checkpoints"]) == (20, 3)
    assert 0 < result["distinct"] <= 20 < result["tokens"]
    assert 0 < result["ratio_lowest"] <= result["ratio"] <= result["ratio_highest"]
    monkeypatch.setattr(module, "WANTED", 0.0)
    monkeypatch.setattr(
        sys, "argv", ["ttkit", "bench", "score", "--samples", "8", "--checkpoints", "2", "--json"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and json.loads(capsys.readouterr().out)["ok"] is True


def test_the_answer_is_no_when_scores_differ(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(module, "WANTED", 0.0)
    original = module._one
    monkeypatch.setattr(module, "_one", lambda *args: original(*args) + 0.01)
    result = bench_score(checkpoints=1, samples=6, singles=3)
    assert not result["ok"] and result["largest_difference"] == pytest.approx(0.01, abs=1e-3)


def test_adapters_from_nothing_to_the_whole(project, tmp_path):
    from safetensors.torch import load_file

    source = project / "runs/demo/01_train_base_policy/adapter"
    whole = load_file(source / "adapter_model.safetensors")
    made = module._adapters(source, tmp_path, 3)
    for share, path in zip((0.0, 0.5, 1.0), made.values(), strict=True):
        found = load_file(path / "adapter_model.safetensors")
        for name, weight in whole.items():
            assert torch.equal(found[name], weight * (share if "lora_B" in name else 1.0))


def test_a_run_that_is_not_there(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(UsageError, match="needs 01_train_base_policy of runs/x: `ttkit run"):
        bench_score("runs/x")
    with pytest.raises(UsageError, match="at least one checkpoint"):
        bench_score(checkpoints=0)


@pytest.mark.gpu
def test_a_gpu_gives_the_same(project, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.chdir(project)
    result = bench_score(checkpoints=9, samples=24, device="cuda")
    assert result["largest_difference"] < 1e-3
