"""The configuration as types: what every key means, its type and its range.

YAML under ``conf/`` composes and carries every default value; these classes only validate. A config is
built once (`eellm.config.compose.validated`), is frozen from then on, and is the only form in which
library code sees it. Cross-field rules live in `eellm.config.validate`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from eellm.config.node import Count, DecodingMode, FolderName, Fraction, HeadKind, Node, NonNegative, Positive
from eellm.config.planning import DeviceProfileConfig, PlanConfig
from eellm.config.task_options import (
    BenchmarkConfig,
    CalibrationConfig,
    ConvertConfig,
    PrepareConfig,
    ReportConfig,
    ServeConfig,
    TuningConfig,
)

TaskName = Literal[
    "quickstart",
    "train",
    "tune",
    "evaluate",
    "calibrate",
    "generate",
    "benchmark",
    "prepare_data",
    "serve",
    "convert",
    "plan",
    "report",
]


class TaskConfig(Node):
    name: TaskName
    """What to do: `quickstart` = train, evaluate and decode in one go."""


class RotaryScalingConfig(Node):
    """How a model's rotary positions were stretched to texts longer than those it was first trained on."""

    kind: Literal["linear", "llama3"]
    """`linear`: every frequency is divided by `factor`; `llama3`: the low ones are, with a smooth passage to the high ones."""
    factor: Annotated[float, Field(ge=1.0)]
    """How much longer."""
    low_frequency_factor: Positive | None = None
    """Of `llama3`: what turns less often than this over `original_positions` is divided whole."""
    high_frequency_factor: Positive | None = None
    """Of `llama3`: what turns more often than this over `original_positions` stays as it is."""
    original_positions: Count | None = None
    """Of `llama3`: tokens of the texts that it was first trained on."""


class ModelConfig(Node):
    num_layers: Count
    """Decoder layers of the backbone."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Query heads."""
    num_query_groups: Count | None
    """Key/value heads (grouped-query attention); null = one per query head."""
    head_dim: Count | None
    """Width of one attention head; null = hidden_size / num_attention_heads."""
    ffn_hidden_size: Count | None
    """Inner width of the MLP; null = 4 x hidden (8/3 x hidden rounded to 64 when gated)."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "squared_relu"]
    """MLP activation; `swiglu` and `geglu` are gated."""
    norm: Literal["rmsnorm", "layernorm"]
    """Kind of every normalisation."""
    norm_eps: Positive
    """Epsilon of every normalisation."""
    norm_placement: Literal["before", "after"]
    """Normalise a sub-layer's input (Llama) or its output before the residual sum (OLMo2)."""
    residual: Literal["sequential", "parallel"]
    """`parallel`: attention and MLP read the same input and are added together (GPT-NeoX)."""
    qk_norm: Literal["none", "head", "projection"]
    """Normalise queries and keys per head (Qwen3) or over the whole projection (OLMo2)."""
    position: Literal["rotary", "learned", "none"]
    """Position encoding."""
    rotary_fraction: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of each head's channels that rotates (GPT-NeoX: 0.25)."""
    rotary_base: Positive
    """Base of the rotary frequencies."""
    rotary_scaling: RotaryScalingConfig | None
    """Rotary positions stretched to longer texts, e.g. {kind: linear, factor: 2}; null = as they were."""
    max_positions: Count | None
    """Rows of the learned position table; null = data.sequence_length."""
    qkv_bias: bool
    """Bias on the query/key/value projection (Qwen2)."""
    linear_bias: bool
    """Bias on every other linear layer (GPT-2)."""
    sliding_window: Count | None
    """Tokens a query can look back at, itself included; null = all."""
    attention: Literal["sdpa", "flash_attn", "unfused", "transformer_engine"]
    """Attention kernel of training and evaluation; decoding has its own."""
    tie_embeddings: bool
    """The final head's output matrix is the input embedding."""
    vocab_size: Count | None
    """Entries of the vocabulary; null = the tokenizer's."""
    vocab_multiple: Count
    """The embedding's rows are padded to a multiple of this; padded rows never take probability."""
    init_std: Positive
    """Standard deviation of random weights; output projections use it divided by sqrt(2 x num_layers)."""


class ExitsConfig(Node):
    layers: list[int | float]
    """Exit k is computed after this many layers (1-based), strictly increasing; floats are fractions of the depth."""
    head: HeadKind | list[HeadKind]
    """Head of the exits, or one each: `embedding` (output matrix), `norm` (+ norm), `mlp` (+ MLP), `block` (+ decoder layer)."""
    tie_output: bool | list[bool]
    """Use the model's output matrix (true) or an own one, for all exits or one per exit."""
    init: Literal["random", "copy"]
    """`copy`: norm and output matrix start as the final head's, the MLP as the same layer's, the block as the last layer;
    task=tune copies unless told otherwise."""
    temperature: Positive | list[Positive]
    """Exit logits are divided by this in the training loss and in the confidence."""
    boundary: Literal["end", "start", "balance"]
    """An exit on a stage boundary is computed at the end of the earlier stage, the start of the later, or where it balances."""
    deferred: bool
    """Compute an exit's forward inside the backward of its microbatch, so that logits of one microbatch exist at a time."""


