"""minibench: the built-in bank of PyTorch tasks, generated from a grammar of idioms.

Level 1 holds 100 single idioms, level 2 holds 100 chains of two or three. `grammar` defines what
an idiom is, the thematic files list them, `bank` fixes the tasks, `corpus` draws training text.
"""

from __future__ import annotations

from ttkit.minibench.bank import chain_of, forms, tasks
from ttkit.minibench.grammar import Form, Idiom, Link

__all__ = ["Form", "Idiom", "Link", "chain_of", "forms", "tasks"]
