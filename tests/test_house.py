"""What should never drift: size of scripts and README, who imports whom, what README names.

When a figure is met: do without something, do not pack. First to go: the contact sheet and
check() in data.py, deit.py's table of published models.
"""
import ast
import importlib
import re
import sys
from dataclasses import fields

import train
from conftest import ROOT, run_main


def read(script):
    """(syntax tree, {number: line of code}), both without docstrings and comments."""
    source = (ROOT / f"{script}.py").read_text()
    tree, lines = ast.parse(source), source.splitlines()
    for node in ast.walk(tree):
        is_definition = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if is_definition and ast.get_docstring(node):
            docstring = node.body.pop(0)
            for number in range(docstring.lineno, docstring.end_lineno + 1):
                lines[number - 1] = ""

    return tree, {number: line for number, line in enumerate(lines, 1)
                  if line.strip() and not line.strip().startswith("#")}


SCRIPTS = ("deit", "distill", "data", "teacher", "evaluate", "train")
TREE = {script: read(script)[0] for script in SCRIPTS}
CODE = {script: read(script)[1] for script in SCRIPTS}
SOURCE = {script: "\n".join(code.values()) for script, code in CODE.items()}
NODES = {script: sum(hasattr(node, "lineno") for node in ast.walk(tree))
         for script, tree in TREE.items()}
README = (ROOT / "README.md").read_text()


# ---------------------------------------------------------------------------------------
# Size and density


def test_the_six_scripts_together_have_at_most_10200_syntax_nodes():
    assert sum(NODES.values()) <= 10200


def test_the_scripts_are_not_packed():
    for script, nodes in NODES.items():
        densest = 9.0 if script == "data" else 7.5           # data.py has RandAugment's table
        assert nodes / len(CODE[script]) <= densest, script


def test_lines_are_short():
    for script, code in CODE.items():
        lengths = [len(line) for line in code.values() if ": Published(" not in line]
        assert max(lengths) <= 100, script
        assert sum(length > 88 for length in lengths) <= len(lengths) / 10, script


def test_a_function_pauses_at_least_every_dozen_lines():
    for script, tree in TREE.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                numbers = range(function.lineno, function.end_lineno + 1)
                code = "".join("x" if number in CODE[script] else " " for number in numbers)
                assert 13 * "x" not in code, f"{script}.{function.name}"


TRICKS = {                               # a node or operator, and what it should not be given
    "a loop over `xs if flag else ()`": ((ast.For, ast.comprehension), ast.IfExp),
    "something times a bool": (ast.Mult, (ast.Compare, ast.JoinedStr)),
    "a condition inside an f-string": (ast.FormattedValue, (ast.IfExp, ast.BoolOp)),
    "a walrus in a condition": (ast.BoolOp, ast.NamedExpr),
    "a lambda in a conditional": (ast.IfExp, ast.Lambda),
}


def test_the_scripts_have_no_tricks():
    for script, tree in TREE.items():
        assert not re.search(r"\* is_|\bis_\w+ \*", SOURCE[script]), "a flag as a number"
        for trick, (kind, given) in TRICKS.items():
            for node in ast.walk(tree):
                if isinstance(node, kind) or isinstance(getattr(node, "op", None), kind):
                    for child in ast.iter_child_nodes(node):
                        assert not isinstance(child, given), f"{trick}: {ast.unparse(node)}"


# ---------------------------------------------------------------------------------------
# Imports


def imports(script):
    assert not re.search(r"^ *import .*,", SOURCE[script], re.MULTILINE), "one module a line"
    return set(re.findall(r"^ *(?:import|from) (\w+)", SOURCE[script], re.MULTILINE))


def test_each_script_imports_the_others_that_it_builds_on_and_no_more():
    graph = {script: imports(script) & set(SCRIPTS) for script in SCRIPTS}
    assert graph == {"deit": set(), "distill": set(), "data": set(), "teacher": {"deit"},
                     "evaluate": {"deit", "data", "teacher"},
                     "train": {"deit", "distill", "data", "teacher", "evaluate"}}


def test_nothing_is_imported_beyond_the_five_packages_pillow_and_safetensors():
    required = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert set(required) == {"torch", "torchvision", "numpy", "tqdm", "tensorboard"}
    imported = set().union(*map(imports, SCRIPTS)) - set(sys.stdlib_module_names)
    # torchvision brings Pillow; safetensors only where a file asks for it
    assert imported - set(SCRIPTS) == set(required) - {"tensorboard"} | {"PIL", "safetensors"}


def test_the_scripts_ask_the_platform_for_nothing_that_only_linux_has():
    for source in SOURCE.values():
        assert not re.search(r"fcntl|prctl|ctypes|/proc|/sys|/dev/shm|SIGKILL", source)
    assert SOURCE["data"].count("sched_getaffinity") == 2    # once asked for, then used


def test_the_top_level_holds_the_six_scripts_and_nothing_else_that_runs():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


def test_importing_a_script_only_defines_things():
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
    for name, tree in TREE.items():
        definitions = list(tree.body)
        if name != "distill":                                # which is no command
            main = definitions.pop()
            assert ast.unparse(main) == "if __name__ == '__main__':\n    main()"
        assert all(isinstance(node, kinds) for node in definitions)


def test_every_file_is_read_without_unpickling():
    unsafe = (r"\bpickle\b|load_state_dict_from_url|hub\.load|"
              r"torch\.load\((?!.*weights_only=True|'{}')")
    for source in SOURCE.values():                           # '{}' is in advice that is printed
        assert not re.search(unsafe, source)


# ---------------------------------------------------------------------------------------
# The recipe and README


def test_every_field_of_the_recipe_is_a_flag_with_a_help_text_and_is_read(capsys):
    run_main(train, "--help")
    printed = capsys.readouterr().out
    for item in fields(train.Recipe):
        assert train.option(item.name) in printed and item.metadata["help"]
        assert re.search(rf"\brecipe\.{item.name}\b", SOURCE["train"])


def test_every_preset_sets_fields_of_the_recipe_and_is_in_readme():
    names = {item.name for item in fields(train.Recipe)}
    for preset, values in train.PRESETS.items():
        assert set(values) <= names and f"--recipe {preset}" in README


def test_readme_has_at_most_130_lines_of_at_most_100_columns():
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 100


def test_the_flags_and_files_that_readme_names_exist(capsys):
    for script in ("data", "teacher", "evaluate", "train"):
        run_main(importlib.import_module(script), "--help")
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    torchruns = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id",
                 "--max-restarts"}
    slurms = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--requeue"}
    dockers = {"--ipc"}
    assert set(re.findall(r"--[a-z][a-z_-]+", README)) <= known | torchruns | slurms | dockers

    files = set(re.findall(r"`((?:tests/)?[a-z_0-9]+\.(?:py|txt|md|csv))`", README))
    assert files and all((ROOT / file).exists() for file in files)
