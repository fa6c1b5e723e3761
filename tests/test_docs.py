"""What the documentation shows works: a changed model, an added format, a moved configuration."""

import gzip
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from training import ENVIRONMENT, copy_code

from config import build_config, read_toml

ROOT = Path(__file__).resolve().parent.parent


def block(page: str, kind: str) -> str:
    """The only fenced block of a kind in a page of docs/."""
    (found,) = re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return found


def test_the_configuration_moved_from_lightning_is_one(tmp_path):
    path = tmp_path / "moved.toml"
    path.write_text(block("from-lightning.md", "toml"))
    config = build_config(read_toml(path))
    assert (config.model.dim, config.train.epochs, config.train.patience) == (512, 10, 5)


def apply(page: str, code: Path) -> None:
    """Makes the change that a page shows, in at most 20 lines of code."""
    change = block(page, "diff")
    command = ["patch", "-p1", "--fuzz=0"]
    subprocess.run(command, cwd=code, input=change, text=True, check=True, stdout=subprocess.PIPE)
    assert len(re.findall(r"^\+(?!\+\+).", change, re.MULTILINE)) <= 20


@pytest.fixture(scope="module")
def with_xml(tmp_path_factory):
    """A copy of Rocket that reads XML."""
    code = copy_code(tmp_path_factory.mktemp("xml") / "rocket")
    apply("adding-a-format.md", code)
    return code


def python(code: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "ROCKET_ROOT": str(code)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)


READ = """
import hashlib, json, sys
from config import DataConfig, UserError
from corpus import readers

def peak():
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1])

def read(data, digest, skipped):
    for part in readers.plan(data):
        for document in readers.read(part, data, skipped):
            digest.update(document.text.encode() + b"\\0")
            yield len(document.text)

for keys in map(json.loads, sys.argv[1:]):
    data, digest, bad, base = DataConfig(**keys), hashlib.sha256(), [], peak()
    try:
        count, error = sum(1 for _ in read(data, digest, bad.append)), None
    except UserError as caught:
        count, error = None, str(caught)
    print(json.dumps([count, digest.hexdigest(), error, [b.message() for b in bad], peak() - base]))
"""


def read_xml(code: Path, *configurations: dict) -> list[list]:
    """How many documents, their digest, the error, the bad ones, and how much memory grew (kB)."""
    done = python(code, "-c", READ, *map(json.dumps, configurations))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def digest_of(texts: list[str]) -> str:
    return hashlib.sha256("".join(text + "\0" for text in texts).encode()).hexdigest()


def test_the_worked_format_gives_every_document_in_little_memory(with_xml, tmp_path):
    texts = [f"Café {i} < \U0001f999 & ]\n" + "word " * 200 for i in range(10_000)]
    pages = "".join(
        f"<page><title>{i}</title><revision><text>{escape(text[:5])}<b>{escape(text[5:-1])}</b>"
        f"<![CDATA[{text[-1]}]]></text></revision></page>\n"
        for i, text in enumerate(texts)
    )
    for attribute in ("", ' xmlns="http://www.mediawiki.org/xml/export-0.11/"'):
        path = tmp_path / "dump.xml"
        path.write_text(f"<dump{attribute}><wiki>{pages}</wiki></dump>")
        assert path.stat().st_size > 10e6
        ((count, digest, error, bad, growth),) = read_xml(with_xml, {"sources": [str(path)]})
        assert (count, digest, error, bad) == (len(texts), digest_of(texts), None, [])
        assert growth < 9_000


def test_the_worked_format_is_read_like_others(with_xml, tmp_path):
    """In folders and compressed, by each rule for documents; mistakes are named."""
    text = "<d>\n<text>a<text>b</text><?text c?></text><text/><body>d\n\ne</body></d>"
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.xml.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "cut.xml").write_text(text[:-10])
    path, cut = f"{tmp_path}/raw/a.xml.gz", f"{tmp_path}/cut.xml"
    body = {"sources": [path], "text_column": "body"}
    read = {
        '["ab", ""]': {"sources": [f"{tmp_path}/raw"]},
        '["d\\n\\ne"]': body,
        '["d", "e"]': {**body, "document": "blank_line"},
        '["d", "", "e"]': {**body, "document": "line"},
    }
    for (_, digest, error, _, _), texts in zip(
        read_xml(with_xml, *read.values()), map(json.loads, read), strict=True
    ):
        assert (digest, error) == (digest_of(texts), None)

    large = {"sources": [path], "max_document_bytes": 1, "on_error": "skip"}
    ((count, _, _, bad, _),) = read_xml(with_xml, large)
    assert (count, len(bad)) == (1, 1)
    assert bad[0].startswith(f"{path}, row 1: a document above data.max_document_bytes (1)")

    pairs = {"format": "instruct", "columns": {"user": "text", "assistant": "body"}}
    refused = {
        f"{path}: no element 'title'; set data.text_column": {**body, "text_column": "title"},
        f"{path}: no column 'body'; set data.columns to": {"sources": [path], **pairs},
        f"{cut}, row 3: can't be read, cut short or": {"sources": [cut], "on_error": "skip"},
    }
    for (count, _, error, _, _), message in zip(
        read_xml(with_xml, *refused.values()), refused, strict=True
    ):
        assert count is None
        assert error.startswith(message)


def test_the_worked_format_is_prepared(with_xml, tiny_tokenizer, tmp_path):
    (tmp_path / "raw").mkdir()
    rows = "".join(f"<row><text>document {i}</text></row>" for i in range(200))
    (tmp_path / "raw" / "a.xml").write_text(f"<rows>{rows}</rows>")
    config = tmp_path / "xml.toml"
    config.write_text(
        f'tokenizer = {{path = "{tiny_tokenizer}", vocab_size = 600}}\n'
        f'data = {{sources = ["{tmp_path}/raw"], dir = "{tmp_path}/data", workers = 1}}\n'
    )
    done = python(with_xml, "prepare.py", str(config))
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert counts["read"] == counts["written"] == 200


@pytest.mark.long
def test_the_worked_change_trains_resumes_and_samples(dataset, tiny_tokenizer, tmp_path):
    code = copy_code(tmp_path / "rocket")
    apply("changing-the-model.md", code)
    config = tmp_path / "changed.toml"
    config.write_text(
        f'tokenizer = {{path = "{tiny_tokenizer}", vocab_size = 600}}\n'
        f'data = {{dir = "{dataset}", seq_len = 32}}\n'
        "model = {dim = 32, n_layers = 2, n_heads = 4, max_seq_len = 64, qk_norm = true}\n"
        f'train = {{out_dir = "{tmp_path / "run"}", max_steps = 6, global_batch_size = 4}}\n'
    )

    assert python(code, "rocket.py", str(config), "--train.stop_at_step=3").returncode == 0
    finished = python(code, "rocket.py", str(config))
    assert "finished at step 6" in finished.stdout, finished.stderr
    sampled = python(code, "sample.py", str(tmp_path / "run"), "--prompt=def", "--max-tokens=4")
    assert sampled.returncode == 0, sampled.stderr
    refused = python(
        code, "tools/convert.py", "to-hf", str(tmp_path / "run"), str(tmp_path / "export")
    )
    assert refused.returncode == 1
    assert "k_norm" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "export").exists()
