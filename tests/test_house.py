"""What should never drift: size and density of the scripts, who imports whom, what the README says there is.

When a figure is met: do without something, do not pack. First to go: distill.py's worked example, then check() and the
contact sheet in data.py.
"""
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
from conftest import ROOT, run_main

SCRIPTS = ("deit", "distill", "data", "teacher", "evaluate", "train")
SOURCE = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
TREE = {name: ast.parse(source) for name, source in SOURCE.items()}
README = (ROOT / "README.md").read_text()
every_script = pytest.mark.parametrize("script", SCRIPTS)


# ---------------------------------------------------------------------------------------------------
# Size: syntax nodes, so that white space and comments are free


def docstrings(tree):
    """The statements that are docstrings."""
    for node in ast.walk(tree):
        has_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        if has_docstring:
            yield node.body[0]


def count_nodes(tree):
    """Nodes of the syntax tree that have a line number, docstrings left out."""
    left_out = {id(node) for docstring in docstrings(tree) for node in ast.walk(docstring)}
    return sum(hasattr(node, "lineno") and id(node) not in left_out for node in ast.walk(tree))


def code_lines(script):
    """{number: line} without blank lines, comments and docstrings."""
    in_docstring = set()
    for docstring in docstrings(TREE[script]):
        in_docstring.update(range(docstring.lineno, docstring.end_lineno + 1))
    return {number: line for number, line in enumerate(SOURCE[script].splitlines(), 1)
            if line.strip() and not line.strip().startswith("#") and number not in in_docstring}


def test_the_six_scripts_together_have_at_most_9400_syntax_nodes():
    assert sum(map(count_nodes, TREE.values())) <= 9400


@every_script
def test_a_script_is_not_packed(script):
    densest = 9.0 if script == "data" else 7.5                   # data.py has RandAugment's table
    assert count_nodes(TREE[script]) / len(code_lines(script)) <= densest


@every_script
def test_lines_are_short(script):
    lines = [line for line in code_lines(script).values() if not re.match(r' +"[a-z0-9-]+": Published\(', line)]
    assert [line for line in lines if len(line) > 100] == []
    assert sum(len(line) > 88 for line in lines) <= len(lines) / 10


@every_script
def test_a_function_pauses_at_least_every_dozen_lines(script):
    code = code_lines(script)
    for function in ast.walk(TREE[script]):
        if isinstance(function, ast.FunctionDef):
            run = 0
            for number in range(function.lineno, function.end_lineno + 1):
                run = run + 1 if number in code else 0
                assert run <= 12, f"{script}.{function.name}, line {number}"


def tricks(tree):
    """What makes a reader stop, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension) or isinstance(node, ast.For):
            if isinstance(node.iter, ast.IfExp):
                yield f"{node.iter.lineno}: a loop over `xs if flag else ()`"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side in (node.left, node.right):
                if isinstance(side, (ast.Compare, ast.JoinedStr)) or getattr(side, "id", "").startswith("is_"):
                    yield f"{node.lineno}: something times a bool"
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, (ast.IfExp, ast.BoolOp)):
            yield f"{node.lineno}: a condition inside an f-string"
        if isinstance(node, ast.BoolOp) and any(isinstance(value, ast.NamedExpr) for value in node.values):
            yield f"{node.lineno}: a walrus in a condition"
        if isinstance(node, ast.IfExp) and isinstance(node.body, ast.Lambda) | isinstance(node.orelse, ast.Lambda):
            yield f"{node.lineno}: a lambda in a conditional"


@every_script
def test_a_script_has_no_tricks(script):
    assert list(tricks(TREE[script])) == []


# ---------------------------------------------------------------------------------------------------
# Imports


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_each_script_imports_the_others_that_it_builds_on_and_no_more():
    graph = {name: set(imports(tree)) & set(SCRIPTS) for name, tree in TREE.items()}
    assert graph == {"deit": set(), "distill": set(), "data": set(), "teacher": {"deit"},
                     "evaluate": {"deit", "data", "teacher"},
                     "train": {"deit", "distill", "data", "teacher", "evaluate"}}


def test_nothing_is_imported_beyond_the_five_packages_and_torchvisions_pillow():
    others = set().union(*map(imports, TREE.values())) - set(sys.stdlib_module_names) - set(SCRIPTS)
    required = set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert required == {"torch", "torchvision", "numpy", "tqdm", "tensorboard"}
    assert others == required - {"tensorboard"} | {"PIL", "safetensors"}    # safetensors only where a file asks for it


def test_the_scripts_ask_the_platform_for_nothing_that_only_linux_has():
    for source in SOURCE.values():
        assert not re.search(r"fcntl|prctl|ctypes|/proc|/sys|/dev/shm|SIGKILL", source)
    assert SOURCE["data"].count("os.sched_getaffinity") == SOURCE["data"].count('hasattr(os, "sched_getaffinity")') == 1


def test_the_top_level_holds_the_six_scripts_and_nothing_else_that_runs():
    assert {path.name for path in ROOT.iterdir() if path.suffix == ".py"} == {f"{name}.py" for name in SCRIPTS}


@every_script
def test_importing_a_script_only_defines_things(script):
    """No statement at the top level but definitions, imports, constants and the call of main."""
    for node in TREE[script].body[1:]:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert is_main or isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign))


def test_every_file_is_read_without_unpickling():
    for name, source in SOURCE.items():
        loads = [node for node in ast.walk(TREE[name]) if isinstance(node, ast.Call)
                 and ast.unparse(node.func) == "torch.load"]
        assert source.count("torch.load(") == len(loads)
        assert all("weights_only=True" in map(ast.unparse, node.keywords) for node in loads)
        assert not re.search(r"\bpickle\b|load_state_dict_from_url|hub\.load", source)


# ---------------------------------------------------------------------------------------------------
# The recipe and the README


@lru_cache
def help_of(script):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_main(importlib.import_module(script), "--help") == 0
    return printed.getvalue()


def test_every_field_of_the_recipe_is_read():
    read = {node.attr for node in ast.walk(TREE["train"]) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load) and getattr(node.value, "id", "") == "recipe"}
    assert {item.name for item in fields(train.Recipe)} <= read


def test_every_field_of_the_recipe_is_a_flag_with_a_help_text():
    assert all(train.option(item.name) in help_of("train") and item.metadata["help"] for item in fields(train.Recipe))


def test_every_preset_sets_fields_of_the_recipe_and_is_in_the_readme():
    names = {item.name for item in fields(train.Recipe)}
    assert all(set(values) <= names for values in train.PRESETS.values())
    assert all(f"`{name}`" in README for name in train.PRESETS)


def test_the_flags_and_files_that_the_readme_names_exist():
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(map(help_of, ("data", "teacher", "evaluate", "train")))))
    known |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / "tests" / "kill_and_resume.py").read_text()
                            + (ROOT / "tests" / "benchmark.py").read_text()))
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max-restarts"}
    others |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--requeue"}    # Slurm's
    assert set(re.findall(r"--[a-z][a-z_-]+", README)) - others <= known
    files = set(re.findall(r"`((?:tests/)?[a-z_]+\.(?:py|txt|md|csv))`", README))
    assert files and all((ROOT / file).exists() for file in files)
