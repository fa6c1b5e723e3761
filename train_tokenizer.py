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

from config import UserError, check_command_line, load_config, resolve_path, run_program

FLAGS = {
    "--force": "overwrite what exists, although datasets and models may have been built on it",
    "--add-pieces=<pad>,<|x|>": "control pieces to add (the ones that exist stay as they are)",
    "--output=PATH": "where the tokenizer with the added pieces goes; tokenizer.path needs --force",
}
COMMAND = {"usage": __doc__, "sections": ("tokenizer", "data"), "flags": FLAGS}

if __name__ == "__main__":  # before imports that take longer than this
    check_command_line(**COMMAND)

from corpus import hub, vocabulary


def main(arguments: list[str]) -> None:
    config, flags = load_config(arguments, **COMMAND)
    path, force = resolve_path(config.tokenizer.path), "--force" in flags
    if options := dict(flag.split("=", 1) for flag in flags if "=" in flag):
        if set(options) != {"--add-pieces", "--output"}:
            raise UserError("--add-pieces=<pad>,<|x|> and --output=PATH go together")
        pieces, output = options["--add-pieces"].split(","), resolve_path(options["--output"])
        vocabulary.add_pieces(path, pieces, output, force)
        return
    vocabulary.check_symbols(config.tokenizer)
    if path.exists() and not force:
        vocabulary.check_existing(path, config.tokenizer)
        print(f"up to date: {path} (--force trains it anew)")
    elif config.data.mixture:
        raise UserError(
            f"{path}: no tokenizer here; a mixture has that of its datasets: set tokenizer.path"
        )
    else:
        config.data = hub.local_sources(config.data)
        vocabulary.train_and_write(path, config, force)


if __name__ == "__main__":
    run_program(main)