class LossWeightsConfig(Node):
    kind: Literal["constant", "warmup", "cooldown", "rotating", "token_confidence"]
    """How exit weights depend on the step (or, for `token_confidence`, on the token)."""
    values: Annotated[float, Field(ge=0.0)] | list[Annotated[float, Field(ge=0.0)]]
    """Weight of the exits (the target, for warm-up): one number for all, or one per exit."""
    initial: Annotated[float, Field(ge=0.0)] | list[Annotated[float, Field(ge=0.0)]]
    """Weights at step 0 of a warm-up or cool-down."""
    steps: NonNegative
    """Steps of the warm-up or cool-down; steps per turn when rotating."""
    shape: Literal["linear", "cosine"]
    """Shape of the warm-up or cool-down."""
    final: Annotated[float, Field(ge=0.0)]
    """Weight of the final head."""


class ParallelConfig(Node):
    tp: Count
    """Tensor-parallel size."""
    pp: Count
    """Pipeline stages."""
    vp: Count
    """Model chunks per pipeline rank (virtual pipeline); 1 = none."""
    dp: Count | None
    """Data-parallel size; null = 1 locally, what is left of WORLD_SIZE under torchrun or srun."""
    sequence_parallel: bool
    """Split activations between tensor-parallel regions along the sequence."""
    layers_per_stage: list[Count] | Literal["balance"] | None
    """Layers of each of the pp x vp stages in order; null = equal, balance = the slowest stage as light as can be."""


class ScheduleConfig(Node):
    name: Literal["auto", "one_f_one_b", "interleaved", "gpipe", "bubble_filling", "csv"]
    """Pipeline schedule; `auto`: interleaved when vp > 1, one_f_one_b otherwise; `bubble_filling`: EE-LLM's partial microbatches
    in the bubbles of 1F1B, without its bias; `csv`: a program of your own."""
    engine: Literal["auto", "megatron", "executor"]
    """What runs it: megatron-core's functions (1F1B, interleaved) or the executor of programs; `auto`: the first that can."""
    path: str | None
    """File of `csv`: a row for each pipeline rank, cells such as F0 and B0.1 (`eellm/schedule/csv_file.py`)."""
    backward_forward_ratio: Positive | None
    """Of `bubble_filling`: time of a backward pass over that of a forward pass; the microbatches that fit follow from it. null =
    as `device_profile` has it."""
    part_one: NonNegative | None
    """Of `bubble_filling`: microbatches in the warm-up bubble, at most those that fit; null = those."""
    part_two: NonNegative | None
    """Of `bubble_filling`: the same of the cool-down bubble."""


class RampUpConfig(Node):
    """Megatron-LM's `--rampup-batch-size`; the final size is data.global_batch_size."""

    start: Count
    """Sequences of the first step."""
    increment: Count
    """Sequences by which a step grows, again and again."""
    samples: Count
    """Samples over which it grows, in equal shares."""


class DataConfig(Node):
    source: Literal["stdlib", "text", "jsonl", "chats", "huggingface", "megatron"]
    """`stdlib`: the interpreter's standard-library source; `text`: a file or folder; `jsonl`: one document a line; `chats`: one
    conversation a line, of which the assistant's answers count in the loss; `huggingface`: a data set of the `datasets`
    library; `megatron`: tokens in .bin/.idx files."""
    path: str | list[str] | None
    """File or folder for `text` and `jsonl`; name, file or folder for `huggingface`; prefix, or several, for `megatron`."""
    weights: list[Positive] | None
    """Shares of several prefixes in the training samples; null = every prefix by its size."""
    validation_path: str | list[str] | None
    """Prefixes that are held out as they are; null = held out of `path` by `split`."""
    subset: str | None
    """Subset (configuration) of a Hugging Face data set."""
    hf_split: str
    """Split of a Hugging Face data set that is read."""
    include_tests: bool
    """Of `stdlib`: the library's own tests as well, three times as much text in all; not every distribution ships them."""
    pattern: str
    """Glob of the files read from a folder."""
    text_field: str
    """Field of a JSON line, or column of a data set, that holds the text; of `chats`, the messages."""
    split: list[Annotated[float, Field(ge=0.0)]]
    """Shares of the documents for training and validation; normalised to sum 1."""
    sequence_length: Count
    """Tokens per sequence."""
    micro_batch_size: Count
    """Sequences per microbatch and data-parallel rank."""
    global_batch_size: Count
    """Sequences per optimizer step over all ranks."""
    ramp_up: RampUpConfig | None
    """Training begins with smaller batches, e.g. {start: 16, increment: 8, samples: 5000}; null = it does not."""
    document_boundaries: Literal["ignore", "loss", "reset"]
    """At a document's end: nothing; no loss across it; or also fresh positions and attention."""
    cache_dir: str
    """Folder of tokenizers and tokenised corpora, keyed by content."""
    num_workers: NonNegative
    """Loader processes per rank."""


