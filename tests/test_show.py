"""`eval.py show`: answers of a run, step by step, in the terminal and as a page."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import eval as evaluation
from data import run_script, split_steps

HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><!-- <script>\n\x1b[2Jb"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def answer(iteration: int, question: str, response: str, scores, verdict: str = "match", **more) -> dict:
    ends = split_steps(response, "\n", verdict != "truncated")
    return {
        "question": question, "response": response, "gold": "####38", "verdict": verdict, "correct": verdict == "match",
        "truncated": verdict == "truncated", "steps": len(ends), "char_ends": ends, "iteration": iteration,
        "scores": scores, "refined": scores, "outcome": None, **more,
    }


RIGHT = answer(1, "41b+5c*3=", "b41+5=46\nb41+5=46\nc46*3=38\n####38", [0.9, 0.8, 0.7, 0.6])


def make_run(folder, answers: list[dict], reward: str = "prm"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"reward": reward, "alpha": 0.5}))
    means = [{"iteration": i, "success": 0.5, "steps": 4.0 + i, "repeats": 1.0, "learned_reward": 3.0} for i in (1, 2)]
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines([{"iteration": 0, "greedy_accuracy": 0.5}, *means]))
    (folder / "samples.jsonl").write_text(lines(answers) + '{"iteration": 3, "que')  # a run that writes just now
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", [RIGHT, answer(2, "What <b>is</b>?", HOSTILE, [0.5], "truncated")])


def show(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", "show", *map(str, argv)])
    run_script(evaluation.main)
    return capsys.readouterr().out


def test_the_terminal_shows_each_step_of_the_first_and_the_last_iteration(run, monkeypatch, capsys):
    assert show(monkeypatch, capsys, run).splitlines() == [
        "run: reward prm, alpha 0.5",
        "return: alpha * (r_k + ... + r_K, or r_outcome) + Correct, without KL penalty and value of cut-off answers",
        "",
        "iteration 1 of 2: success 0.50, steps 5.00, repeats 1.00, learned reward 3.00",
        "",
        "41b+5c*3=   gold 38, match",
        "   k   score       r  return  oracle  step",
        "   1    0.90    0.90    2.50   right  b41+5=46",
        "   2    0.80    0.80    2.05   right  b41+5=46   (repeats 1)",
        "   3    0.70    0.70    1.65   right  c46*3=38",
        "   4    0.60    0.60    1.30   right  ####38",
        "",
        "iteration 2 of 2: success 0.50, steps 6.00, repeats 1.00, learned reward 3.00",
        "",
        "What <b>is</b>?   gold 38, truncated",
        "   k   score       r  return  step",  # no embedded world, no oracle
        "   1    0.50    0.50    0.25  " + HOSTILE.partition("\n")[0],
        " " * 30 + " [2Jb   (cut off: no step)",  # whose escape sequence does not reach the terminal
    ]
    assert "iteration 1 of" not in show(monkeypatch, capsys, run, "--iteration", 2)


def test_steps_of_other_rewards():
    values = lambda row, key: [step[key] for step in evaluation.explain(row, 0.5)["steps"]]
    clip = RIGHT | {"refined": [0.0, 0.0, -0.25, -0.5], "correct": False, "verdict": "mismatch"}
    assert values(clip, "pays") == values(clip, "return") == [-0.375, -0.375, -0.375, -0.25]
    success = RIGHT | {"scores": None, "refined": None}
    for key in ("score", "r", "pays", "return"):
        assert values(success, key) == [None] * 4
    assert values(success, "oracle") == [True] * 4 and values(success, "repeats") == [None, 1, None, None]
    assert values(success | {"outcome": 0.5}, "return") == [1.25] * 4  # said once, at the end
    cut = success | {"outcome": 0.5, "truncated": True, "correct": False}
    assert values(cut, "return") == [0] * 4
    wrong = answer(1, "41b+5c*3=", "b41+5=47\nc46*3=38\n####38", [0.5] * 3)
    assert values(wrong, "oracle") == [False] * 3  # a right line behind a wrong one
    assert values(wrong | {"char_ends": [8, 18, 24]}, "oracle") == [None, False, False]  # cut where no line ends
    assert evaluation.explain(answer(1, "41b+5=", "", [], "truncated"), 0.5)["steps"] == []


@pytest.mark.parametrize(
    "missing, argv, message",
    [
        ("metrics.jsonl", "", "not the folder of a run (its metrics.jsonl is missing"),
        ("samples.jsonl", "", "has no answers yet"),
        ("config.json", "", "config.json"),
        ("", "--iteration 3", "has no answers of iteration 3, but of 1 to 2"),
        ("", "--iteration 0", "has no answers of iteration 0"),
        ("", "--html no/such/folder.html", "No such file"),
        ("", "--htm x", "unrecognized arguments: --htm x"),
        ("", "--model x", "unrecognized arguments: --model x"),
    ],
)
def test_a_mistake_gets_one_sentence(missing, argv, message, run, monkeypatch, capsys):
    if missing:
        (run / missing).unlink()
    with pytest.raises(SystemExit) as error:
        show(monkeypatch, capsys, run, *argv.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_run_without_answers_is_told(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        show(monkeypatch, capsys, make_run(tmp_path / "young", []))
    assert "has no answers yet" in capsys.readouterr().err


def tags(page: str) -> list[str]:
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(page)
    return found


def page(run, monkeypatch, capsys, *argv):
    file = run.parent / f"{run.name}.html"
    assert show(monkeypatch, capsys, run, "--html", file, *argv) == f"written: {file}\n"
    return file


def test_the_page_needs_no_network_and_holds_a_models_text_as_data(run, tmp_path, monkeypatch, capsys):
    hostile = page(run, monkeypatch, capsys).read_text()
    tame = page(make_run(tmp_path / "tame", [RIGHT]), monkeypatch, capsys).read_text()
    assert tags(hostile) == tags(tame) and "img" not in tags(tame) and tags(tame).count("script") == 2
    assert not re.search(r"https?:|\s(src|href)=|url\(|@import|fetch\(", tame)
    assert "default-src 'none'" in tame
    text = re.search(r'id="run">(.*)</script>', hostile)[1]
    assert "<" not in text  # a browser needs no </script> to lose its way: <!-- before <script> does as well
    data = json.loads(text)
    assert data["iterations"][1]["answers"][0]["steps"][0]["text"] == HOSTILE.partition("\n")[0]
    assert data == {**evaluation.read_show(str(run)), "start": "#iteration=1"}
    assert all(f'["{key}", "' in tame for key in ("success", "steps", "repeats", "learned_reward"))  # what it draws


@pytest.mark.skipif(not BROWSER, reason="no chromium, chromium-browser or google-chrome on PATH to open the page in")
def test_a_browser_shows_the_iteration_that_the_slider_is_at(run, tmp_path, monkeypatch, capsys):
    file = page(run, monkeypatch, capsys, "--iteration", 2)

    def dom(url: str) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'dir'}"]
        found = subprocess.run([BROWSER, *options, url], capture_output=True, text=True, timeout=120, check=True).stdout
        found = re.sub(r"<script.*?</script>", "", found, flags=re.S)
        assert found.count("<article>") == 1 and found.count("<svg") == 3 and "<title>run: reward prm" in found
        return found

    first = dom(f"{file.as_uri()}#iteration=1")
    cells = lambda found: re.findall(r"<td[^>]*>([^<]+)</td>", found)
    assert "iteration 1 of 2" in first and first.count('class="again"') == 1
    assert cells(first)[:6] == ["1", "b41+5=46", "✓", "0.90", "0.90", "2.50"]
    assert cells(first)[6:12] == ["2", "b41+5=46", "✓ repeats 1", "0.80", "0.80", "2.05"]
    left, width = re.search(r'class="pays" style="left: ([\d.]+)%; width: ([\d.]+)%', first).groups()
    assert (float(left), float(width)) == pytest.approx((0, 60))  # 1.5 of 2.5, the greatest return of the run
    second = dom(file.as_uri())
    assert "iteration 2 of 2" in second and cells(second)[2:] == ["0.50", "0.50", "0.25"]
    assert "&lt;/script&gt;&lt;img src=x onerror=" in second and "<img" not in second and "(cut off: no step)" in second

    # what a hand does to the slider
    moved = "$('slider').value = 0; $('slider').dispatchEvent(new Event('input'))"
    file.write_text(file.read_text().replace("</html>", f'<script nonce="show">{moved}</script></html>'))
    assert cells(dom(file.as_uri())) == cells(first)
