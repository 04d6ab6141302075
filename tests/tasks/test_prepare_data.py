"""task=prepare_data as the launcher runs it: in the parent, whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eellm.config.compose import compose
from eellm.launch import launch
from eellm.rundir import RunDirectory


def test_the_task_needs_no_ranks_and_does_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("".join(json.dumps({"text": f"document {number} " * 20}) + "\n" for number in range(50)))
    settings = [f"prepare.output={tmp_path / 'out'}", "prepare.workers=1", f"data.cache_dir={tmp_path / 'cache'}"]
    config = compose(["task=prepare_data", "data=jsonl", f"data.path={lines}", "tokenizer.vocab_size=300", *settings])
    # as an experiment's file may have it: a layout for which there are no ranks and no devices here
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": 8, "pp": 8, "dp": 1})})
    for told in ("50 documents", "is there already"):
        run = RunDirectory(tmp_path / told)
        run.path.mkdir()
        assert launch(config, run) == {}
        assert told in capsys.readouterr().out
        assert run.status()["state"] == "done"
    how = json.loads((tmp_path / "out.json").read_text())
    assert (how["documents"], how["vocab_size"]) == (50, 300)
