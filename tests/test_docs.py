"""What the documentation shows works: the worked change of the model, the moved configuration."""

import re
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from training import ENVIRONMENT, copy_code

from config import DataConfig, build_config, read_toml
from corpus import readers

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


def test_the_recipe_for_xml_gives_every_document_in_little_memory(tmp_path):
    code = block("data.md", "python")
    assert len(code.splitlines()) <= 20
    peak = "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])"
    texts = [f"Café {i} < \U0001f999 & ]\n" + "word " * 200 for i in range(10_000)]
    pages = "".join(
        f"<page><title>{i}</title><revision><text>{escape(text[:5])}<b>{escape(text[5:-1])}</b>"
        f"<![CDATA[{text[-1]}]]></text></revision></page>\n"
        for i, text in enumerate(texts)
    )
    for attribute in ("", ' xmlns="http://www.mediawiki.org/xml/export-0.11/"'):
        path, target = tmp_path / "dump.xml", tmp_path / "dump.jsonl"
        path.write_text(f"<dump{attribute}><wiki>{pages}</wiki></dump>")
        command = [sys.executable, "-c", code + peak, str(path), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        data = DataConfig(sources=[str(target)])
        found = [
            document.text for part in readers.plan(data) for document in readers.read(part, data)
        ]
        assert found == texts
        assert path.stat().st_size > 10e6
        assert int(done.stdout) < 22_000  # kB; the interpreter and its modules take 13,000


@pytest.mark.long
def test_the_worked_change_trains_resumes_and_samples(dataset, tiny_tokenizer, tmp_path):
    code = copy_code(tmp_path / "rocket")
    change = block("changing-the-model.md", "diff").encode()
    command = ["patch", "-p1", "--fuzz=0"]
    subprocess.run(command, cwd=code, input=change, check=True, stdout=subprocess.PIPE)
    assert change.count(b"\n+ ") <= 20
    config = tmp_path / "changed.toml"
    config.write_text(
        f'tokenizer = {{path = "{tiny_tokenizer}", vocab_size = 600}}\n'
        f'data = {{dir = "{dataset}", seq_len = 32}}\n'
        "model = {dim = 32, n_layers = 2, n_heads = 4, max_seq_len = 64, qk_norm = true}\n"
        f'train = {{out_dir = "{tmp_path / "run"}", max_steps = 6, global_batch_size = 4}}\n'
    )

    def python(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**ENVIRONMENT, "ROCKET_ROOT": str(code)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)

    assert python("rocket.py", str(config), "--train.stop_at_step=3").returncode == 0
    finished = python("rocket.py", str(config))
    assert "finished at step 6" in finished.stdout, finished.stderr
    sampled = python("sample.py", str(tmp_path / "run"), "--prompt=def", "--max-tokens=4")
    assert sampled.returncode == 0, sampled.stderr
    refused = python("tools/convert.py", "to-hf", str(tmp_path / "run"), str(tmp_path / "export"))
    assert refused.returncode == 1
    assert "k_norm" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "export").exists()
