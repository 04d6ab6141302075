"""Every rule, as the command line breaks it: the overrides and the paths that the error must name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

from eellm.config import rules, validate
from eellm.config.compose import compose
from eellm.config.parse import known_keys
from eellm.config.rules import model
from eellm.errors import ConfigError

TRAIN = "task=train"
EVALUATE = ["task=evaluate", "checkpoint=RUN"]
GENERATE = ["task=generate", "checkpoint=RUN"]
CALIBRATE = ["task=calibrate", "checkpoint=RUN"]
SERVE = ["task=serve", "checkpoint=RUN"]
TUNE = ["task=tune", "checkpoint=RUN"]
DECODING = ["task=benchmark", "benchmark=decoding"]
BATCH = ["data.micro_batch_size=8", "data.global_batch_size=16"]

RAMP_UP = "data.ramp_up={{start:{},increment:{},samples:{}}}"

BROKEN: list[tuple[list[str], set[str]]] = [
    # exits
    (["exits.layers=[2,9]"], {"exits.layers"}),
    (["exits.layers=[0,2]"], {"exits.layers"}),
    (["exits.layers=[2,2,4]"], {"exits.layers"}),
    (["exits.layers=[4,2]"], {"exits.layers"}),
    (["exits.layers=[0.5,1.5]"], {"exits.layers"}),
    (["exits.layers=[0.0]"], {"exits.layers"}),
    (["exits.layers=[0.25,0.26]"], {"exits.layers"}),
    (["exits.head=[norm,mlp]"], {"exits.head"}),
    (["exits.tie_output=[true]"], {"exits.tie_output"}),
    (["exits.temperature=[1.0,2.0]"], {"exits.temperature"}),
    # loss weights
    (["loss_weights.values=[0.1,0.2]"], {"loss_weights.values"}),
    (["loss_weights=warmup", "loss_weights.initial=[0.1]"], {"loss_weights.initial"}),
    (["loss_weights=warmup", "loss_weights.steps=0"], {"loss_weights.steps"}),
    (["loss_weights=rotating", "loss_weights.steps=0"], {"loss_weights.steps"}),
    # model
    (["model.num_attention_heads=3"], {"model.hidden_size"}),
    (["model.num_query_groups=3"], {"model.num_attention_heads"}),
    (["model.rotary_fraction=0.1"], {"model.rotary_fraction"}),
    (["model.head_dim=33"], {"model.rotary_fraction"}),
    (["model.position=learned", "model.max_positions=128"], {"model.max_positions"}),
    (["model.vocab_size=1024", "tokenizer.vocab_size=2048"], {"model.vocab_size"}),
    (["model.attention=flash_attn", "device=cpu", "precision=bf16"], {"model.attention"}),
    (["model.attention=transformer_engine"], {"model.attention"}),
    # tensor parallelism
    (
        [TRAIN, "parallel.tp=3"],
        {"model.num_attention_heads", "model.vocab_multiple"},
    ),
    ([TRAIN, "parallel.tp=4", "model.num_query_groups=2"], {"model.num_query_groups"}),
    ([TRAIN, "parallel.tp=4", "model.ffn_hidden_size=250"], {"model.ffn_hidden_size"}),
    ([TRAIN, "parallel.tp=2", "model.vocab_multiple=1", "model.vocab_size=2049"], {"model.vocab_multiple"}),
    (["parallel.sequence_parallel=true"], {"parallel.sequence_parallel"}),
    ([TRAIN, "parallel.tp=2", "parallel.sequence_parallel=true", "data.sequence_length=255"], {"data.sequence_length"}),
    # pipeline parallelism
    ([TRAIN, "parallel.pp=3"], {"model.num_layers"}),
    ([TRAIN, *BATCH, "parallel=pp2_vp2", "model.num_layers=6"], {"model.num_layers"}),
    ([TRAIN, "parallel.pp=2", "parallel.layers_per_stage=[8]"], {"parallel.layers_per_stage"}),
    ([TRAIN, "parallel.pp=2", "parallel.layers_per_stage=[4,5]"], {"parallel.layers_per_stage"}),
    ([TRAIN, *BATCH, "parallel.vp=2"], {"parallel.vp"}),
    ([TRAIN, "schedule=interleaved", "parallel=pp2"], {"schedule.name"}),
    ([TRAIN, *BATCH, "schedule=one_f_one_b", "parallel=pp2_vp2"], {"schedule.name"}),
    ([TRAIN, *BATCH, "parallel=pp2_vp2", "data.global_batch_size=24"], {"data.global_batch_size"}),
    ([TRAIN, *BATCH, "parallel=pp2_vp2", "data.global_batch_size=8"], {"data.global_batch_size"}),
    # batch and ranks
    ([*BATCH, "data.global_batch_size=12"], {"data.global_batch_size"}),
    ([TRAIN, *BATCH, "parallel.dp=3"], {"data.global_batch_size"}),
    ([TRAIN, RAMP_UP.format(8, 8, 10)], {"data.ramp_up.start"}),
    ([TRAIN, "data.global_batch_size=32", RAMP_UP.format(8, 16, 10)], {"data.ramp_up.increment"}),
    (
        [TRAIN, "data.global_batch_size=32", RAMP_UP.format(2, 6, 10)],
        {"data.ramp_up.start", "data.ramp_up.increment"},
    ),
    ([TRAIN, "data.global_batch_size=32", "parallel=dp2", RAMP_UP.format(8, 4, 10)], {"data.ramp_up.increment"}),
    (
        [TRAIN, "data.global_batch_size=32", "parallel=pp2_vp2", RAMP_UP.format(4, 4, 9)],
        {"data.ramp_up.start", "data.ramp_up.increment"},
    ),
    ([TRAIN, "data.ramp_up={start:0,increment:4,samples:8}"], {"data.ramp_up.start"}),
    ([*EVALUATE, RAMP_UP.format(4, 4, 10)], {"data.ramp_up"}),
    ([TRAIN, "optimizer.overlap_param_gather=true"], {"optimizer.overlap_param_gather"}),
    ([TRAIN, "optimizer=adam_distributed", "optimizer.overlap_grad_reduce=false"], {"optimizer.overlap_param_gather"}),
    ([TRAIN, "optimizer=sgd", "optimizer.distributed=true"], {"optimizer.distributed"}),
    # out of scope
    (["parallel.cp=2"], {"parallel.cp"}),
    (["parallel.context_parallel_size=2"], {"parallel.context_parallel_size"}),
    (["parallel.ep=2"], {"parallel.ep"}),
    (["parallel.expert_parallel=2"], {"parallel.expert_parallel"}),
    (["model.num_experts=8"], {"model.num_experts"}),
    # learning rate
    (["lr_schedule.warmup_steps=40", "lr_schedule.decay_steps=40"], {"lr_schedule.warmup_steps"}),
    # data and tokenizer
    (["data=text"], {"data.path"}),
    (["data=text", "data.path=nowhere/at/all"], {"data.path"}),
    (["data=jsonl", "data.path=nowhere.jsonl"], {"data.path"}),
    (["data=jsonl", "data.path=[one,two]"], {"data.path"}),
    (["data=huggingface"], {"data.path"}),
    (["data=megatron"], {"data.path"}),
    ([TRAIN, "data=megatron", "data.path=nowhere"], {"data.path", "tokenizer.kind"}),
    (
        [TRAIN, "data=megatron", "data.path=[nowhere,there]", "data.weights=[1.0]", "data.validation_path=held_out"],
        {"data.path", "data.weights", "data.validation_path", "tokenizer.kind"},
    ),
    (["data.weights=[1.0]"], {"data.weights"}),
    (["task=prepare_data"], {"prepare.output"}),
    (["task=prepare_data", "data=megatron", "data.path=gone", "prepare.output=out"], {"data.source", "data.path"}),
    (["task=prepare_data", "prepare.output=out", "data.sequence_length=64"], {"data.sequence_length"}),
    (["task=prepare_data", "prepare.output=out", "parallel.pp=2"], {"parallel.pp"}),
    ([TRAIN, "prepare.workers=2"], {"prepare.workers"}),
    (["data.subset=small"], {"data.subset"}),
    (["data=megatron", "data.path=nowhere", "tokenizer.vocab_size=300"], {"data.path", "tokenizer.kind", "tokenizer.vocab_size"}),
    (["data.split=[1.0]"], {"data.split"}),
    (["data.split=[0.0,1.0]"], {"data.split"}),
    (["data.split=[1.0,0.0]"], {"data.split"}),
    (["tokenizer=file"], {"tokenizer.path"}),
    (["tokenizer=file", "tokenizer.path=nowhere.json"], {"tokenizer.path"}),
    (["tokenizer.vocab_size=null"], {"tokenizer.vocab_size"}),
    # decoding
    (["exit_policy=patience", "exit_policy.threshold=1.5"], {"exit_policy.threshold"}),
    (["exit_policy=patience", "exit_policy.threshold=0"], {"exit_policy.threshold"}),
    (["exit_policy.threshold=1.1"], {"exit_policy.threshold"}),
    (["exit_policy=entropy", "exit_policy.threshold=[0.1,0.2,-0.3]"], {"exit_policy.threshold"}),
    (["exit_policy.threshold=[0.5,0.5]"], {"exit_policy.threshold"}),
    (["exit_policy.active=[2,6]", "exit_policy.threshold=[0.5,0.5,0.5]"], {"exit_policy.threshold"}),
    (["exit_policy.active=[3]"], {"exit_policy.active"}),
    (["exit_policy.active=[6,2]"], {"exit_policy.active"}),
    (["exit_policy=fixed_layer", "exit_policy.layer=3"], {"exit_policy.layer"}),
    (["exit_policy=fixed_layer", "exit_policy.layer=null"], {"exit_policy.layer"}),
    (["exit_policy=fixed_layer", "exit_policy.layer=4", "exit_policy.active=[2,6]"], {"exit_policy.layer"}),
    (["decoding.prompts=[]"], {"decoding.prompts"}),
    # the server
    ([*SERVE, "serve.decodings=[catch_up,pipeline]"], {"serve.decodings"}),
    ([*SERVE, "serve.decodings=[full]"], {"serve.decodings"}),
    ([*SERVE, "exit_policy=never"], {"decoding.mode"}),
    ([*SERVE, "exit_policy=never", "decoding=full", "serve.decodings=[full,self_speculative]"], {"serve.decodings"}),
    ([*SERVE, "parallel=pp2"], {"decoding.mode"}),
    ([*SERVE, "decoding=pipeline"], {"decoding.mode"}),
    ([*SERVE, "parallel=dp2"], {"parallel.dp"}),
    ([*SERVE, "serve.api_key_file=nowhere", "serve.chat_template=nowhere"], {"serve.api_key_file", "serve.chat_template"}),
    ([*SERVE, "decoding.max_new_tokens=50", "serve.max_new_tokens=40"], {"decoding.max_new_tokens"}),
    ([*SERVE, "serve.max_queue=3", "decoding.max_batch=2", "serve.max_choices=6"], {"serve.max_choices"}),
    ([*SERVE, "serve.port=70000", "serve.request_timeout=0"], {"serve.port", "serve.request_timeout"}),
    ([*SERVE, "decoding.prompts=[a]", "evaluation.batches=2"], {"decoding.prompts", "evaluation.batches"}),
    (["serve.port=1"], {"serve.port"}),
    (["evaluation.thresholds=[]"], {"evaluation.thresholds"}),
    (["decoding.top_k=5"], {"decoding.top_k"}),
    ([*GENERATE, "decoding=full", "exit_policy.threshold=0.5"], {"exit_policy.threshold"}),
    # calibrating
    ([*CALIBRATE, "exit_policy=margin"], {"exit_policy.kind"}),
    (
        [*CALIBRATE, "exit_policy.threshold=0.5", "exit_policy.min_new_tokens=1"],
        {"exit_policy.threshold", "exit_policy.min_new_tokens"},
    ),
    ([*CALIBRATE, "calibration.thresholds=[]"], {"calibration.thresholds"}),
    ([*CALIBRATE, "calibration.thresholds=[0.5,0.9]"], {"calibration.thresholds"}),
    ([*CALIBRATE, "calibration.thresholds=[0.9,0.9]"], {"calibration.thresholds"}),
    ([*CALIBRATE, "calibration.thresholds=[[0.9,0.8],[0.8,0.85]]"], {"calibration.thresholds"}),
    ([*CALIBRATE, "calibration.thresholds=[[0.9,0.8,0.7]]"], {"calibration.thresholds"}),
    ([*CALIBRATE, "calibration.epsilon=0"], {"calibration.epsilon"}),
    ([*CALIBRATE, "calibration.delta=1"], {"calibration.delta"}),
    ([*CALIBRATE, "calibration.thresholds=[1.5]"], {"calibration.thresholds[0]"}),
    ([*CALIBRATE, "exits=none"], {"exits"}),
    ([*EVALUATE, "calibration.epsilon=0.1"], {"calibration.epsilon"}),
    (["exit_policy.calibration=RUN"], {"exit_policy.calibration"}),
    ([*GENERATE, "exit_policy=margin", "exit_policy.calibration=RUN"], {"exit_policy.calibration"}),
    ([*GENERATE, "decoding=self_speculative", "exit_policy=never"], {"exit_policy.kind"}),
    ([*GENERATE, "decoding.max_tokens=63"], {"decoding.max_tokens"}),
    ([*GENERATE, "decoding=self_speculative", "decoding.draft_length=-1"], {"decoding.draft_length"}),
    # what tasks can do
    ([*GENERATE, "parallel=dp2"], {"parallel.dp"}),
    ([*GENERATE, "parallel=pp2_vp2"], {"decoding.mode", "parallel.vp"}),
    ([*GENERATE, "parallel=tp2", "parallel.sequence_parallel=true"], {"parallel.sequence_parallel"}),
    ([*EVALUATE, "decoding=pipeline"], {"decoding.mode"}),
    ([*EVALUATE, "evaluation.decodings=[pipeline]"], {"evaluation.decodings"}),
    ([*EVALUATE, "parallel=pp2", "evaluation.decodings=[pipeline,catch_up]"], {"evaluation.decodings"}),
    ([*EVALUATE, "parallel=pp2_vp2", "decoding=pipeline"], {"parallel.vp"}),
    ([*EVALUATE, "parallel=pp2", "parallel.dp=2", "decoding=pipeline"], {"parallel.dp"}),
    ([*EVALUATE, "parallel=tp2_pp2", "parallel.sequence_parallel=true", "decoding=pipeline"], {"parallel.sequence_parallel"}),
    ([*EVALUATE, "parallel=pp2", "decoding=pipeline", "exit_policy=never"], {"exit_policy.kind"}),
    ([*EVALUATE, "parallel=pp2", "decoding=pipeline", "exit_policy.active=[]"], {"exit_policy.active"}),
    ([*EVALUATE, "parallel=pp2", "decoding=pipeline", "decoding.max_pending=4"], {"decoding.max_pending"}),
    ([*GENERATE, "parallel=pp2_vp2", "decoding=pipeline"], {"parallel.vp"}),
    ([*GENERATE, "parallel=pp2", "parallel.dp=2", "decoding=pipeline"], {"parallel.dp"}),
    ([*GENERATE, "parallel=pp2"], {"decoding.mode"}),
    ([*GENERATE, "parallel=pp2", "decoding=kv_recompute"], {"decoding.mode"}),
    ([*GENERATE, "parallel=pp2", "decoding=self_speculative"], {"decoding.mode"}),
    ([*GENERATE, "decoding=pipeline"], {"decoding.mode"}),
    ([*GENERATE, "parallel=tp2", "decoding=pipeline"], {"decoding.mode"}),
    (["parallel=pp2", "decoding=pipeline"], {"decoding.mode"}),
    (["parallel=pp2", "evaluation.decodings=[pipeline]"], {"evaluation.decodings"}),
    ([*GENERATE, "parallel=pp2", "decoding=full", "exit_policy.threshold=0.5"], {"exit_policy.threshold"}),
    ([*GENERATE, "parallel=pp2", "decoding=pipeline", "decoding.max_pending=4"], {"decoding.max_pending"}),
    ([*GENERATE, "parallel.pp=3", "decoding=pipeline"], {"model.num_layers"}),
    (["checkpoint=RUN"], {"checkpoint"}),
    ([TRAIN, "checkpoint=RUN", "model.num_layers=8", "tokenizer.vocab_size=300"], {"model.num_layers", "tokenizer.vocab_size"}),
    (["resume=auto"], {"resume"}),
    ([TRAIN, "checkpoint=RUN", "resume=RUN"], {"checkpoint"}),
    # overrides that nobody reads
    ([TRAIN, "decoding.max_new_tokens=5"], {"decoding.max_new_tokens"}),
    ([TRAIN, "exit_policy=margin"], {"exit_policy"}),
    (
        [*EVALUATE, "optimizer.lr=0.1", "trainer=smoke", "loss_weights.values=1"],
        {"optimizer.lr", "trainer", "loss_weights.values"},
    ),
    ([*GENERATE, "evaluation.batches=2", "data.split=[0.5,0.5]"], {"evaluation.batches", "data.split"}),
    (
        [*EVALUATE, "model.num_layers=8", "exits=none", "tokenizer.vocab_size=300"],
        {"model.num_layers", "exits", "tokenizer.vocab_size"},
    ),
    (["loss_weights.shape=cosine"], {"loss_weights.shape"}),
    (["optimizer=sgd", "optimizer.beta1=0.5"], {"optimizer.beta1"}),
    (["optimizer.momentum=0.5"], {"optimizer.momentum"}),
    (["data.path=README.md"], {"data.path"}),
    (["tokenizer.path=tokenizer.json"], {"tokenizer.path"}),
    (["precision.loss_scale_window=5"], {"precision.loss_scale_window"}),
    (["lr_schedule=constant", "lr_schedule.min_ratio=0.5"], {"lr_schedule.min_ratio"}),
    (["decoding=full", "decoding.max_pending=4"], {"decoding.max_pending"}),
    (["decoding=self_speculative", "decoding.max_pending=4"], {"decoding.max_pending"}),
    (["decoding=kv_recompute", "decoding.draft_length=4"], {"decoding.draft_length"}),
    (["exit_policy.layer=4"], {"exit_policy.layer"}),
    # comparing modes of decoding
    (
        [*EVALUATE, "decoding=full", "evaluation.speed_thresholds=[0.5]", "exit_policy=margin", "decoding.max_new_tokens=8"],
        {"evaluation.speed_thresholds", "exit_policy", "decoding.max_new_tokens"},
    ),
    ([*EVALUATE, "evaluation.decodings=[full]", "exit_policy=margin"], {"exit_policy"}),
    ([*EVALUATE, "evaluation.decodings=[catch_up]", "decoding=self_speculative"], {"decoding"}),
    ([*EVALUATE, "exit_policy.threshold=0.5", "decoding.prompts=[a]"], {"exit_policy.threshold", "decoding.prompts"}),
    ([*EVALUATE, "evaluation.decodings=[catch_up]", "decoding.draft_length=2"], {"decoding.draft_length"}),
    ([*EVALUATE, "evaluation.decodings=[catchup]"], {"evaluation.decodings[0]"}),
    ([*EVALUATE, "decoding.max_new_tokens=1"], {"decoding.max_new_tokens"}),
    (["decoding.max_new_tokens=1"], {"decoding.max_new_tokens"}),
    (["decoding=full", "decoding.max_new_tokens=1"], {"decoding.max_new_tokens"}),  # full depth has a speed as well
    # benchmarks
    (["task=benchmark", "exits=none"], {"exits.layers"}),
    (["task=benchmark", "checkpoint=RUN"], {"checkpoint"}),
    (["task=benchmark", "benchmark.batches=[2]", "decoding.max_new_tokens=8"], {"benchmark.batches", "decoding.max_new_tokens"}),
    (
        [*DECODING, "loss_weights=warmup", "trainer.recompute=full", "benchmark.in_flight=3", "data.micro_batch_size=3"],
        {"loss_weights", "trainer.recompute", "benchmark.in_flight", "data.micro_batch_size"},
    ),
    ([*DECODING, "decoding=full", "decoding.top_k=3"], {"decoding", "decoding.top_k"}),
    ([*DECODING, "benchmark.decodings=[catch_up]", "decoding.draft_length=2"], {"decoding.draft_length"}),
    ([*DECODING, "exit_policy.threshold=0.5"], {"exit_policy.threshold"}),
    ([*DECODING, "checkpoint=RUN", "model.num_layers=8", "exits=none"], {"model.num_layers", "exits"}),
    ([*DECODING, "parallel=pp2_vp2"], {"parallel.vp"}),
    ([*DECODING, "parallel=dp2"], {"parallel.dp"}),
    ([*DECODING, "decoding.max_new_tokens=1"], {"decoding.max_new_tokens"}),
    ([*DECODING, "model.attention=unfused"], {"model.attention"}),
    ([*DECODING, "benchmark.decodings=[catch_up,pipeline]"], {"benchmark.decodings"}),
    (
        [*DECODING, "parallel=pp2", "benchmark.decodings=[catch_up,pipeline]", "benchmark.batches=[2]"],
        {"benchmark.decodings", "benchmark.batches"},
    ),
    (
        [*DECODING, "parallel=pp2", "decoding.draft_length=2", "decoding.max_pending=4"],
        {"decoding.draft_length", "decoding.max_pending"},
    ),
    ([*DECODING, "parallel=pp2", "exits=none"], {"exits.layers"}),
    ([*DECODING, "parallel=pp2", "exit_policy=never"], {"exit_policy.kind"}),
    ([*DECODING, "parallel=pp2", "exit_policy.active=[]"], {"exit_policy.active"}),
    # tuning; RUN has exits after 1 and 3 of 4 layers
    (["task=tune"], {"checkpoint"}),
    (["task=tune", "exits=none", "parallel.pp=2"], {"checkpoint", "exits.layers"}),
    ([*TUNE, "exits.layers=[2,5]"], {"exits.layers"}),
    ([*TUNE, "exits.layers=[2]", "tuning.layers=[2,4]"], {"tuning.layers"}),
    ([*TUNE, "tuning.layers=[]"], {"tuning.layers"}),
    ([*TUNE, "exits.layers=[1,2]", "exits.head=[embedding,norm]"], {"exits.head"}),
    ([*TUNE, "exits.layers=[1,2]", "exits.head=[mlp]"], {"exits.head"}),
    ([*TUNE, "loss_weights.values=[0.1,0.2,0.3]"], {"loss_weights.values"}),
    ([*TUNE, "exits.layers=[1]", "parallel=pp2"], {"parallel.pp"}),
    ([*TUNE, "exits.layers=[2]", "parallel=pp2", "parallel.layers_per_stage=[2,2]"], {"parallel.layers_per_stage"}),
    (
        [*TUNE, "exits.deferred=false", "trainer.recompute=full", "loss_weights.final=1", "optimizer.overlap_grad_reduce=true"],
        {"exits.deferred", "trainer.recompute", "loss_weights.final", "optimizer.overlap_grad_reduce"},
    ),
    ([*TUNE, "model.num_layers=8", "decoding=full"], {"model.num_layers", "decoding"}),
    ([*TUNE, "data.split=[1.0,0.0]", "trainer.val_every=0"], {"data.split"}),
    (["task=benchmark", "benchmark=tuning", "exits.head=embedding"], {"exits.head"}),
    (["task=benchmark", "benchmark=tuning", "parallel=pp4", "exits.layers=[2]"], {"parallel.pp"}),
    ([*TUNE, "tuning=distillation", "tuning.hidden_cache=states"], {"tuning.hidden_cache"}),
    ([TRAIN, "tuning.evaluate=false"], {"tuning.evaluate"}),
    # resuming
    (["task=tune", "resume=RUN"], {"task"}),
    ([TRAIN, "resume=RUN", "model.num_layers=8", "exits=none", "seed=2"], {"model.num_layers", "exits", "seed"}),
    ([TRAIN, "resume=RUN", "data.sequence_length=32"], {"data.sequence_length"}),
    ([TRAIN, "resume=RUN", "precision=bf16"], {"precision"}),
]

FINE: list[list[str]] = [
    [*SERVE, "decoding.temperature=0", "decoding.top_p=0.9", "exit_policy.threshold=0.5", "decoding.max_tokens=100"],
    [*SERVE, "parallel=pp2", "decoding=pipeline", "serve.decodings=[full,pipeline]"],
    [*SERVE, "exit_policy=never", "decoding=full"],
    ["exits.layers=[2,8]"],  # an exit after the last layer, for tuning studies
    ["exits.layers=[0.25,0.5,1.0]"],
    ["exits=none"],
    [*TUNE, "exits.layers=[2,4]", "exits.head=[norm,block]", "loss_weights.values=[0.1,0.2]"],
    [*TUNE, "parallel=pp2"],  # three layers that run on two stages
    [*TUNE, "parallel=tp2_pp2", "parallel.sequence_parallel=true", "tuning=distillation"],
    [*TUNE, "data.split=[1.0,0.0]", "trainer.val_every=0", "tuning.evaluate=false"],
    [*TUNE, "exits.layers=[2]", "exits.head=embedding", "exits.tie_output=false", "optimizer=adam_distributed"],
    ["exits.head=[norm,mlp,block]", "exits.tie_output=[true,false,true]", "loss_weights.values=[0.1,0.2,0.3]"],
    [TRAIN, "parallel.pp=3", "parallel.layers_per_stage=[3,3,2]"],
    ["parallel=pp2"],  # the quickstart decodes on one rank afterwards
    [TRAIN, "parallel=tp2_pp2", "parallel.sequence_parallel=true"],
    [TRAIN, *BATCH, "parallel=dp2", "optimizer=adam_distributed"],
    [TRAIN, "data.split=[1.0,0.0]", "trainer.val_every=0"],
    ["trainer.max_steps=5"],  # shorter than its warm-up
    ["exit_policy=patience", "exit_policy.threshold=2.0"],
    ["exit_policy.active=[2,6]", "exit_policy.threshold=[0.5,0.6]"],
    ["decoding.temperature=0.8", "decoding.top_k=5"],
    [*EVALUATE, "data.micro_batch_size=4", "trainer.loss_chunk=64"],
    [*GENERATE, "exit_policy=fixed_layer", "exit_policy.layer=3"],
    [*GENERATE, "parallel.tp=2"],
    [*GENERATE, "parallel=pp4", "decoding=pipeline", "exit_policy=patience", "exit_policy.threshold=2"],
    [*GENERATE, "parallel=tp2_pp2", "decoding=pipeline", "parallel.layers_per_stage=[3,1]", "exit_policy.threshold=[0.5,0.6]"],
    [*GENERATE, "parallel=pp2", "decoding=full"],
    [*GENERATE, "decoding.max_new_tokens=1"],
    [*CALIBRATE, "parallel=pp2", "exit_policy.active=[3]", "data.split=[0.0,1.0]"],
    [*CALIBRATE, "calibration.thresholds=[1.0,[0.9,0.8],[0.9,0.7],0.5]"],
    [*GENERATE, "decoding=self_speculative", "decoding.draft_length=auto", "decoding.max_batch=3"],
    [*GENERATE, "decoding=self_speculative", "decoding.draft_length=0", "decoding.max_tokens=64"],
    [*GENERATE, "decoding=kv_recompute", "decoding.max_pending=2"],
    [*EVALUATE, "decoding=self_speculative", "decoding.draft_length=2", "evaluation.speed_thresholds=[0.5]"],
    [*EVALUATE, "evaluation.decodings=[catch_up,self_speculative]", "decoding.draft_length=2", "exit_policy=margin"],
    [*EVALUATE, "decoding=full", "parallel=pp2"],
    [*EVALUATE, "decoding=pipeline", "parallel=pp2", "evaluation.speed_thresholds=[0.5]", "exit_policy=margin"],
    [*EVALUATE, "evaluation.decodings=[full,pipeline]", "parallel=tp2_pp2", "decoding.max_new_tokens=8"],
    [*EVALUATE, "evaluation.decodings=[catch_up]", "parallel=pp2_vp2"],  # on the main rank
    [*DECODING, "exits=none", "parallel=tp2"],
    [*DECODING, "exit_policy=never"],
    [*DECODING, "parallel=pp2", "exits.boundary=start", "decoding.max_new_tokens=8"],
    [*DECODING, "parallel=pp2", "benchmark.decodings=[pipeline]", "benchmark.thresholds=[0.5]"],
    [*DECODING, "exit_policy.active=[]"],  # full depth alone
    [*DECODING, "decoding.draft_length=2", "decoding.max_pending=4", "exit_policy=fixed_layer", "exit_policy.layer=6"],
    [*DECODING, "checkpoint=RUN", "exit_policy.threshold=0.5", "benchmark.batches=[2]", "benchmark.thresholds=[0.5]"],
    [TRAIN, "resume=auto"],
    [TRAIN, "data.global_batch_size=32", "parallel=pp2_vp2", RAMP_UP.format(8, 24, 10)],
    [TRAIN, "resume=RUN", "trainer.max_steps=9", "parallel=pp2"],
    [TRAIN, "resume=RUN", "exits.layers=[1,3]", "model.num_layers=4", "seed=1", "exits.boundary=start", "parallel=pp2"],
    [TRAIN, "checkpoint=RUN", "exits.layers=[1,2,3]", "exits.init=copy", "parallel=pp2"],
    [TRAIN, "checkpoint=RUN", "resume=auto", "data.sequence_length=32"],
]


def given(overrides: list[str], run: Path) -> list[str]:
    return [override.replace("RUN", str(run)) for override in overrides]


@pytest.mark.parametrize(("overrides", "paths"), BROKEN, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_broken_rule_names_the_path(overrides: list[str], paths: set[str], saved_run: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(given(overrides, saved_run))
    problems = raised.value.problems
    assert {problem.path for problem in problems} == paths
    for problem in problems:
        assert problem.reason
        assert problem.fix
        assert str(problem) in str(raised.value)


@pytest.mark.parametrize("overrides", FINE, ids=" ".join)
def test_what_no_rule_forbids_passes(overrides: list[str], saved_run: Path) -> None:
    compose(given(overrides, saved_run))


@pytest.mark.parametrize(
    ("overrides", "world_size", "path"),
    [
        ([TRAIN, *BATCH, "parallel.pp=2"], 3, "parallel.pp"),
        ([TRAIN, *BATCH, "parallel.dp=2"], 4, "parallel.dp"),
        ([TRAIN, *BATCH], 4, "data.global_batch_size"),
        (GENERATE, 2, "parallel.dp"),
    ],
)
def test_the_ranks_of_an_outer_launcher_must_fit(overrides: list[str], world_size: int, path: str, saved_run: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(given(overrides, saved_run), world_size)
    assert [problem.path for problem in raised.value.problems] == [path]
    compose([TRAIN, *BATCH, "parallel.pp=2"], 4)


def test_the_cuda_kernel_is_refused_for_every_reason_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_cuda_available", lambda: False)
    with pytest.raises(ConfigError) as raised:
        compose(["model.attention=flash_attn", "data.document_boundaries=reset"])
    assert [problem.path for problem in raised.value.problems] == ["model.attention"] * 3
    monkeypatch.setattr(model, "_cuda_available", lambda: True)
    compose(["model.attention=flash_attn", "precision=bf16"])


def test_problems_of_all_kinds_come_in_one_error() -> None:
    overrides = [
        "optimizer.lr=-1",
        "model.norm=rmsnrm",
        "optimizer.learning_rate=1",
        "exits.layers=[9]",
        "data.global_batch_size=7",
    ]
    overrides += ["loss_weights.values=[1,2,3,4]"]
    with pytest.raises(ConfigError) as raised:
        compose(overrides)
    # the model did not parse, so what depends on it is not checked: exits.layers would be a guess
    expected = {"optimizer.lr", "model.norm", "optimizer.learning_rate", "data.global_batch_size", "loss_weights.values"}
    assert {problem.path for problem in raised.value.problems} == expected


def test_values_of_an_experiment_may_go_unread(saved_run: Path) -> None:
    config = compose(["experiment=pp2_laptop", "task=evaluate", f"checkpoint={saved_run}"])
    assert config.task.name == "evaluate"
    with pytest.raises(ConfigError):
        compose(["experiment=pp2_laptop", "task=evaluate", f"checkpoint={saved_run}", "trainer.max_steps=3"])


def test_every_rule_is_listed() -> None:
    modules = [importlib.import_module(f"{rules.__name__}.{module.name}") for module in pkgutil.iter_modules(rules.__path__)]
    functions = [value for module in modules for value in vars(module).values() if inspect.isfunction(value)]
    written = {function for function in functions if inspect.signature(function).return_annotation == "Problems"}
    assert written == set(validate.RULES)


def test_the_tables_name_keys_that_exist() -> None:
    from eellm.config.request import READ_WITH, TASK_READS

    keys = known_keys()
    for read in {read for reads in TASK_READS.values() for read in reads}:
        assert any(key == read or key.startswith(f"{read}.") for key in keys), read
    for named, choice, _ in READ_WITH:
        assert choice in keys
        assert all(any(key == name or key.startswith(f"{name}.") for key in keys) for name in named)
