"""A small project of two notebooks, for tests of what runs notebooks."""

import nbformat

DRAW = {
    "parameters": (
        'run: str = "runs/demo"  # where the results go\n'
        "rows: int = 12  # rows to draw\n"
        "pause: float = 0.0  # seconds of work a row"
    ),
    "cells": [
        'from ttkit.pipeline import begin\nstage = begin("01_draw", globals())',
        'import time\njournal = stage.journal("rows", key=("index",))',
        "for index in range(rows):\n"
        "    if (index,) not in journal:\n"
        "        time.sleep(pause)\n"
        '        journal.append([{"index": index, "value": index * index}])\n'
        '    stage.progress("rows", len(journal), rows)',
        'table = journal.frame()\nstage.write_table("rows", table)',
        'stage.done(summary=[f"{len(table)} rows were drawn"])',
    ],
}
SUM = {
    "parameters": (
        'run: str = "runs/demo"  # where the results go\npower: int = 1  # of the values'
    ),
    "cells": [
        'from ttkit.pipeline import begin\nstage = begin("02_sum", globals())',
        "import pandas as pd",
        'table = pd.read_parquet(stage.input("01_draw", "rows.parquet"))',
        "table = table.assign(value=table.value**power)",
        'stage.write_table("total", table)',
        'stage.done(summary=[f"the sum is {table.value.sum()}", "it was easy"])',
    ],
}


def write_notebook(path, parameters, cells):
    """Each cell a source text; the first is tagged as the `parameters` cell."""
    notebook = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(notebook, path)


def make_project(root):
    """`root` as a project folder with both notebooks and the profiles demo and slow."""
    (root / "notebooks" / "profiles").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    write_notebook(root / "notebooks" / "01_draw.ipynb", **DRAW)
    write_notebook(root / "notebooks" / "02_sum.ipynb", **SUM)
    (root / "notebooks" / "profiles" / "demo.yaml").write_text("rows: 12\npower: 1\n")
    (root / "notebooks" / "profiles" / "slow.yaml").write_text("rows: 40\npause: 0.05\n")
    return root
