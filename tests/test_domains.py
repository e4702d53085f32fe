"""What a parameter may be is refused by name before a run starts, and agrees with who uses it."""

from pathlib import Path

import pytest

from ttkit import domains, rewards, rollouts, tasks, train
from ttkit.advantages import OBJECTIVES
from ttkit.errors import UsageError
from ttkit.parameters import load_notebooks, resolve, union
from ttkit.policy import DTYPES
from ttkit.prompts import ACTIONS, STYLES
from ttkit.verify import PROTOCOLS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def known():
    return union(load_notebooks(ROOT / "notebooks"))


def test_the_choices_are_those_of_the_modules():
    found = {name: set(values) for name, values in domains.CHOICES.items()}
    assert found["source"] == set(tasks.SOURCES)
    assert found["scale"] == set(tasks.SCALES)
    assert found["level"] == found["other_level"] == {n for v in tasks.LEVELS.values() for n in v}
    assert found["dtype"] == set(DTYPES)
    assert found["prompt_style"] == set(STYLES) and found["action"] == set(ACTIONS)
    assert found["baseline"] == set(train.BASELINES)
    assert found["reward_transform"] == set(rewards.TRANSFORMS)
    assert found["protocol"] == found["train_protocol"] == set(PROTOCOLS)
    assert found["ttt_objective"] == set(OBJECTIVES)
    assert found["ttt_reward"] == set(rollouts.REWARDS)


def test_every_name_is_a_parameter(known):
    named = {*domains.CHOICES, *domains.AT_LEAST_1, *domains.NOT_BELOW_0, *domains.ABOVE_0}
    assert named | domains.AT_MOST_1 | domains.FOLDERS <= set(known)
    free = set(known) - named - domains.AT_MOST_1 - domains.FOLDERS
    assert free == {"run", "device", "ttt_isolated", "sdpo_peer"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k=-3", "k must be 1 or more, not -3"),
        ("top_k=[1,0]", "top_k must be 1 or more, not 0"),
        ("temperatures=[]", "temperatures must have one value at least, not []"),
        ("temperatures=[0.0]", "temperatures must be above 0, not 0.0"),
        ("ttt_lr=nan", "must be float, not nan"),
        ("ttt_lr=inf", "must be float, not inf"),
        ("expert_share=2", "expert_share must be between 0 and 1, not 2.0"),
        ("ttt_objective=foo", "ttt_objective must be one of global, group"),
        ("level=4", "level must be one of 1, 2, 3, not 4"),
        ("seed=-1", "seed must be 0 or more, not -1"),
        ("bootstrap=0", "bootstrap must be 1 or more, not 0"),
        ("judged_samples=0", "judged_samples must be 1 or more, not 0"),
        ("gate_std=nan", "must be float, not nan"),
    ],
)
def test_a_value_outside_its_domain_is_refused(known, text, said):
    with pytest.raises(UsageError) as caught:
        resolve(known, None, [text])
    assert str(caught.value).startswith("--set: ") and said in str(caught.value)


def test_every_profile_lies_in_the_domains(known):
    for profile in (ROOT / "notebooks/profiles").glob("*.yaml"):
        assert resolve(known, profile, [])


def test_what_a_run_needs_together(tmp_path):
    def check(*notebooks, **values):
        domains.check_together(values, notebooks, tmp_path)

    check("00_start_here", model=None, device="cpu")
    with pytest.raises(UsageError, match="model is nowhere, and there is no such folder"):
        check("01_train_base_policy", model="nowhere")
    (tmp_path / "here").mkdir()
    check("01_train_base_policy", model="here")
    values = {"temperatures": [1.0, 0.25], "ttt_temperature": 0.7}
    check("02_best_of_n", **values)
    with pytest.raises(UsageError, match="ttt_temperature is 0.7, and the samples"):
        check("03_test_time_training", **values)


def test_a_device_that_is_not_there():
    import torch

    domains.check_device("cpu")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        domains.check_device("gpu")
    with pytest.raises(UsageError, match="torch sees"):
        domains.check_device(f"cuda:{torch.cuda.device_count()}")
