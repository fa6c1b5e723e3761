"""Protects sources on the hub: what is downloaded is whole, proven and of one commit, what was
interrupted goes on and is never taken for data, files go to the splits that their names tell,
nothing is written outside data.raw_dir, and each mistake is one line.

The client is the real huggingface_hub, in this process or, where its environment counts, in one of
its own; the hub is tests/hub_server.py on a loopback port."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import commit_of, serving

from config import ROOT, ConfigError, DataConfig, UserError
from corpus import hub, readers

constants = pytest.importorskip("huggingface_hub.constants")

WIKITEXT = "hf://datasets/Salesforce/wikitext"
ORCA = "hf://datasets/Open-Orca/OpenOrca"
DOWNLOAD = """
import json, sys
import config
from corpus import hub
def main(arguments):
    for keys in json.loads(arguments[0]):
        try:
            hub.download(config.DataConfig(**keys))
        except config.UserError as error:
            print(error, file=sys.stderr)
config.run_program(main)
"""
OURS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_CACHE", "HTTP_PROXY", "http_proxy")


def parquet(**columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="none")
    return sink.getvalue()


def words(name: str, rows: int) -> bytes:
    return parquet(text=[f" {name} line {row}\n" for row in range(rows)])


def wikitext() -> dict[str, bytes]:
    files = {".gitattributes": b"*.parquet lfs\n", "README.md": b"# WikiText\n"}
    for folder in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        files[f"{folder}/train-00000-of-00002.parquet"] = words(f"{folder} a", 20_000)
        files[f"{folder}/train-00001-of-00002.parquet"] = words(f"{folder} b", 500)
        files[f"{folder}/validation-00000-of-00001.parquet"] = words(f"{folder} v", 300)
        files[f"{folder}/test-00000-of-00001.parquet"] = words(f"{folder} t", 200)
    return files


def orca() -> dict[str, bytes]:
    def rows(name, count):
        return parquet(
            id=[f"{name}.{row}" for row in range(count)],
            system_prompt=["You are an AI assistant." for _ in range(count)],
            question=[f"What is {row} + {row}?" for row in range(count)],
            response=[f"It is {2 * row}." for row in range(count)],
        )

    return {
        "1M-GPT4-Augmented.parquet": rows("gpt4", 100),
        "3_5M-GPT3_5-Augmented.parquet": rows("gpt35", 200),
        "OpenOrcaLogo.png": b"\x89PNG",
        "README.md": b"# OpenOrca\n",
        "dataset_infos.json": b"{}",
    }


@pytest.fixture(scope="module")
def contents():
    converted = {
        f"wikitext-103-raw-v1/{split}/0000.parquet": words(f"converted {split}", 10)
        for split in ("train", "validation", "test")
    }
    return {
        "Salesforce/wikitext": {"main": wikitext(), "refs/convert/parquet": converted},
        "Open-Orca/OpenOrca": {"main": orca()},
        "rajpurkar/squad": {"main": {"train.csv": b"text\nhello\n", "dev.csv": b"text\nworld\n"}},
    }


@pytest.fixture
def server(contents, monkeypatch):
    with serving() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # a break loses up to so much
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # read at its import
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)  # who runs the tests
        running.datasets = {name: dict(revisions) for name, revisions in contents.items()}
        yield running


@pytest.fixture
def work(tmp_path):
    (tmp_path / "home").mkdir()
    yield tmp_path
    written = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert written <= {"token"}  # the one that a test put there


def config(work, *sources, **keys) -> DataConfig:
    return DataConfig(sources=list(sources), raw_dir=str(work / "raw"), **keys)


def environment(endpoint, work, **variables):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    home = {"HOME": str(work / "home"), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
    return kept | home | variables


def start(endpoint, configs, work, **variables):
    keys = ("sources", "val_sources", "test_sources", "raw_dir")
    arguments = json.dumps([{key: getattr(data, key) for key in keys} for data in configs])
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, arguments],
        env=environment(endpoint, work, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def download(data) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        hub.download(data)
    return out.getvalue()


def refused(data) -> str:
    """The one line that a download fails with."""
    with pytest.raises(UserError) as error:
        hub.download(data)
    message = str(error.value)
    assert message.startswith(data.sources[0])
    assert "\n" not in message
    return message


def refused_apart(endpoint, configs, work, **variables) -> list[str]:
    """The one line that each of the downloads fails with, in a process of its own."""
    process = start(endpoint, configs, work, **variables)
    _, err = process.communicate()
    lines = err.splitlines()
    assert process.returncode == 0, err
    assert len(lines) == len(configs), err
    for line, data in zip(lines, configs, strict=True):
        assert line.startswith(data.sources[0])
    return lines


def names(paths, work) -> list[str]:
    return [Path(path).relative_to(work / "raw").as_posix() for path in paths]


def test_a_folder_is_downloaded_once_and_splits_as_its_files_are_named(
    server, work, contents, capsys
):
    data = config(work, f"{WIKITEXT}/wikitext-103-raw-v1")
    out = download(data)
    files = contents["Salesforce/wikitext"]["main"]
    assert out.count("\n") == 1
    assert "downloaded, 4 file(s) (1 test, 2 train, 1 val)" in out
    assert f"commit {commit_of(files)[:12]}" in out

    local = hub.local_sources(data)
    folder = "Salesforce/wikitext/wikitext-103-raw-v1"
    assert names(local.sources, work) == [
        f"{folder}/train-00000-of-00002.parquet",
        f"{folder}/train-00001-of-00002.parquet",
    ]
    assert names(local.val_sources, work) == [f"{folder}/validation-00000-of-00001.parquet"]
    assert names(local.test_sources, work) == [f"{folder}/test-00000-of-00001.parquet"]
    for path in local.sources + local.val_sources + local.test_sources:
        assert Path(path).read_bytes() == files[f"{Path(path).parent.name}/{Path(path).name}"]
    read = [d.text for part in readers.plan(local) for d in readers.read(part, local)]
    assert len(read) == 20_000 + 500 + 300 + 200
    assert hub.commits(data) == {data.sources[0]: commit_of(files)}
    assert len(server.asked("/blobs/")) == 4  # wikitext-2 was left alone

    count = len(server.requests)
    hub.download(data)
    assert "up to date, 4 file(s)" in capsys.readouterr().out
    assert len(server.requests) == count


def test_prepare_downloads_and_then_needs_no_network(server, work, tiny_tokenizer, contents):
    source = f"{WIKITEXT}@refs/convert/parquet/wikitext-103-raw-v1"
    program = [sys.executable, str(ROOT / "prepare.py"), f'--data.sources=["{source}"]']
    program += [f"--data.raw_dir={work}/raw", f"--data.dir={work}/data", "--data.workers=1"]
    program += [f"--tokenizer.path={tiny_tokenizer}", "--tokenizer.vocab_size=600"]

    def prepare(*flags, endpoint="http://127.0.0.1:1"):
        env = environment(endpoint, work)
        return subprocess.run([*program, *flags], env=env, capture_output=True, text=True)

    early = prepare()
    assert early.returncode == 1
    assert early.stderr == (
        f"prepare.py: error: {source}: not downloaded yet; on a machine with network: python"
        " prepare.py CONFIG --download\n"
    )
    assert prepare("--download", endpoint=server.endpoint).returncode == 0
    assert not (work / "data").exists()
    assert prepare().returncode == 0
    manifest = json.loads((work / "data" / "manifest.json").read_text())
    commit = commit_of(contents["Salesforce/wikitext"]["refs/convert/parquet"])
    assert manifest["commits"] == {source: commit}
    assert manifest["splits"]["train"]["documents"] == manifest["splits"]["val"]["documents"] == 10


def test_files_and_globs_are_taken_as_they_are(server, work):
    data = config(
        work,
        f"{ORCA}/1M-GPT4-Augmented.parquet",
        f"{ORCA}/*.parquet",
        f"{WIKITEXT}@refs/convert/parquet/wikitext-103-raw-v1/*",
        val_sources=[f"{WIKITEXT}/**/validation-*"],
    )
    out = download(data)
    assert "name the folder to keep its splits apart" in out
    local = hub.local_sources(data)
    converted = "Salesforce/wikitext@refs%2Fconvert%2Fparquet/wikitext-103-raw-v1"
    assert names(local.sources, work) == [
        "Open-Orca/OpenOrca/1M-GPT4-Augmented.parquet",
        "Open-Orca/OpenOrca/1M-GPT4-Augmented.parquet",
        "Open-Orca/OpenOrca/3_5M-GPT3_5-Augmented.parquet",
        f"{converted}/test/0000.parquet",
        f"{converted}/train/0000.parquet",
        f"{converted}/validation/0000.parquet",
    ]
    assert [Path(path).parent.name for path in local.val_sources] == [
        "wikitext-103-raw-v1",
        "wikitext-2-raw-v1",
    ]
    assert local.test_sources == []
    assert len(server.asked("resolve/" + commit_of(orca()))) == 2  # the first file only once
    assert "OpenOrcaLogo.png" not in str(server.requests)


def test_whole_repositories(server, work, capsys):
    own = work / "own.txt"
    own.write_text("mine")
    data = config(
        work, str(own), "hf://datasets/rajpurkar/squad", f"{ORCA}@main", val_sources=[str(own)]
    )
    download(data)
    local = hub.local_sources(data)
    assert local.sources[0] == str(own)
    assert names(local.sources[1:], work) == [
        "rajpurkar/squad/train.csv",
        "Open-Orca/OpenOrca@main/1M-GPT4-Augmented.parquet",
        "Open-Orca/OpenOrca@main/3_5M-GPT3_5-Augmented.parquet",
    ]
    assert local.val_sources == [str(own)]
    assert "1 val file(s) left out for data.val_sources" in capsys.readouterr().out
    held_out = hub.local_sources(
        config(work, str(own), test_sources=["hf://datasets/rajpurkar/squad"])
    )
    assert names(held_out.test_sources, work) == [
        "rajpurkar/squad/dev.csv",
        "rajpurkar/squad/train.csv",
    ]


def test_splits_by_folder_and_by_odd_names(server, work):
    paths = (
        "data/train/a.jsonl data/validation/b.jsonl data/test/c.jsonl data/latest.jsonl"
        " data/wiki.valid.jsonl data/my_TEST_2.jsonl.gz data/dev/train.jsonl"
    ).split()
    server.datasets["a/b"] = {"main": {path: path.encode() for path in paths}}
    data = config(work, "hf://datasets/a/b/data")
    download(data)
    local = hub.local_sources(data)
    assert {Path(p).name for p in local.sources} == {"a.jsonl", "latest.jsonl", "train.jsonl"}
    assert {Path(p).name for p in local.val_sources} == {"b.jsonl", "wiki.valid.jsonl"}
    assert {Path(p).name for p in local.test_sources} == {"c.jsonl", "my_TEST_2.jsonl.gz"}


def test_what_a_folder_holds_beside_its_data_is_told(server, work):
    paths = ["a.ndjson.xz", "b.ndjson", "README.md", "c.arrow", "d.arrow", "LICENSE", "e/f.tsv"]
    server.datasets["a/b"] = {"main": {f"data/{path}": b"" for path in paths}}
    server.datasets["a/b"]["main"]["data/c.tsv.gz"] = b""
    source = "hf://datasets/a/b/data"
    assert "several formats (.ndjson, .tsv)" in refused(config(work, source))
    for path in ("data/c.tsv.gz", "data/e/f.tsv"):
        del server.datasets["a/b"]["main"][path]
    data = config(work, source)
    told = "2 .arrow (data/c.arrow, …), 1 without an ending (data/LICENSE)"
    assert download(data).startswith(f"{source}: not downloaded: {told}\n{source}: downloaded, 2")
    assert [Path(path).name for path in hub.local_sources(data).sources] == paths[:2]
    data = config(work, source + "/*.ndjson*")
    assert "not downloaded" not in download(data)


def test_other_configurations_are_left_as_they_are():
    data = DataConfig(raw_dir="$NOT_SET/raw")  # never looked at
    program = (
        "import sys; from corpus import hub; from config import DataConfig; d = DataConfig(); "
        "assert hub.local_sources(d) is d and hub.commits(d) == {}; hub.download(d); "
        "assert 'huggingface_hub' not in sys.modules"
    )
    assert hub.local_sources(data) is data
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nothing to download" in run.stdout


def test_a_connection_that_breaks_is_taken_up_where_it_was(server, work, contents):
    path = "wikitext-103-raw-v1/train-00000-of-00002.parquet"
    content = contents["Salesforce/wikitext"]["main"][path]
    server.cut[path] = len(content) // 3
    data = config(work, f"{WIKITEXT}/{path}")
    download(data)
    assert Path(hub.local_sources(data).sources[0]).read_bytes() == content
    first, second = server.asked("/blobs/")
    assert "range" not in first
    assert first["accept-encoding"] == "identity"  # or a range would be one of compressed bytes
    assert (
        int(second["range"].removeprefix("bytes=").rstrip("-")) == len(content) // 3 // 1024 * 1024
    )


def test_a_second_run_goes_on_with_the_same_commit(server, work, contents):
    """The hub breaks off within a file and goes down; then it is back, with another commit."""
    path = "wikitext-2-raw-v1/train-00000-of-00002.parquet"
    files = contents["Salesforce/wikitext"]["main"]
    server.cut[path] = len(files[path]) // 2
    server.cut_then_down = {path}
    data = config(work, f"{WIKITEXT}/wikitext-2-raw-v1")
    message = refused(data)
    assert "HTTP error 503" in message
    with pytest.raises(UserError, match=r"not downloaded yet; .* prepare.py CONFIG --download"):
        hub.local_sources(data)
    with pytest.raises(UserError, match="not downloaded yet"):
        hub.commits(data)

    server.down.clear()
    server.requests.clear()
    server.datasets["Salesforce/wikitext"]["v1"] = files
    server.datasets["Salesforce/wikitext"]["main"] = {path: b"something else"}
    download(data)
    local = hub.local_sources(data)
    for name in local.sources + local.val_sources + local.test_sources:
        assert Path(name).read_bytes() == files[f"wikitext-2-raw-v1/{Path(name).name}"]
    assert hub.commits(data) == {data.sources[0]: commit_of(files)}
    ranges = [headers["range"] for headers in server.asked("/blobs/") if "range" in headers]
    assert ranges == [f"bytes={len(files[path]) // 2 // 1024 * 1024}-"]
    assert len(server.asked("/blobs/")) == 3  # the test file was there


@pytest.mark.long
def test_a_killed_download_is_not_taken_for_data(server, work, contents):
    data = config(work, f"{ORCA}/1M-GPT4-Augmented.parquet")
    for end, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        server.stalled = threading.Event()
        process = start(server.endpoint, [data], work)
        assert server.stalled.wait(60)
        process.send_signal(end)
        _, err = process.communicate()
        assert (process.returncode, err) == (code, "")
        with pytest.raises(UserError, match="not downloaded yet"):
            hub.local_sources(data)
    server.stalled = None
    download(data)
    content = contents["Open-Orca/OpenOrca"]["main"]["1M-GPT4-Augmented.parquet"]
    assert Path(hub.local_sources(data).sources[0]).read_bytes() == content


def test_of_two_downloads_at_once_the_second_waits_and_goes_on(server, work, contents):
    data = config(work, f"{ORCA}/1M-GPT4-Augmented.parquet")
    server.stalled = threading.Event()
    first = start(server.endpoint, [data], work)
    assert server.stalled.wait(60)
    server.stalled = None
    second = start(server.endpoint, [data], work)
    assert f"waiting for process {first.pid} on " in second.stdout.readline()
    first.kill()
    first.communicate()
    out, err = second.communicate(timeout=240)
    assert (second.returncode, err) == (0, "")
    assert "downloaded, 1 file(s)" in out
    content = contents["Open-Orca/OpenOrca"]["main"]["1M-GPT4-Augmented.parquet"]
    assert Path(hub.local_sources(data).sources[0]).read_bytes() == content


def test_what_is_gone_or_cut_after_the_download_is_found_and_fetched(server, work):
    data = config(work, ORCA + "/*.parquet")
    download(data)
    first, second = map(Path, hub.local_sources(data).sources)
    whole, other = first.read_bytes(), second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=r"3_5M-GPT3_5-Augmented.parquet is missing or has another"):
        hub.local_sources(data)
    second.write_bytes(other)
    first.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"1M-GPT4-Augmented.parquet is missing or has another"):
        hub.local_sources(data)
    second.unlink()
    assert "downloaded, 2 file(s)" in download(data)
    assert (first.read_bytes(), second.read_bytes()) == (whole, other)
    assert len(server.asked("/blobs/")) == 4


def test_bytes_that_are_not_what_the_hub_lists_are_refused(server, work, contents):
    path = "1M-GPT4-Augmented.parquet"
    content = contents["Open-Orca/OpenOrca"]["main"][path]
    server.replaced = {path: content[:-4] + b"PAR2", "README.md": b"# openorca\n"}
    configs = [config(work, f"{ORCA}/{name}") for name in (path, "README.md")]
    first, second = map(refused, configs)
    assert f"{path} arrived with other bytes" in first
    assert "README.md arrived with other bytes" in second
    for data in configs:
        with pytest.raises(UserError, match="not downloaded yet"):
            hub.local_sources(data)
    server.replaced = {}
    download(data)
    assert Path(hub.local_sources(data).sources[0]).read_bytes() == b"# OpenOrca\n"


def test_a_stored_token_opens_a_gated_dataset_and_stays_with_the_hub(server, work):
    server.gated = {"Open-Orca/OpenOrca"}
    server.tokens = {"friend", "stranger"}
    data = config(work, f"{ORCA}/1M-GPT4-Augmented.parquet")
    for variables in ({}, {"HF_TOKEN": "stranger"}):
        (message,) = refused_apart(server.endpoint, [data], work, **variables)
        assert f"accept its terms at {server.endpoint}/datasets/Open-Orca/OpenOrca" in message
        assert "hf auth login" in message
    assert "refuses your token" in refused_apart(server.endpoint, [data], work, HF_TOKEN="bad")[0]
    stored = work / "home" / ".cache" / "huggingface" / "token"  # of `hf auth login`
    stored.parent.mkdir(parents=True)
    stored.write_text("friend")
    out, err = start(server.endpoint, [data], work).communicate()
    assert ("downloaded, 1 file(s)" in out, err) == (True, "")
    assert server.asked("resolve")[-1]["authorization"] == "Bearer friend"
    assert "authorization" not in server.asked("/blobs/")[-1]


def test_what_the_hub_has_not(server, work):
    server.datasets["o/mixed"] = {"main": {"a.csv": b"", "b.csv.gz": b"", "c.parquet": b""}}
    server.datasets["o/tested"] = {"main": {"README.md": b"#", "data/test.csv": b"text\n"}}
    unknown = "or a private one: correct the name, or `hf auth login` or set HF_TOKEN"
    messages = {
        WIKITEXT + "s": f"no dataset Salesforce/wikitexts on {server.endpoint}, {unknown}",
        WIKITEXT + "@v9": "no revision v9; ",
        WIKITEXT + "/wikitext-103-raw": "there is: wikitext-103-raw-v1",
        ORCA + "/1M-GPT4-Augmented.parket": "there is: 1M-GPT4-Augmented.parquet",
        "hf://datasets/a--b/c": "a--b/c is no name that the hub allows",
        "hf://datasets/o/mixed": "(.csv, .parquet); name one by a glob, such as hf://datasets/o/mixed/*.csv*",
    }
    configs = [config(work, source) for source in messages]
    for data, expected in zip(configs, messages.values(), strict=True):
        assert expected in refused(data)
    assert not (work / "raw").exists()

    data = config(work, "hf://datasets/o/tested")
    download(data)
    with pytest.raises(UserError, match="all its files are named as val or test data"):
        hub.local_sources(data)


def test_no_network(server, work):
    closed = server.endpoint
    server.server_close()
    data = config(work, WIKITEXT)
    message = refused(data)
    assert f"can't reach {closed}" in message
    assert "login node" in message
    assert "HF_HUB_OFFLINE is set" in refused_apart(closed, [data], work, HF_HUB_OFFLINE="1")[0]


def test_an_endpoint_that_is_no_hub(server, work):
    server.is_hub = False
    message = refused(config(work, ORCA))
    assert "does not answer as a hub does" in message


def test_without_the_package(work):
    (work / "hidden").mkdir()
    (work / "hidden" / "huggingface_hub.py").write_text("raise ImportError")
    path = f"{work / 'hidden'}{os.pathsep}{ROOT}"
    (message,) = refused_apart("http://127.0.0.1:1", [config(work, ORCA)], work, PYTHONPATH=path)
    assert "pip install '.[hub]'" in message


def test_a_disk_that_is_full_or_no_directory(server, work, small_disk):
    server.datasets["a/b"] = {"main": {"data.txt": bytes(3_000_000)}}
    (work / "raw").mkdir()
    (work / "raw" / "Open-Orca").write_text("a file")
    configs = [
        DataConfig(sources=["hf://datasets/a/b"], raw_dir=str(small_disk)),
        config(work, ORCA),
    ]
    full, no_directory = map(refused, configs)
    assert "3,000,000 bytes to fetch" in full
    assert "make room or set data.raw_dir" in full
    assert f"can't write {work / 'raw' / 'Open-Orca'}" in no_directory


@pytest.mark.parametrize(
    "source",
    [
        "hf://models/a/b",
        "hf://datasets/",
        "hf://datasets/squad",
        "hf://datasets/../b",
        "hf://datasets/a/b/../../../c.txt",
        "hf://datasets/a/b//c",
        "hf://datasets/a/b@",
        "hf://datasets/a/b@/c",
        "hf://Open-Orca/OpenOrca",
    ],
)
def test_malformed_sources(work, source):
    with pytest.raises(ConfigError, match=r"not of the form hf://datasets/OWNER/NAME\[@REVISION"):
        hub.local_sources(config(work, source))


def test_names_that_lead_outside_are_refused(server, work):
    evil = ["../../../evil.parquet", "/evil.parquet", "a\\..\\evil.parquet", "$HOME/evil.parquet"]
    for number, name in enumerate(evil):
        server.datasets[f"evil/{number}"] = {"main": {f"{number}.parquet": b"evil"}}
        server.renamed[f"{number}.parquet"] = name
    configs = [config(work, f"hf://datasets/evil/{n}/*.parquet") for n in range(len(evil))]
    for line, name in zip(map(refused, configs), evil, strict=True):
        assert f"refused, a file on the hub is named {name!r}" in line
    assert server.asked("resolve") == []
    assert not list(work.rglob("*evil*"))


def test_a_listing_that_is_tampered_with_is_refused(server, work):
    data = config(work, "hf://datasets/rajpurkar/squad")
    download(data)
    (work / "raw" / "outside.txt").write_text("secret")
    listing = work / "raw" / "rajpurkar" / "squad" / hub.LISTING
    whole = listing.read_text()
    for damage in ("../outside.txt", str(work / "raw" / "outside.txt"), "$HOME/outside.txt"):
        values = json.loads(whole)
        values["paths"][""][damage] = len("secret")
        listing.write_text(json.dumps(values))
        with pytest.raises(UserError, match="not what --download writes; remove"):
            hub.local_sources(data)
    for damage in ("{", "[]", '{"commit": "c", "paths": {"": ["a"]}}', whole[:-20]):
        listing.write_text(damage)
        with pytest.raises(UserError, match="not what --download writes; remove"):
            hub.local_sources(data)
    listing.write_text(whole)
    assert len(hub.local_sources(data).sources) == 1
