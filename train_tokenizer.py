"""python train_tokenizer.py [CONFIG] [--section.key=value ...] [--force]
python train_tokenizer.py [CONFIG] --add-pieces='<pad>,<|tool|>' --output=data/more.model

Trains a SentencePiece model on the training split of data.sources, checks that it gives every text
back unchanged, and writes it to tokenizer.path, with a list of its pieces beside it (.vocab).
Beside <unk>, <s> and </s> it has control pieces for conversations, so that a model of text can be
fine-tuned on them later: <pad>, <|system|>, <|user|>, <|assistant|> and <|end|>. Only data.template
puts them into tokens; a text that spells them out does not. tokenizer.control_symbols names others,
or none.

With --add-pieces nothing is trained: the tokenizer at tokenizer.path is written to --output with
more control pieces.
"""

from __future__ import annotations

from config import (
    Config,
    TokenizerConfig,
    UserError,
    check_command_line,
    load_config,
    resolve_path,
    run_program,
    write_atomically,
)

FLAGS = {
    "--force": "overwrite what exists, although datasets and models may have been built on it",
    "--add-pieces=<pad>,<|x|>": "control pieces to add (the ones that exist stay as they are)",
    "--output=PATH": "where the tokenizer with the added pieces goes; tokenizer.path needs --force",
}
COMMAND = {"usage": __doc__, "sections": ("tokenizer", "data"), "flags": FLAGS}

if __name__ == "__main__":  # before imports that take longer than this
    check_command_line(**COMMAND)

import json
import time
from pathlib import Path

from corpus import hub, vocabulary
from corpus.locks import locked
from corpus.vocabulary import HELD_OUT_BYTES, Sample, sample_corpus, train
from tokenizer import Tokenizer, load_model, printable


def main(arguments: list[str]) -> None:
    config, flags = load_config(arguments, **COMMAND)
    path, force = resolve_path(config.tokenizer.path), "--force" in flags
    if options := dict(flag.split("=", 1) for flag in flags if "=" in flag):
        add_pieces(path, options, force)
        return
    vocabulary.check_symbols(config.tokenizer)
    if path.exists() and not force:
        check_existing(path, config.tokenizer)
        print(f"up to date: {path} (--force trains it anew)")
    elif config.data.mixture:
        raise UserError(
            f"{path}: no tokenizer here; a mixture has that of its datasets: set tokenizer.path"
        )
    else:
        config.data = hub.local_sources(config.data)
        train_and_write(path, config, force)


def check_existing(path: Path, config: TokenizerConfig) -> None:
    """UserError where the tokenizer at `path` is not the one that the configuration describes."""
    size, wanted, options = Tokenizer(path).vocab_size, config.vocab_size, config.options
    trained = vocabulary.noted_options(path.read_bytes())
    if size > wanted or (size < wanted and options.get("hard_vocab_limit", True)):
        differs = f"has {size} pieces, tokenizer.vocab_size is {wanted}"
    elif trained not in (None, options):
        differs = f"was trained with {json.dumps(trained)}, [tokenizer] has {json.dumps(options)}"
    else:
        return
    raise UserError(
        f"{path} exists and {differs}: change that, choose another tokenizer.path, or use --force"
    )


def train_and_write(path: Path, config: Config, force: bool) -> None:
    """Samples, trains, checks the round trip, and only then writes; prints the result."""
    start = time.perf_counter()
    training, held_out = sample_corpus(config)
    if not training.size:
        raise UserError(
            "data.sources hold no training text (a single one may be held out: set"
            " data.val_fraction = 0), or tokenizer.sample_bytes is too small"
        )
    size = config.tokenizer.vocab_size
    print(f"training {size} pieces on {training.size / 1e6:.1f} MB", flush=True)
    model = train(training.texts(), config.tokenizer)

    processor = load_model(model, "the trained tokenizer")
    judge = held_out if held_out.size else Sample(HELD_OUT_BYTES, training.texts())
    texts = [text.decode() for text in judge.texts()]
    vocabulary.check_encoded(processor, config.tokenizer)
    vocabulary.check_round_trips(processor, texts)
    rate = judge.size / max(1, sum(map(len, processor.encode(texts))))
    if not write_model(path, model, force):
        check_existing(path, config.tokenizer)
        print(f"up to date: {path} (another process has trained it meanwhile)")
        return
    tokenizer = Tokenizer(path)
    print(
        f"{path}: {tokenizer.vocab_size} pieces, {rate:.2f} bytes per token on"
        f" {'held-out' if held_out.size else 'training'} text, round trip exact,"
        f" {time.perf_counter() - start:.0f} s\n"
        f"control pieces, which no text gives: {' '.join(tokenizer.control_pieces())}"
    )


def add_pieces(path: Path, options: dict[str, str], force: bool) -> None:
    """Writes the tokenizer at `path` with more control pieces to --output."""
    if set(options) != {"--add-pieces", "--output"}:
        raise UserError("--add-pieces=<pad>,<|x|> and --output=PATH go together")
    output = resolve_path(options["--output"])
    size = Tokenizer(path).vocab_size
    model = vocabulary.add_control_pieces(path.read_bytes(), options["--add-pieces"].split(","))
    if output.exists() and output.read_bytes() == model:
        print(f"up to date: {output}")
    elif write_model(output, model, force):
        print(f"{output}: {size} pieces and {Tokenizer(output).vocab_size - size} more")
    else:
        raise UserError(
            f"{output} exists and would change: choose another --output, or use --force"
        )


def write_model(path: Path, model: bytes, replace: bool) -> bool:
    """Writes the model, and beside it a .vocab to read: line i is piece i and its score.

    Returns False if there is a model by now and `replace` is not set; UserError if the directory
    can't be written.
    """
    processor = load_model(model, str(path))
    rows = (
        f"{printable(processor.id_to_piece(i))}\t{processor.get_score(i):g}\n"
        for i in range(processor.vocab_size())
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock"), lambda holder: None):
            if path.exists() and not replace:
                return False
            write_atomically(path.with_suffix(".vocab"), "".join(rows).encode())
            write_atomically(path, model)
            return True
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


if __name__ == "__main__":
    run_program(main)
