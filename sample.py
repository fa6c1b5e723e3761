"""Continues prompts with a trained model; reads a run directory alone.

    python sample.py out/tiny --prompt="def main(arguments: list[str]) -> None:
    options = parse(arguments)
    prompts = read_prompts(options)
    if options.checkpoint in ("best", "last"):
        checkpoint = find_checkpoint(existing(options.run), options.checkpoint)
    else:
        checkpoint = find_checkpoint(existing(options.checkpoint))
    loss = checkpoint.val_loss
    evaluated = f"validation loss {loss:.4f}" if loss < math.inf else "not evaluated"
    print(f"{checkpoint.path}: step {checkpoint.step}, {evaluated}", file=sys.stderr)
    sampler = Sampler(checkpoint, *device_and_dtype(options))
    sys.stdout.reconfigure(errors="replace")  # where the terminal can't show all of Unicode
    if prompts is not None:
        answer(sampler, prompts, options)
        return
    while True:
        try:
            answer(sampler, [input("> ")], options)
        except UserError as error:
            print(error, file=sys.stderr)
        except EOFError:
            return


def answer(sampler: Sampler, prompts: list[str], options: argparse.Namespace) -> None:
    """Samples from each prompt and prints; a single sample streams to a terminal."""
    encoded = sampler.encode(prompts, options.max_tokens or 1)
    settings = Settings(
        options.max_tokens or MAX_TOKENS,
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.seed,
    )
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(options.num_samples)]
    if len(rows) == 1 and not options.json and sys.stdout.isatty():
        show = partial(print, end="", flush=True)
        show(prompts[0])
        sampler.complete(encoded, [0], settings, options.stop, show)
        print()
        return
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        numbers = [sample for _, sample in batch]
        completions = sampler.complete(
            [encoded[i] for i, _ in batch], numbers, settings, options.stop
        )
        for (i, sample), completion in zip(batch, completions, strict=True):
            if options.json:
                row = {"prompt": prompts[i], "sample": sample, "completion": completion.text}
                print(json.dumps({**row, "tokens": completion.tokens, "end": completion.end}))
            else:
                heading = f"--- prompt {i + 1}, sample {sample + 1} ---\n" if len(rows) > 1 else ""
                print(heading + prompts[i] + completion.text)


def existing(name: str) -> Path:
    """A path on the command line: from the current directory, else from the repository."""
    here = Path(name).expanduser()
    return here if here.exists() else resolve_path(name)


def read_prompts(options: argparse.Namespace) -> list[str] | None:
    """The prompts of the command line or its file; None where a terminal is to be asked."""
    if options.prompt is not None:
        return [options.prompt]
    if options.prompt_file is None:
        if sys.stdin.isatty():
            return None
        raise UserError("give --prompt or --prompt-file (a terminal would be asked for prompts)")
    path = Path(options.prompt_file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    rows = [(row, line.removesuffix("\r")) for row, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no prompt")
    return [json_prompt(path, *row) if path.suffix == ".jsonl" else row[1] for row in rows]


def json_prompt(path: Path, row: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{path}, row {row}: write {{"prompt": "text"}}')
    return prompt


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the type of weights; auto as in training."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise UserError("--device=cuda: this machine has no GPU that torch can use")
    name = options.device if options.device != "auto" else "cuda" if has_cuda else "cpu"
    return torch.device(name), compute_dtype(options.dtype, torch.device(name))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; UserError where it is wrong."""
    parser = Parser(
        prog="python sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", help="run directory, such as out/tiny")
    add("--prompt", help="text to continue")
    add("--prompt-file", help='a prompt a line, or JSON lines with "prompt" if it ends in .jsonl')
    add("--checkpoint", default="best", help="best, last or a checkpoint's path (best)")
    add("--num-samples", type=number(int, 1), default=1, help="samples a prompt (1)")
    add(
        "--max-tokens",
        type=number(int, 1),
        help=f"longest completion ({MAX_TOKENS}, or what is left of model.max_seq_len)",
    )
    add("--temperature", type=number(float, 0), default=0.8, help="0: the likeliest token (0.8)")
    add("--top-k", type=number(int, 0), default=0, help="draw from the k likeliest; 0: all (0)")
    add("--top-p", type=number(float, 0, 1), default=0.95, help="and from the share p (0.95)")
    add("--repetition-penalty", type=number(float, 0.01), default=1.0, help="1: none (1)")
    add("--stop", action="append", default=[], help="text that ends a sample; may be repeated")
    add("--seed", type=number(int, 0), default=0, help="of the drawing (0)")
    add("--batch-size", type=number(int, 1), default=32, help="samples at a time (32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--json", action="store_true", help="a JSON object a sample")
    options = parser.parse_args(arguments)
    if "" in options.stop:
        raise UserError("--stop is empty: it would stop at once")
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: give one")
    return options


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number within bounds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}: a number, {limit}")
        return value

    return read


if __name__ == "__main__":
    run_program(main)
