"""Tasks, sources and splits."""

import json
from pathlib import Path

import pandas as pd
import pytest

from ttkit.errors import UsageError
from ttkit.tasks import LEVELS, Task, find_task, load_split, load_tasks, make_split

PAPER_EVAL = (4, 5, 12, 14, 15, 18, 28, 29, 30, 32, 36, 55, 65, 70, 76, 82, 87, 89, 95, 98)
SPLITS = Path(__file__).parent.parent / "splits"
CODE = '''
import torch

class Model(torch.nn.Module):
    """Doubles."""

    def forward(self, x: torch.Tensor, k: int = 2) -> torch.Tensor:
        """Twice x."""
        # why not
        y = x * k
        return y

def get_inputs():
    return [torch.ones(3)]

def get_init_inputs():
    return []
'''


def test_seed_42_gives_the_papers_evaluation_tasks():
    split = make_split("kernelbench", 1, 42)
    assert split.eval == PAPER_EVAL
    assert len(split.train) == 80 and not set(split.train) & set(split.eval)
    assert make_split("kernelbench", 1, 43).eval != PAPER_EVAL


def test_the_order_of_the_ids_does_not_matter():
    ids = list(range(1, 101))
    assert make_split("minibench", 1, 42, ids[::-1]) == make_split("minibench", 1, 42)


@pytest.mark.parametrize("seed", [42, 43, 44])
@pytest.mark.parametrize(
    "source,level", [(source, level) for source in LEVELS for level in LEVELS[source]]
)
def test_committed_splits_follow_the_rule(source, level, seed):
    assert load_split(SPLITS / f"{source}_l{level}_seed{seed}.json") == make_split(
        source, level, seed
    )


def test_an_altered_split_is_refused(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(make_split("minibench", 1, 42).dump())
    data = json.loads(path.read_text())
    data["train"][0], data["eval"][0] = data["eval"][0], data["train"][0]
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="was altered"):
        load_split(path)
    path.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        load_split(path)
    with pytest.raises(UsageError, match="no split file"):
        load_split(tmp_path / "none.json")


def test_forward_is_read_from_the_source():
    task = Task("file", 0, 0, "t.py", CODE)
    assert task.forward_args == ("x", "k")
    assert task.forward_signature == "self, x: torch.Tensor, k: int=2"
    assert task.forward_body == "y = x * k\nreturn y"


def test_a_forward_on_one_line():
    task = Task("file", 0, 0, "t.py", "class Model:\n    def forward(self, x): return x\n")
    assert task.forward_body == "return x"


def test_a_file_is_a_task(tmp_path):
    path = tmp_path / "t.py"
    path.write_text(CODE)
    assert find_task(str(path)).key == str(path)
    path.write_text("class Model: pass")
    with pytest.raises(UsageError, match="lacks get_init_inputs, get_inputs"):
        find_task(str(path))
    path.write_text("def f(:")
    with pytest.raises(UsageError, match="not valid Python"):
        find_task(str(path))


@pytest.mark.parametrize(
    "name,words",
    [
        ("minibench:1/101", "no task 101"),
        ("minibench:9/1", "no level 9"),
        ("kernelbank:1/1", "unknown task source"),
        ("nothing.py", "unknown task"),
        ("kernelbench:1/1", "needs its task files"),
    ],
)
def test_an_unknown_task_is_one_sentence(name, words):
    with pytest.raises(UsageError, match=words) as error:
        find_task(name)
    assert "\n" not in str(error.value)


def test_minibench_by_name():
    assert find_task("minibench:2/17").key == "minibench:2/17"
    assert find_task("minibench:1/1", scale="gpu").code != find_task("minibench:1/1").code
    with pytest.raises(UsageError, match="unknown scale"):
        load_tasks("minibench", 1, "tpu")


def test_kernelbench_from_a_clone(tmp_path):
    folder = tmp_path / "KernelBench" / "level1"
    folder.mkdir(parents=True)
    for name in ("10_Ten", "2_Two"):
        (folder / f"{name}.py").write_text(CODE)
    for directory in (tmp_path, tmp_path / "KernelBench"):
        tasks = load_tasks("kernelbench", 1, directory=str(directory))
        assert [(task.id, task.name) for task in tasks] == [(2, "2_Two"), (10, "10_Ten")]
    assert tasks[0].key == "kernelbench:1/2"
    with pytest.raises(UsageError, match="no KernelBench level 2 under"):
        load_tasks("kernelbench", 2, directory=str(tmp_path))


def test_kernelbench_from_the_data_set(tmp_path):
    rows = [
        {"code": CODE, "level": 1, "name": name, "problem_id": number}
        for number, name in ((7, "7_Seven"), (3, "3_Three"))
    ]
    (tmp_path / "data").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "data" / "level_1-00000-of-00001.parquet")
    tasks = load_tasks("kernelbench", 1, directory=str(tmp_path))
    assert [(task.id, task.name) for task in tasks] == [(3, "3_Three"), (7, "7_Seven")]
