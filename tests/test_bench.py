"""bench.py measures the real programs, on any corpus, and says what it can't take in one line.

Protected here: that it runs, that all that is compared does the same work (it stops else), and
that its figures fit each other. How fast anything is, no test asserts.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def bench(*arguments):
    command = [sys.executable, str(ROOT / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def corpus(tmp_path, tiny_tokenizer):
    """Arguments that name a corpus of 40 documents."""
    rows = [json.dumps({"text": f"# {i}\ndef f():\n    return {i}\n" * 300}) for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    return [
        f"--tokenizer.path={tiny_tokenizer}",
        "--tokenizer.vocab_size=600",
        f'--data.sources=["{tmp_path}/corpus.jsonl"]',
        "--data.val_fraction=0.2",
    ]


def test_tokenizing_writes_rates_and_ratios(corpus, tmp_path):
    path = tmp_path / "figures.json"
    options = ["--repeats=1", "--workers=2", "--copies=2", f"--json={path}"]
    result = bench("tokenizing", *corpus, *options)
    assert result.returncode == 0, result.stderr
    assert "in 80 documents, 1 turns" in result.stdout
    figures = json.loads(path.read_text())
    median = {row["what"]: row["median"] for row in figures["rows"] if row["workers"] == 2}
    assert median["prepare / ceiling"] == pytest.approx(median["prepare"] / median["ceiling"])
    assert median["tokenizes / ceiling"] == pytest.approx(median["tokenizes"] / median["ceiling"])
    compared = figures["machine"]["datasets"] != "absent"
    assert ("prepare / datasets.map" in median) == compared
    assert ("not compared" in result.stdout) != compared


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name first what to measure: tokenizing; not ''"),
        (["tokenising"], "name first what to measure: tokenizing; not 'tokenising'"),
        (["tokenizing", "--workers=0"], "--workers: whole numbers above 0, such as 1,2, not '0'"),
        (["tokenizing", "--repeats=x"], "--repeats: "),
        (["tokenizing", "--repeats=2,3"], "--repeats: one number"),
        (["tokenizing", "--json"], "unknown option --json"),
        (["tokenizing", "--data.format=instruct"], "data.format = text"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, said):
    result = bench(*arguments)
    assert result.returncode == 1
    assert result.stdout.count("\n") <= 1  # the machine
    assert result.stderr.startswith("bench.py: error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