class TokenizerConfig(Node):
    kind: Literal["byte_bpe", "file"]
    """`byte_bpe`: trained on the corpus, cached by content; `file`: read from `path`."""
    vocab_size: Annotated[int, Field(ge=260)] | None
    """Vocabulary of a trained tokenizer."""
    path: str | None
    """For `file`: tokenizer.json, SentencePiece's .model, GPT-2's vocab.json (merges.txt beside it), or a folder with one."""
    end_of_document: str | None
    """For `file`: the entry that ends a document; null = a known one (<|endoftext|>, </s>, ...), or else one more entry."""
    train_megabytes: Positive
    """Text used to train the tokenizer."""


class OptimizerConfig(Node):
    name: Literal["adam", "sgd"]
    """`adam` is AdamW (decoupled weight decay)."""
    lr: Positive
    """Peak learning rate."""
    beta1: Fraction
    beta2: Fraction
    eps: Positive
    momentum: Fraction
    """Of `sgd`."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """Applied to matrices, not to norms and biases."""
    clip_grad: Annotated[float, Field(ge=0.0)]
    """Global gradient norm to clip to; 0 = off."""
    distributed: bool
    """Shard optimizer states over data-parallel ranks."""
    overlap_grad_reduce: bool
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool
    """Gather updated parameters while the forward pass runs; needs `distributed`."""


class LrScheduleConfig(Node):
    kind: Literal["cosine", "linear", "inverse_sqrt", "constant"]
    """Decay after the warm-up."""
    warmup_steps: NonNegative
    """Steps of the linear warm-up from 0."""
    decay_steps: Count | None
    """Step at which the decay reaches `min_ratio`; null = trainer.max_steps (a run that ends within its warm-up never decays)."""
    min_ratio: Fraction
    """Lowest learning rate as a share of optimizer.lr."""


class PrecisionConfig(Node):
    dtype: Literal["fp32", "bf16", "fp16"]
    """Type of weights and activations; optimizer states and main gradients are fp32."""
    initial_loss_scale: Positive
    """First loss scale of fp16; it then follows overflows."""
    loss_scale_window: Count
    """Steps without overflow before the loss scale doubles."""


class TrainerConfig(Node):
    max_steps: Count
    """Optimizer steps."""
    val_every: NonNegative
    """Steps between validations; 0 = never."""
    val_batches: Count
    """Global batches per validation."""
    log_every: Count
    """Steps between logged metrics."""
    checkpoint_every: NonNegative
    """Steps between checkpoints; 0 = only at the end."""
    keep_checkpoints: Count
    """Newest checkpoints kept."""
    checkpoint_async: bool
    """Write checkpoints in a process of their own while training goes on."""
    max_nonfinite_steps: NonNegative
    """Steps with a NaN or infinite loss or gradient that are skipped, weights untouched, before the run stops with an error."""
    recompute: Literal["none", "selective", "full"]
    """Recompute nothing, attention, or whole layers in the backward pass."""
    loss_chunk: Count
    """Tokens whose logits exist at a time in the cross-entropy."""
    progress: Literal["auto", "bar", "lines", "none"]
    """`auto`: a bar on a terminal, lines elsewhere."""


class EvaluationConfig(Node):
    name: Literal["exits", "lm_eval"]
    """`exits`: every exit on held-out text; `lm_eval`: tasks of lm-evaluation-harness (extra `eval`) by mode and threshold."""
    batches: Count
    """Held-out global batches to evaluate."""
    thresholds: list[Fraction]
    """Confidence thresholds of the trade-off table; of `lm_eval`, those at which tasks are answered."""
    decodings: list[DecodingMode] | None
    """Modes of decoding that are set against full depth; null = decoding.mode, [] = none."""
    speed_thresholds: list[Fraction]
    """Thresholds at which decoding is timed against full depth."""
    calibration_bins: Count
    """Bins of the expected calibration error."""
    tasks: list[str]
    """Tasks, groups and tags of the harness or of `include_path`."""
    include_path: str | None
    """Folder with tasks of your own as the harness's YAML files."""
    limit: Count | None
    """Documents of each task, for a try; null = all."""
    num_fewshot: NonNegative | None
    """Examples before each question; null = as each task says."""
    batch_size: Count
    """Texts scored in one forward; generation takes decoding.max_batch."""
    bootstrap: NonNegative
    """Resamplings for standard errors that have no formula; 0 = none of those."""

    def compared_modes(self, chosen: DecodingMode) -> list[DecodingMode]:
        """What is timed against full depth where `chosen` is decoding.mode."""
        return [mode for mode in ([chosen] if self.decodings is None else self.decodings) if mode != "full"]


