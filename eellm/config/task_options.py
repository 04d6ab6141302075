"""The keys that single tasks read: calibrate, benchmark, prepare_data, serve, convert, tune, report. `schema` has the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eellm.config.node import Count, DecodingMode, Fraction, Node, NonNegative, OpenFraction, Positive


class CalibrationConfig(Node):
    risk: Literal["disagreement", "accuracy_loss"]
    """Share of a sequence's tokens that differ from the full model's, or that only the full model gets right."""
    epsilon: OpenFraction
    """Bound on the risk, the mean over sequences."""
    delta: OpenFraction
    """Probability that the bound may be broken, over the draw of the sequences."""
    batches: Count
    """Held-out global batches; more sequences certify lower thresholds."""
    thresholds: list[Fraction | list[Fraction]]
    """Confidence thresholds in the order in which they are tested, falling: for all exits, or one per active exit."""


class BenchmarkConfig(Node):
    name: Literal["training", "tuning", "planner", "decoding"]
    """`training`: what exits cost a training step, in time and memory; `tuning`: what a step costs that tunes them alone;
    `planner`: what a step takes against what task=plan says; `decoding`: how fast tokens come, and what that costs."""
    pairs: Count
    """Alternating repetitions of what is compared."""
    warmup: NonNegative
    """Repetitions before those that count."""
    in_flight: Annotated[int, Field(ge=2)]
    """Microbatches in flight up to which the growth of memory is measured."""
    decodings: list[DecodingMode]
    """Modes of decoding that are compared with full depth."""
    thresholds: list[Fraction]
    """Exit thresholds at which the modes' speed is set against their quality."""
    batches: list[Count]
    """Sequences decoded side by side."""


class PrepareConfig(Node):
    output: str | None
    """Prefix of the files that task=prepare_data writes."""
    workers: Count | None
    """Processes that tokenise; null = one for every core."""
    shard_megabytes: Positive
    """Text, in million characters, that one process tokenises at a time and that is not done again after an interruption."""


class ServeConfig(Node):
    host: str
    """Address to listen at; 127.0.0.1 is heard on this machine alone."""
    port: Annotated[int, Field(ge=0, le=65535)]
    """0 = any that is free."""
    api_key_file: str | None
    """File whose first line every request must bring along (`Authorization: Bearer ...`); null = nobody is asked for a key."""
    chat_template: str | None
    """Jinja file that turns messages into a prompt; null = the template that lies beside the model's tokenizer, if any."""
    decodings: list[DecodingMode] | None
    """Modes that a request may choose; null = all that the layout can run. All but `full` keep keys and values of their own."""
    max_queue: Count
    """Sequences that may wait for a slot; with more, requests are refused (429)."""
    max_body_bytes: Count
    """Size of a request."""
    max_connections: Count
    """Open connections of one client address; those beyond are closed at once. Behind a proxy all clients have the proxy's."""
    max_prompt_tokens: Count | None
    """Tokens of a prompt; null = what the model's positions leave room for."""
    prefill_chunk: Count
    """Tokens of prompts that one step takes beside the next tokens of other sequences; longer prompts take several steps."""
    max_new_tokens: Count
    """Tokens that a request may ask for; decoding.max_new_tokens is what it gets when it does not say."""
    max_choices: Count
    """Sequences of one request: its prompts times its `n`."""
    request_timeout: Positive
    """Seconds from a request's arrival to its last token; then it ends with an error."""
    rank_timeout: Positive
    """Seconds that ranks wait for each other, also while the model is read; then the service ends with an error."""
    log_prompts: bool
    """Write prompts into access.jsonl too."""


class ConvertConfig(Node):
    source: str | None
    """What is read. Of `format=eellm`: a folder that `transformers` wrote, a .gguf file, a name on the Hugging Face hub, or
    `smollm2` (SmolLM2-135M-Instruct out of a Python package), or a run, whose exits are edited; of `format=huggingface`: a run or
    one of its checkpoints."""
    target: str | None
    """Folder to write, which must not exist: it appears when it is whole."""
    format: Literal["eellm", "huggingface"]
    """`eellm`: a run that `checkpoint=` reads, with the exits that are asked for or else the source's; `huggingface`: what
    `transformers` loads."""
    move: dict[Count, Count] | None
    """Exits of the source that go elsewhere with all their weights, e.g. {6: 8}: from after layer 6 to after layer 8."""
    shard_gigabytes: Positive
    """Largest file of weights that `huggingface` writes."""


class DistillationConfig(Node):
    weight: Fraction
    """Share of an exit's loss that is its divergence from the final head, the rest being the text's; 0 = none."""
    temperature: Positive
    """Logits of both are divided by this in the divergence, on top of the exit's own temperature."""


class TuningConfig(Node):
    layers: list[Count] | None
    """Layers of the exits that are tuned; null = all that `exits` asks for. Further exits of the checkpoint stay as they are, and
    are listed in the run's `exits` too."""
    evaluate: bool
    """Evaluate the whole model, every exit beside the final head, before and after; needs room for all its layers."""
    distillation: DistillationConfig
    hidden_cache: str | None
    """Folder that keeps hidden states at exits, for further runs on the same model, text and seed with other heads; null = none.
    Takes s x h x 2 bytes per sample and exit with bf16. A run that finds all its samples there, and does not validate
    (trainer.val_every=0), builds no backbone."""
    hidden_cache_dtype: Literal["bf16", "fp32"]
    """How they are kept; in the type of `precision`, tuning from them is the same to the bit."""

    @property
    def runs_whole_model(self) -> bool:
        """Whether every pass goes up to the final head."""
        return self.distillation.weight > 0


class ReportConfig(Node):
    runs: str | list[str] | None
    """Folders whose runs are compared, with all that lies in them, e.g. multirun/loss_weights; or wandb://<entity>/<project>."""
    output: str | None
    """File to write; null = report.html in the task's own directory."""
