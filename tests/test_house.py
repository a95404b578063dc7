"""What should never drift: who imports whom, what is needed, how long things are, what the README says there is."""
import ast
import contextlib
import importlib
import io
import re
import sys
from dataclasses import fields
from functools import lru_cache

import pytest

import train
from conftest import ROOT, run_main, run_script

LINES = {"deit": 400, "distill": 88, "data": 620, "teacher": 195, "evaluate": 357, "train": 720}     # at most, of each
SCRIPTS = tuple(LINES)
SOURCE = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
TREE = {name: ast.parse(source) for name, source in SOURCE.items()}
README = (ROOT / "README.md").read_text()


@lru_cache
def help_of(script):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_main(importlib.import_module(script), "--help") == 0
    return printed.getvalue()


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_each_script_imports_the_others_that_it_builds_on_and_no_more():
    (main,) = [node for node in TREE["data"].body if getattr(node, "name", "") == "main"]
    assert set(imports(main)) == {"train"}                   # the contact sheet of a recipe; no module imports the loop
    graph = {name: set(imports(tree)) & set(SCRIPTS) for name, tree in TREE.items()}
    graph["data"].discard("train")
    assert graph == {"deit": set(), "distill": set(), "data": set(), "teacher": {"deit"},
                     "evaluate": {"deit", "data", "teacher"},
                     "train": {"deit", "distill", "data", "teacher", "evaluate"}}


def test_nothing_is_imported_beyond_the_five_packages_and_torchvisions_pillow():
    others = set().union(*map(imports, TREE.values())) - set(sys.stdlib_module_names) - set(SCRIPTS)
    required = set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert required == {"torch", "torchvision", "numpy", "tqdm", "tensorboard"}
    assert others == required - {"tensorboard"} | {"PIL", "safetensors"}    # safetensors only where a file asks for it


def test_the_top_level_holds_the_six_scripts_and_nothing_else_that_runs():
    assert {path.name for path in ROOT.iterdir() if path.suffix == ".py"} == {f"{name}.py" for name in SCRIPTS}


def test_every_field_of_the_recipe_is_read():
    read = {node.attr for node in ast.walk(TREE["train"]) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load) and isinstance(node.value, (ast.Name, ast.Attribute))
            and "recipe" in (node.value.id if isinstance(node.value, ast.Name) else node.value.attr)}
    assert {item.name for item in fields(train.Recipe)} <= read


def test_every_preset_sets_fields_of_the_recipe():
    names = {item.name for item in fields(train.Recipe)}
    assert all(set(values) <= names and source for values, source in train.PRESETS.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_no_longer_than_it_was_agreed_to_be(script):
    assert len(SOURCE[script].splitlines()) <= LINES[script]


def test_the_six_scripts_together_have_at_most_2400_lines():
    assert sum(len(source.splitlines()) for source in SOURCE.values()) <= 2400


def test_no_function_is_longer_than_50_lines():
    lengths = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1 for name, tree in TREE.items()
               for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_no_line_is_wider_than_110_columns_but_for_the_table_of_published_models():
    wide = [f"{name}: {line}" for name, source in SOURCE.items() for line in source.splitlines()
            if len(line) > 110 and not re.match(r' +"[a-z0-9-]+": Published\(', line)]
    assert wide == []


def test_every_file_is_read_without_unpickling():
    for source in SOURCE.values():
        loads = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
                 and ast.unparse(node.func) == "torch.load"]
        assert source.count("torch.load(") == len(loads)
        assert all("weights_only=True" in map(ast.unparse, node.keywords) for node in loads)
        assert not re.search(r"\bpickle\b|load_state_dict_from_url|hub\.load", source)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script):
    flags = [node for node in ast.walk(TREE[script]) if isinstance(node, ast.Call)
             and (getattr(node.func, "attr", "") == "add_argument" or getattr(node.func, "id", "") == "add")]
    assert all("help" in {keyword.arg for keyword in node.keywords} for node in flags)
    assert "-h, --help" in help_of(script)


def test_the_flags_and_files_that_the_readme_names_exist():
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(map(help_of, SCRIPTS))))
    known |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / "tests" / "kill_and_resume.py").read_text()
                            + (ROOT / "tests" / "benchmark.py").read_text()))
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max-restarts"}
    others |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal", "--requeue"}
    others |= {"--job-name", "--logdir"}                                  # torchrun's, Slurm's and TensorBoard's
    assert set(re.findall(r"--[a-z][a-z_-]+", README)) - others <= known
    files = set(re.findall(r"`((?:tests/)?[a-z_]+\.(?:py|txt|md))`", README))
    assert files and all((ROOT / file).exists() for file in files)


def test_the_readme_shows_every_preset():
    assert all(f"`{name}`" in README for name in train.PRESETS)


def test_the_benchmark_runs_and_compares_equal_models():
    printed = run_script("tests/benchmark.py", "--quick", "--rounds", 1, "--only", "models", "optimizer").stdout
    for row in ("inference, batch 8 .* timm", "forward and backward, batch 8 .* timm",
                "optimiser and EMA, .* the official way"):
        assert re.search(rf"^tiny: {row} +\d+\.\d\d ", printed, re.MULTILINE), printed
