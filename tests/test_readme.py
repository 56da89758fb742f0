"""The README says what is so: its table is that of assets/, its commands have the options that they use, its names are
the code's. And the house is kept: each file within its budget, no line too long, imports one way."""

import ast
import importlib
import json
import re
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from claims import render

import eval as evaluation
import prm
import train
from data import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "assets/CLAIMS.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_README_has_at_most_350_lines():
    assert README.count("\n") <= 350


# ------------------------------------------------------------------------------------------------ what it says


def test_the_main_table_is_rendered_from_the_values_of_each_run_in_assets():
    [table] = re.findall(r"<!-- main table: .*? -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert table == render(json.loads((ROOT / "assets/main.json").read_text())["tables"][0])


@pytest.mark.parametrize("number", sorted(set(re.findall(r"-?\d+\.\d+(?: ± \d+\.\d+)?", section("What was found")))))
def test_a_number_of_what_was_found_stands_in_the_page_of_all_claims(number):
    """With its interval, if it has one; but for alphas, that page alone is written by a program."""
    assert re.search(rf"(?<![\d.-]){re.escape(number.lstrip('-'))}(?![\d.])", PAGE.replace("-", " "))


def test_the_pictures_and_files_that_the_README_shows_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).is_file() for link in links), links
    shown = {Path(link).name for link in links} | set(re.findall(r"\]\((\w+\.png)\)", PAGE))
    assert {path.name for path in (ROOT / "assets").glob("*.png")} <= shown  # none that nobody sees


def test_each_name_in_the_steps_of_the_algorithm_is_one_of_the_code():
    [*_, steps] = section("The algorithm").split("\n\n1. ")
    defined = set()
    for path in ROOT.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names = set(re.findall(r"`(\w+)`", steps))
    assert len(names) > 15 and names <= defined, names - defined


def test_each_metric_of_the_README_is_written_by_the_code():
    code = "".join((ROOT / f"{name}.py").read_text() for name in ("train", "ppo", "eval", "grader"))
    names = re.findall(r"`(\w+)", "".join(re.findall(r"^\|([^|]*)\|", section("What a run writes"), re.M)))
    assert len(names) > 30
    for name in names:
        bare = re.sub("^(seconds|greedy|sampled|grad_norm)?_", "", name)
        assert any(f'"{x}"' in code for x in (name, bare, name.replace("_", " "))), name


# ------------------------------------------------------------------------------------------------ commands


def commands(text: str) -> list[tuple[int, list[str]]]:
    """Each command in the indented blocks: its number of processes, and its words without comments; of `a && b` both,
    of torchrun what it starts."""
    found = []
    for line in re.findall(r"^    ((?:python|torchrun|pip) .*)", text, re.M):
        for call in line.split("&&"):
            words, processes = shlex.split(call, comments=True), 1
            if words[0] == "torchrun":
                processes = int(words[words.index("--nproc_per_node") + 1])
                words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
            found.append((processes, words))
    return found


COMMANDS = [(n, words) for n, words in commands(README) if words[0] == "python" and words[1] != "-m"]
FITS = re.findall(r"^\| ([\d.]+B) \| (\d+) \| `(--.*?)` \|", README, re.M)
for size, gpus, flags in FITS:
    call = f"python train.py --preset qwen2.5-math-{size.lower()}-instruct --reward clip-delta {flags}"
    COMMANDS.append((int(gpus), shlex.split(call)))


def test_the_README_has_commands_of_every_script():
    scripts = {words[1] for _, words in COMMANDS}
    assert scripts == {"train.py", "eval.py", "prm.py", "grader.py", "tests/exercises.py", "tests/claims.py"}
    assert len(COMMANDS) > 20 and len(FITS) > 1


@pytest.mark.parametrize("processes, words", COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_a_command_of_the_README_has_the_options_that_it_uses(processes, words, monkeypatch, tmp_path, capsys):
    _, script, *argv = words
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for name in ("NAME", "RUN"):  # runs that are there
        Path("runs", name, "model").mkdir(parents=True)
        Path("runs", name, "config.json").write_text(json.dumps(asdict(train.TrainOptions(data="toy"))))
    if script.startswith("tests/") or script == "grader.py" or argv == ["--help"]:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(Path(script).stem).main()
        assert end.value.code == 0
        assert all(word in capsys.readouterr().out for word in argv if word.startswith("--"))
    elif argv[0] == "show":
        with pytest.raises(UserError, match="not the folder of a run"):
            evaluation.show(argv[1:])
    else:
        if "--offload-frozen" in argv:  # for a GPU
            monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
        {"train.py": train.parse, "eval.py": evaluation.parse, "prm.py": prm.parse}[script](argv)


def test_an_option_that_the_text_names_is_one_of_a_script():
    kinds = (train.TrainOptions, evaluation.EvalOptions, prm.ScriptOptions)
    known = {f"--{f.name.replace('_', '-')}" for kind in kinds for f in fields(kind)}
    others = {"--log", "--html", "--make", "--nnodes", "--max-restarts"}  # an alias, other parsers', torchrun's
    named = set(re.findall(r"--[a-z][a-z-]+", "".join(re.findall(r"`[^`\n]*`", README))))
    assert len(named) > 15 and named <= known | others, named - known - others


def test_the_commands_that_are_marked_as_quick_run_as_they_stand(monkeypatch, capsys):
    blocks = re.findall(r"<!-- quick.*?-->\n\n((?:    .*\n)+)", README)
    quick = [words for block in blocks for _, words in commands(block)]
    assert len(quick) >= 3
    for _, script, *argv in quick:
        monkeypatch.setattr(sys, "argv", [script, *argv])
        try:
            importlib.import_module(Path(script).stem).main()
        except SystemExit as end:
            assert end.code == 0, script
        assert capsys.readouterr().out.strip()


# ------------------------------------------------------------------------------------------------ the house

BUDGETS = {
    "rewards": 140, "train": 740, "ppo": 240, "rollout": 380, "prm": 700, "model": 600, "data": 465, "eval": 520,
    "grader": 1900,
}
ORDER = ("grader", "data", "model", "rewards", "rollout", "ppo", "prm", "eval", "train")  # each imports those before it


def lines(name: str) -> list[str]:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_is_within_the_budget_that_the_file_map_gives_it(name):
    assert f"| `{name}.py` | {BUDGETS[name]:,} | " in section("Files")
    assert len(lines(name)) <= BUDGETS[name]


def test_all_files_but_the_grader_have_at_most_3770_lines():
    assert sorted(ORDER) == sorted(BUDGETS) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert sum(len(lines(name)) for name in ORDER if name != "grader") <= 3770


# the grader and its tests are redrawn next
DRAWN = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")] if "grader" not in path.name]


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.name)
def test_no_line_is_too_long_and_none_is_kept_from_the_formatter(path):
    numbered = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert [number for number, line in numbered if len(line) > 120 or line.endswith("# fmt" + ": skip")] == []


def imported(name: str) -> set[str]:
    """The modules that a file imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse("\n".join(lines(name)))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    assert imported(name) & {*ORDER} <= {*ORDER[: ORDER.index(name)]}


@pytest.mark.parametrize(
    "name, needs", {"rewards": {"torch"}, "ppo": {"torch"}, "rollout": {"torch", "tqdm", "model"}}.items()
)
def test_what_is_to_be_lifted_out_needs_little(name, needs):
    assert imported(name) - {*sys.stdlib_module_names} == needs
