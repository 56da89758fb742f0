"""The README's tables of measurements are those in assets/, to the letter; its pictures and files are there."""

import json
import re
from pathlib import Path

import pytest

import eval as evaluation

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOUND = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "assets").glob("*.json"))}


@pytest.mark.parametrize("name", FOUND)
def test_the_tables_in_the_README_are_rendered_from_the_values_of_each_run_in_assets(name):
    for table in FOUND[name]["tables"]:
        rendered = evaluation.render(table)
        assert rendered in README, f"\n{rendered}\nis not in README.md, by assets/{name}.json"
    for text in FOUND[name].get("texts", []):
        assert all(f"    {line}".rstrip() in README for line in text.splitlines()), text


@pytest.mark.parametrize("name", FOUND)
def test_each_file_in_assets_says_its_runs_with_seed_alpha_and_commit_and_the_options(name):
    found = FOUND[name]
    assert found["commit"] and found["runs"] and found["options_of_the_first"]["iterations"] > 0
    for run in found["runs"]:
        assert run.keys() == {"name", "seed", "prepare_seed", "alpha", "commit"} and run["commit"]


def test_every_claim_has_its_command_in_the_README():
    assert set(FOUND) <= set(evaluation.CLAIMS)
    for name in evaluation.CLAIMS:
        assert f"--claim {name}" in README


def test_the_pictures_and_files_that_the_README_shows_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).is_file() for link in links), links
    pictures = {path.name for path in (ROOT / "assets").glob("*.png")}
    assert pictures == {Path(link).name for link in links if link.endswith(".png")}  # and none that nobody sees
