"""Clusters: what counts as the same program, what does not, and the score that follows."""

import numpy as np
import pandas as pd
import pytest

from ttkit import clusters, select
from ttkit.errors import UsageError

NAN = float("nan")
SAME = [
    ("return x + 1", "return x+1  # plus one"),
    ("y = x * 2\nreturn y", "return x * 2"),
    ("x = x * 2\nreturn x", "y = x * 2\nreturn y"),
    ("x = torch.exp(x)\nx = x / a\nreturn x", "b = torch.exp(x)\nreturn b / a"),
    ("a = b = x + 1\nreturn a * b", "y = x + 1\nreturn y * y"),
    ("n = len(x)\nreturn x / n", "return x / len(x)"),
    ("x.mul_(2)\nreturn x", "x.mul_(2)\ny = x\nreturn y"),
    ("return (x\n  .sum(dim=1))", "return x.sum(dim=1)"),
]
DIFFERENT = [
    ("return x + 1", "return x + 2"),
    ("return x - a", "return a - x"),
    ("return x + a", "return a + x"),
    ("return x.sum(dim=1)", "return x.sum(1)"),
    ("y = x * 2\nreturn x", "y = x * 2\nreturn y"),
    ("x = x + 1\nx = x * 2\nreturn x", "x = x * 2\nx = x + 1\nreturn x"),
    ("x.mul_(2)\nreturn x", "return x"),
    ("x.mul_(2)\nx.add_(1)\nreturn x", "x.add_(1)\nx.mul_(2)\nreturn x"),
    ("y = x.clone()\nx.mul_(2)\nreturn y", "x.mul_(2)\ny = x.clone()\nreturn y"),
    ("x += 1\nreturn x", "x -= 1\nreturn x"),
    ("for i in range(2):\n    x = x + 1\nreturn x", "for i in range(3):\n    x = x + 1\nreturn x"),
    ("if a > 0:\n    return x\nreturn a", "if a > 1:\n    return x\nreturn a"),
    ("return [i for i in x]", "i = 2\nreturn [j + i for j in x]"),
    ("y = x\nreturn map(lambda v: v + y, x)", "y = a\nreturn map(lambda v: v + y, x)"),
    ("return x +", "return x -"),
    ("x + 1", "x + 2"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_layout_and_cutting_do_not_count(one, other):
    assert clusters.structure(one) == clusters.structure(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_is_computed_counts(one, other):
    assert clusters.structure(one) != clusters.structure(other)


def test_deep_code_is_hashed_without_growing():
    code = "\n".join(["x = x * x"] * 200) + "\nreturn x"
    assert clusters.structure(code) != clusters.structure("x = x * x\n" + code)


def table(codes, speedups, task="t"):
    return pd.DataFrame(
        {
            "task": task,
            "index": range(len(codes)),
            "code": codes,
            "code_sha256": codes,
            "correct": [s > 0 for s in speedups],
            "speedup": [s or NAN for s in speedups],
            "speedup_lo": [s or NAN for s in speedups],
        }
    )


def test_the_score_is_the_share_of_the_tasks_samples_in_the_cluster():
    a = table(["return x+1", "y = x+1\nreturn y", "return x*2", "return x*3"], [1, 1, 2, 0])
    b = table(["return x+1"], [1], task="u")
    found = clusters.cluster(pd.concat([a, b], ignore_index=True))
    np.testing.assert_allclose(found["cluster_nll"], np.log([2, 2, 4, 4, 1]))
    assert found["cluster"].nunique() == 3
    assert found["cluster"][0] == found["cluster"][1] == found["cluster"][4]


def test_as_a_key_it_selects_the_majority_and_the_rarest():
    samples = table(["return x+1", "y = x+1\nreturn y", "return x*2"], [1.0, 1.0, 2.0])
    picks = select.select(clusters.cluster(samples), [1], ["cluster_nll"]).set_index("strategy")
    assert picks.loc["confidence", "speedup"] == 1.0
    assert picks.loc["surprisal", "speedup"] == 2.0


def test_it_needs_the_code():
    with pytest.raises(UsageError, match="lacks the columns code"):
        clusters.cluster(table(["return x"], [1.0]).drop(columns="code"))
