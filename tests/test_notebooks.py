"""The rules that every committed notebook keeps (CONTRIBUTING.md)."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from ttkit.parameters import Notebook, check_values, load_notebooks, union

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS][:2] == ["00_start_here", "01_train_base_policy"]


def test_it_is_a_valid_notebook_without_widget_state(notebook):
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata


def test_it_reads_like_a_chapter(notebook):
    assert 15 <= len(notebook.cells) <= 45
    assert notebook.cells[0].cell_type == "markdown"
    cells = [c for c in code_cells(notebook) if "parameters" not in c.metadata.get("tags", [])]
    lines = [line for cell in cells for line in cell.source.splitlines()]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 120
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25
    functions = [
        node
        for cell in code_cells(notebook)
        for node in ast.walk(ast.parse(cell.source.replace("%", "#")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert len(functions) <= 1


def test_it_names_its_question_and_what_to_see(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.search(r"^\*\*.*\?\*\*$", notebook.cells[0].source, flags=re.MULTILINE)
    for heading in ("What you should see", "Exercises"):
        assert heading in text, f"no section {heading!r}"
    for word in ("reads", "writes", "time"):
        assert f"| {word} |" in notebook.cells[0].source


def test_it_was_run_in_order_without_an_error(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]


def test_it_names_no_place_of_one_machine(path):
    text = path.read_text()
    assert not re.search(r"[\"' =(](/work|/home|/root|/tmp|/Users)/", text)
    assert path.stat().st_size < 500_000


def test_its_parameters_are_annotated_commented_and_the_demo_profile(path, notebook):
    tagged = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: [\w\[\] |]+ = .+  # .+", line), line
    demo = yaml.safe_load((ROOT / "notebooks/profiles/demo.yaml").read_text())
    for name, parameter in Notebook.load(path).parameters.items():
        if name != "run":
            assert demo[name] == parameter.default, f"{name}: the demo profile says {demo[name]}"


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_hold_known_parameters_of_the_right_type(profile):
    known = union(load_notebooks(ROOT / "notebooks"))
    check_values(known, yaml.safe_load(profile.read_text()), profile.stem)


def test_the_four_profiles_set_every_parameter():
    names = {p.stem: set(yaml.safe_load(p.read_text())) for p in PROFILES}
    assert set(names) == {"smoke", "demo", "lab", "paper"}
    assert names["smoke"] == names["demo"] == names["lab"] == names["paper"]


def test_notebooks_are_stored_with_stable_formatting(path):
    assert json.loads(path.read_text())["nbformat"] == 4
