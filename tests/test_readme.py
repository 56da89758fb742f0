"""The README's tables of measurements are those in assets/, to the letter; its pictures and files are there; its commands
have the options that they use, and those that are marked as quick run."""

import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import eval as evaluation
import prm
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DRIFT = json.loads((ROOT / "assets/drift/main.json").read_text())
FOUND = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "assets").glob("*.json"))}


@pytest.mark.parametrize("name", FOUND)
def test_the_tables_in_the_README_are_rendered_from_the_values_of_each_run_in_assets(name):
    for table in FOUND[name]["tables"]:
        rendered = evaluation.render(table)
        assert rendered in README, f"\n{rendered}\nis not in README.md, by assets/{name}.json"
    for text in FOUND[name].get("texts", []):
        assert all(f"    {line}".rstrip() in README for line in text.splitlines()), text


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "assets").rglob("*.json")))
def test_each_file_in_assets_says_its_runs_with_seed_alpha_and_commit_and_the_options(name):
    found = json.loads((ROOT / name).read_text())
    assert found["commit"] and found["runs"] and found["options_of_the_first"]["iterations"] > 0
    for run in found["runs"]:
        assert run.keys() == {"name", "seed", "prepare_seed", "alpha", "commit"} and run["commit"]


def test_the_drift_in_the_README_is_that_of_the_runs_in_assets():
    here, there = ({row[0]: row for row in table["tables"][0]["rows"]} for table in (FOUND["main"], DRIFT))
    text = " ".join(README.split())
    for reward in there.keys() - {"before"}:
        assert re.search(rf"{there[reward][4][0]:.1f}( %)? with `{reward}` \({here[reward][4][0]:.1f}", text), reward
    assert f"greedy accuracy of `prm` at {there['prm'][3][0]:.1f} % ({here['prm'][3][0]:.1f})" in text


def test_every_claim_has_its_command_in_the_README():
    assert set(FOUND) == set(evaluation.CLAIMS)
    for name in evaluation.CLAIMS:
        assert f"--claim {name}" in README


def test_the_pictures_and_files_that_the_README_shows_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).is_file() for link in links), links
    pictures = {path.name for path in (ROOT / "assets").glob("*.png")}
    assert pictures == {Path(link).name for link in links if link.endswith(".png")}  # and none that nobody sees


# ------------------------------------------------------------------------------------------------ commands


def commands(text: str) -> list[list[str]]:
    """The words of each command in the indented blocks, without comments; of `a && b` both, of torchrun what it starts."""
    lines = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if re.match(r"(python|torchrun|srun|pip) ", line):
            for call in line.split("&&"):
                words = shlex.split(call, comments=True)
                if words[0] in ("torchrun", "srun"):
                    words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
                found.append(words)
    return found


COMMANDS = [words for words in commands(README) if words[:2] not in (["pip", "install"], ["python", "-m"])]


def test_the_README_has_commands_of_every_script():
    assert {words[1] for words in COMMANDS} == {"train.py", "eval.py", "prm.py", "grader.py", "tests/exercises.py"}
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_README_has_the_options_that_it_uses(words, monkeypatch, capsys):
    _, script, *argv = words
    if argv == ["--help"] or script in ("grader.py", "tests/exercises.py"):
        with pytest.raises(SystemExit) as end:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            importlib.import_module(Path(script).stem).main()
        assert end.value.code == 0
    elif argv[0] == "show":
        assert evaluation.parse_show(argv[1:]).run
    else:
        {"train.py": train.parse, "eval.py": evaluation.parse, "prm.py": prm.parse}[script](argv)


def test_the_commands_that_are_marked_as_quick_run_as_they_stand(monkeypatch, capsys):
    quick = [words for block in re.findall(r"<!-- quick.*?-->\n\n((?:    .*\n)+)", README) for words in commands(block)]
    assert len(quick) >= 6
    for _, script, *argv in quick:
        monkeypatch.setattr(sys, "argv", [script, *argv])
        try:
            importlib.import_module(Path(script).stem).main()
        except SystemExit as end:
            assert end.code == 0, script
        said = capsys.readouterr().out
        assert said.strip()
        if script == "tests/exercises.py" or "--plan" in argv:  # what they print is in the README
            lines = said.splitlines()[0 if script == "tests/exercises.py" else 1 :]
            assert all(f"    {line.rstrip()}\n" in README for line in lines), said


# ------------------------------------------------------------------------------------------------ files


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_file_map_says_how_many_lines_a_file_has(script):
    lines = (ROOT / script).read_text().count("\n")
    assert re.search(rf"\| `{script}` \| {lines:,} \| ", README), f"{script} has {lines:,} lines"


@pytest.mark.parametrize("script", SCRIPTS)
def test_within_a_part_of_a_file_callees_stand_above_their_callers(script):
    """But for those that call each other."""
    text = (ROOT / script).read_text()
    parts = [text[: match.start()].count("\n") for match in re.finditer(r"^# -{20,}", text, re.M)]
    part = lambda node: sum(line < node.lineno for line in parts)
    nodes = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    named = lambda node: {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}
    calls = {name: named(node) & nodes.keys() - {name} for name, node in nodes.items()}

    def reaches(name: str, goal: str, seen: set) -> bool:
        seen.add(name)
        return goal in calls[name] or any(reaches(other, goal, seen) for other in calls[name] - seen)

    for name, node in nodes.items():
        for callee in calls[name]:
            if nodes[callee].lineno > node.lineno and part(nodes[callee]) == part(node):
                assert reaches(callee, name, set()), f"{callee} stands below {name}, which calls it"


def test_imports_go_one_way():
    order = ["grader", "data", "model", "rewards", "rollout", "ppo", "prm", "eval", "train"]
    assert sorted(f"{name}.py" for name in order) == SCRIPTS
    for name in order:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in set(modules) & set(order):
                assert order.index(module) < order.index(name), f"{name}.py imports {module}"
