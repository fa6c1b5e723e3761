"""What tests share: the repository on the import path, and a small real tokenizer."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

settings.register_profile("untimed", deadline=None)  # a busy machine says nothing of Rocket
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """A SentencePiece model of 600 pieces, trained on a little of the standard library."""
    from config import DataConfig
    from corpus import readers

    data = DataConfig()
    texts = (document.text for document in readers.read(readers.plan(data)[0], data))
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_prefix=str(prefix),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def dataset(tiny_tokenizer, tmp_path_factory) -> Path:
    """What prepare.py made of a few modules: about 150,000 tokens, a fifth for validation."""
    from training import prepared

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = [str(stdlib / name) for name in ("json", "email")]
    return prepared(tmp_path_factory.mktemp("dataset"), tiny_tokenizer, sources)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a run's copy of the code and 1.6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    from preflight import code_files

    code = sum(-(-path.stat().st_size // 4096) for path in code_files().values()) * 4096
    mount = ["mount", "-t", "tmpfs", "-o", f"size={code + 1_600_000}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