class DecodingConfig(Node):
    mode: DecodingMode
    """`full`: every token through all layers; `catch_up`: tokens exit early, their states pass the later layers later;
    `kv_recompute`: they pass all layers again with the next token; `pipeline`: they pass later stages while the next token
    is under way; `self_speculative`: exits draft, the full model verifies."""
    prompts: list[str]
    """Texts to continue."""
    max_new_tokens: Count
    """Tokens to generate per prompt."""
    max_batch: Count
    """Prompts continued side by side; each takes memory for the keys and values of `max_tokens`."""
    max_tokens: Count | None
    """Tokens of a prompt and its continuation at most; null = as many as the prompts at hand need."""
    draft_length: NonNegative | Literal["auto"]
    """Tokens that exits draft before the full model verifies them; auto = as many as pay, down to none."""
    max_pending: NonNegative | None
    """Tokens that may wait at exits before all layers are forced; 0 = never exit; null = no bound."""
    temperature: Annotated[float, Field(ge=0.0)]
    """0 = greedy."""
    top_k: NonNegative
    """Sample from the k most probable tokens; 0 = all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    """Sample from the smallest set with this probability."""
    stop: list[str]
    """Texts that end a generation."""
    stop_at_eos: bool
    """End a generation at the end-of-document token."""
    compile: bool
    """Compile steps on the CPU, with its C++ compiler: a minute at first, then faster where layers are small."""


class ExitPolicyConfig(Node):
    kind: Literal["max_probability", "margin", "entropy", "patience", "fixed_layer", "never"]
    """What makes an exit confident enough."""
    threshold: float | list[float]
    """For all exits or one per active exit: probability, margin, normalised entropy (exit below it), or agreeing exits."""
    layer: Count | None
    """Exit of `fixed_layer`."""
    active: list[int] | None
    """Layers of the exits that are evaluated; null = all."""
    calibration: str | None
    """A run of task=calibrate, or its calibration.json, to take thresholds and active exits from; null = as given here."""
    min_new_tokens: NonNegative
    """Tokens generated at full depth first."""


class WandbConfig(Node):
    mode: Literal["off", "online", "offline"]
    """Mirror metrics to wandb; never asks to log in, never stops a run."""
    project: str
    entity: str | None
    group: str | None
    """null = the study's or run's name."""
    tags: list[str]


class LoggerConfig(Node):
    csv: bool
    """Mirror metrics.jsonl as metrics.csv."""
    wandb: WandbConfig


class DebugConfig(Node):
    detect_anomaly: bool
    """Run autograd's anomaly detection."""
    profile: bool
    """Write a torch profiler trace of a few steps."""
    overfit: bool
    """Repeat the first batch."""
    timeline: bool
    """Draw when the passes of the last step happened on each pipeline rank, beside the simulated schedule."""


class StudyConfig(Node):
    name: FolderName
    """Folder under multirun/ of a study's runs."""


class Config(Node):
    """One run. See `conf/config.yaml` for the values behind `python run.py`."""

    name: FolderName
    """Name of the run; part of its output folder."""
    seed: NonNegative
    """Seed of weights, data order and sampling."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto`: CUDA where there is any."""
    checkpoint: str | None
    """Run directory to read a model from, or `reference`: the one that comes with eellm, which is also read where a task needs
    a model and is given none; with task=train, whose weights to begin with; with task=tune, whose exits to tune."""
    resume: str | None
    """Run directory to continue, or `auto`."""
    objective: str | list[str]
    """Final metric, or metrics, that a sweeper is told; which way each is good says `hydra.sweeper.direction`."""
    task: TaskConfig
    model: ModelConfig
    exits: ExitsConfig
    loss_weights: LossWeightsConfig
    parallel: ParallelConfig
    schedule: ScheduleConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    lr_schedule: LrScheduleConfig
    precision: PrecisionConfig
    trainer: TrainerConfig
    tuning: TuningConfig
    evaluation: EvaluationConfig
    calibration: CalibrationConfig
    decoding: DecodingConfig
    exit_policy: ExitPolicyConfig
    benchmark: BenchmarkConfig
    prepare: PrepareConfig
    serve: ServeConfig
    convert: ConvertConfig
    plan: PlanConfig
    report: ReportConfig
    device_profile: DeviceProfileConfig
    logger: LoggerConfig
    debug: DebugConfig
    study: StudyConfig | None

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, for tables and wandb."""
        return dict(_flatten(self.model_dump()))


def _flatten(node: dict[str, Any], prefix: str = "") -> Any:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
