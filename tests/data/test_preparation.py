"""Text prepared as .bin/.idx: the same bytes whatever the number of processes, and after being killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eellm.config.schema import Config, PrepareConfig
from eellm.data.corpus import prepare_corpus
from eellm.data.preparation import Preparation
from eellm.data.text import documents
from eellm.data.tokenizer_files import load_tokenizer
from eellm.errors import DataError
from eellm.mcore.datasets import open_documents
from eellm.report.preparing import shown_progress

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = (".bin", ".idx", ".tokenizer.json", ".json")


@pytest.fixture
def preparing(run_config, tmp_path):
    """Builds a config that prepares a corpus into a folder, in shards of about 2000 characters."""

    def build(text: Path, output: str, workers: int = 1, **data: object) -> Config:
        prepare = PrepareConfig(output=str(tmp_path / output), workers=workers, shard_megabytes=0.002)
        return run_config(text, **data).model_copy(update={"prepare": prepare})

    return build


def prepared(config: Config) -> list[tuple[int, bool]]:
    """Prepare; returns what progress was told."""
    told: list[tuple[int, bool]] = []
    Preparation.of(config).write(lambda characters, kept: told.append((characters, kept)))
    return told


def content(config: Config) -> dict[str, bytes]:
    return {ending: Path(f"{config.prepare.output}{ending}").read_bytes() for ending in ENDINGS}


def test_every_document_is_encoded_and_ended_in_its_order(preparing, text_folder, tmp_path):
    config = preparing(text_folder, "one")
    told = prepared(config)
    tokenizer = load_tokenizer(tmp_path / "one.tokenizer.json")
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for _, text in documents(config.data)]
    assert [ids.tolist() for ids in open_documents(tmp_path / "one")] == expected
    assert len(told) > 5
    assert sum(characters for characters, _ in told) == sum(len(text) for _, text in documents(config.data))
    assert sorted(path.name for path in tmp_path.glob("one*")) == sorted(f"one{ending}" for ending in ENDINGS)
    how = json.loads((tmp_path / "one.json").read_text())
    assert (how["documents"], how["tokens"], how["dtype"]) == (40, sum(map(len, expected)), "uint16")


def test_the_number_of_processes_changes_nothing(preparing, text_folder):
    configs = [preparing(text_folder, f"with_{workers}", workers) for workers in (1, 2)]
    for config in configs:
        prepared(config)
    assert content(configs[0]) == content(configs[1])


SLOWLY = """
import sys, time
from eellm.config.schema import Config, DataConfig, ModelConfig, PrepareConfig, TokenizerConfig
from eellm.data import preparation

def slowly(data, read=preparation.documents):
    for document in read(data):
        time.sleep(SECONDS)
        yield document

if __name__ == "__main__":
    import json
    groups = json.loads(sys.argv[1])
    nodes = {"data": DataConfig(**groups["data"]), "tokenizer": TokenizerConfig(**groups["tokenizer"])}
    config = Config.model_construct(prepare=PrepareConfig(**groups["prepare"]), **nodes)
    SECONDS = 0.0
    preparation.documents = slowly
    started = preparation.Preparation.of(config)
    SECONDS = 0.2
    started.write(lambda *_: None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_it_goes_on_and_gives_the_same(preparing, text_folder, tmp_path, workers):
    whole, config = preparing(text_folder, "whole"), preparing(text_folder, "killed", workers)
    prepared(whole)
    script = tmp_path / "slowly.py"
    script.write_text(SLOWLY)
    groups = json.dumps({name: getattr(config, name).model_dump() for name in ("data", "tokenizer", "prepare")})
    process = subprocess.Popen([sys.executable, str(script), groups], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while len(shards := list(tmp_path.glob("killed.shards/*/0*"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed.idx").exists()
    told = prepared(config)
    kept = sum(there for _, there in told)
    assert len(shards) <= kept < len(told)
    assert content(config) == content(whole)
    assert not list(tmp_path.glob("killed.shards*"))


def test_shards_of_other_text_are_not_taken(preparing, text_folder, tmp_path):
    config = preparing(text_folder, "one")
    preparation = Preparation.of(config)
    with pytest.raises(KeyboardInterrupt):
        preparation.write(interrupt)
    (text_folder / "first" / "00.txt").write_text("changed " * 50)
    assert not any(kept for _, kept in prepared(config))
    fresh = preparing(text_folder, "fresh")
    prepared(fresh)
    assert content(config) == content(fresh)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_done_is_not_done_again_and_what_is_anothers_stays(preparing, text_folder, tmp_path):
    config = preparing(text_folder, "one")
    assert not Preparation.of(config).is_done()
    prepared(config)
    assert Preparation.of(config).is_done()
    before = content(config)
    (text_folder / "first" / "00.txt").write_text("changed " * 50)
    with pytest.raises(DataError, match=r"one\.idx is there, made of other text"):
        Preparation.of(config).is_done()
    assert content(config) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_data_megatron_reads_it_with_the_tokenizer_beside_it(preparing, run_config, text_folder, tmp_path, workers):
    """The same windows as the text itself gives, and the same documents held out."""
    prepared(preparing(text_folder, "ready", workers))
    direct = prepare_corpus(run_config(text_folder))
    indirect = prepare_corpus(run_config(tmp_path / "ready", source="megatron", document_boundaries="reset"))
    assert (indirect.vocab_size, indirect.eod_id) == (direct.vocab_size, direct.eod_id)
    assert indirect.num_tokens == direct.num_tokens
    stored = [[ids.tolist() for ids in open_documents(Path(corpus.parts[0].prefix))] for corpus in (direct, indirect)]
    assert stored[0] == stored[1]


def test_a_bad_line_is_named_before_anything_is_written(preparing, tmp_path):
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": "good"}\n' * 50 + '{"text": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:51: no text in the field 'text'"):
        prepared(preparing(lines, "out", source="jsonl"))
    assert not list(tmp_path.glob("out*"))


def test_progress_is_lines_where_there_is_no_terminal(capsys, tmp_path):
    with shown_progress(3_000_000) as show:
        show.shard(1_000_000, True)
        show.shard(2_000_000, False)
        show.finish(tmp_path / "out", "2 documents")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "3.0 of 3.0 million characters  (1 shards kept from before)"
    assert printed[-1].endswith(f"data=megatron data.path={tmp_path / 'out'}")
