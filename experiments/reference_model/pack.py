"""Make the model that comes with eellm out of a run of `experiment=reference_model`: its last weights, in bf16, and nothing else.

python experiments/reference_model/pack.py outputs/train/reference_model/<time>
"""

from __future__ import annotations

import shutil
import sys

import yaml

from eellm.config.compose import compose
from eellm.config.saved_run import saved_values
from eellm.data.tokenizer_files import load_tokenizer
from eellm.mcore.checkpoint import model_state
from eellm.mcore.checkpoint_writer import CheckpointWriter
from eellm.reference import reference_run
from eellm.rundir import RunDirectory, whole_checkpoint
from eellm.tasks.session import Plan, groups_of, process_group
from eellm.tasks.trained import load_trained

ELSEWHERE = "~/.cache/eellm"
"""In place of the cache of the machine that trained it."""


def main(given: str) -> None:
    run, step = whole_checkpoint("checkpoint", given)
    config = compose(["task=evaluate", f"checkpoint={step}", "precision=bf16"])
    target = RunDirectory(reference_run())
    shutil.rmtree(target.path, ignore_errors=True)
    target.checkpoints.mkdir(parents=True)
    plan = Plan.of(config, load_tokenizer(run.tokenizer, None).vocab_size)
    with process_group(config, alone=True) as device, groups_of(plan, device, config.seed) as groups:
        stages = load_trained(config, plan, groups).stages
        CheckpointWriter().save(target.checkpoints / step.name, model_state(stages))
    target.keep_tokenizer(run.tokenizer)
    shutil.copyfile(run.status_file, target.status_file)  # the fingerprint, by which calibrations know the model
    values = saved_values(given)
    values["data"]["cache_dir"] = ELSEWHERE
    target.config.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    size = sum(path.stat().st_size for path in target.path.rglob("*") if path.is_file())
    print(f"{target.path}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
