"""What the numbers of a run say, in sentences: shared by the terminal and the page. Every claim is computed."""

from __future__ import annotations

import math

from eellm.drawing.number_text import TIMES, count, duration, fixed, listing, percent, perplexity, plural, threshold
from eellm.metrics.names import FINAL, VAL_LOSS, share_column
from eellm.metrics.tables import Cell
from eellm.report.run_record import RunRecord, TableRows
from eellm.report.setup import Setup, trained_steps

NEARLY_EQUAL = 0.03
"""Relative gap in loss between the first exit and the final head below which the heads count as nearly equal."""
FASTER = 1.03
"""Speedup from which early exit counts as paying: below it, it is within the noise of timing."""
FAITHFUL = 0.95
"""Agreement with full depth above which a speedup counts as nearly free."""
NOTABLE_COST = 0.1
"""Cost of asking the exits, as a share of all layers, from which it is given as a reason for slow early exit."""
HARDLY_ANY = 0.01
"""Share of tokens leaving early below which the thresholds were out of reach."""
TOKENS_PER_PARAMETER = 20
"""Training tokens per parameter of a compute-optimal model (Hoffmann et al. 2022, arXiv 2203.15556)."""


def title_words(setup: Setup) -> str:
    """The model in a few words."""
    layers = plural(setup.spec.num_layers, "layer")
    if not setup.spec.exits:
        return f"{layers}, no exits"
    return f"{layers}, {'exit' if len(setup.spec.exits) == 1 else 'exits'} after {_exit_list(setup)}"


def _exit_list(setup: Setup) -> str:
    return listing([str(layer) for layer in setup.spec.exit_layers])


def setup_words(setup: Setup) -> str:
    """What the title does not say of the model."""
    spec = setup.spec
    kinds = "/".join(sorted({exit_.head for exit_ in spec.exits}))
    exits = f", {kinds} heads at the exits" if kinds else ""
    return (
        f"Hidden size {spec.hidden_size:,}, {plural(spec.num_heads, 'attention head')}, {spec.vocab_size:,} vocabulary entries, "
        f"about {count(setup.parameters)} parameters{exits}."
    )


def layout_words(setup: Setup) -> str:
    """Processes and how the work is split over them."""
    layout = setup.layout
    if layout.world_size == 1:
        return "One process."
    sizes = {"tensor": layout.tp, "pipeline": layout.pp, "data": layout.dp}
    split = f" {TIMES} ".join(f"{name} parallel {size}" for name, size in sizes.items() if size > 1)
    chunks = f", {layout.vp} chunks per pipeline rank" if layout.vp > 1 else ""
    return f"{layout.world_size:,} processes: {split}{chunks}."


def run_words(record: RunRecord, setup: Setup | None) -> str:
    """How long the run was and how it ended."""
    parts = []
    steps = trained_steps(record)
    if steps:
        tokens = f" on {count(setup.tokens_after(steps))} tokens" if setup else ""
        parts.append(f"{plural(steps, 'step')}{tokens}")
    seconds = run_seconds(record)
    if seconds is not None and seconds >= 1:
        parts.append(duration(seconds))
    if record.status.get("state") in ("failed", "preempted"):
        parts.append(str(record.status["state"]))
    return ", ".join(parts)


def run_seconds(record: RunRecord) -> float | None:
    """Wall time from the start of the run to the last sign of it."""
    started = record.status.get("started")
    times = [row["time"] for row in record.rows if "time" in row]
    updated = record.status.get("updated")
    ends = [*times, *([updated] if isinstance(updated, (int, float)) else [])]
    if not isinstance(started, (int, float)):
        started = min(times, default=None)
    return max(ends) - started if ends and started is not None else None


def exit_words(record: RunRecord) -> list[str]:
    """How far the first exit is from the final head."""
    first, final = _first_and_final(record)
    if first is None or final is None:
        return []
    early, late = _number(first.get("loss")), _number(final.get("loss"))
    if early is None or late is None or late <= 0:
        return []
    gap = early - late
    layers = f" of {record.num_layers}" if record.num_layers else ""
    compared = f"{fixed(-gap)} below" if gap < 0 else f"{fixed(gap)} ({percent(gap / late, 1)}) above"
    sentences = [
        f"The first exit, after layer {record.layer_of(str(first['head']))}{layers}, has a loss of {fixed(early)} nats per token "
        f"on held-out text, {compared} the final head's {fixed(late)}; in perplexity, {perplexity(math.exp(early))} against "
        f"{perplexity(math.exp(late))}."
    ]
    agreement = _number(first.get("agreement"))
    if agreement is not None:
        sentences.append(f"The two agree on the most probable next token at {percent(agreement)} of the positions.")
    sentences.append(_verdict_on_gap(gap / late))
    return sentences


def _verdict_on_gap(relative: float) -> str:
    if relative < 0:
        return "Depth has not paid yet: the layers behind the first exit have not learnt to improve on it."
    if relative < NEARLY_EQUAL:
        return "So far the heads are nearly equal: a threshold decides little about quality here."
    return "The later layers do improve on the first exit: here a threshold trades quality against depth."


def speed_words(record: RunRecord, setup: Setup | None) -> list[str]:
    """Whether early exit pays at the thresholds that were measured."""
    measured = [row for row in record.early_exit if _number(row.get("speedup")) is not None]
    if not measured:
        return []
    best = max(measured, key=lambda row: _value(row, "speedup"))
    if _value(best, "speedup") < FASTER:
        sentence = (
            f"Early exit does not pay at the thresholds measured here: the fastest ({setting_words(best, record)}) runs at "
            f"{fixed(best['speedup'], 2)} times the speed of full depth{_depth_clause(best, record)}."
        )
        return [sentence, *_unsure_words(measured), *_cost_words(setup)]
    sentences = [
        f"At threshold {setting_words(best, record)} decoding is {fixed(best['speedup'], 2)} times as fast as at full "
        f"depth{_depth_clause(best, record)}{_agreement_clause(best)}."
    ]
    faithful = _fastest_faithful(measured)
    if faithful is None:
        sentences.append(
            f"No threshold that is faster than full depth keeps {percent(FAITHFUL)} of its tokens: what early exit gains in "
            "speed here, it takes from the text."
        )
    elif faithful is best:
        sentences.append("Early exit pays here.")
    else:
        sentences.append(
            f"Keeping at least {percent(FAITHFUL)} of the tokens as they are, the best is {fixed(faithful['speedup'], 2)} times "
            f"(threshold {setting_words(faithful, record)}): there early exit pays."
        )
    return sentences


def setting_words(row: dict[str, Cell], record: RunRecord) -> str:
    """The threshold of a row of speed_quality.csv, and the mode where several were measured."""
    mode = f", {row['decoding']}" if record.names_modes else ""
    return f"{threshold(row.get('threshold'))}{mode}"


def _fastest_faithful(rows: TableRows) -> dict[str, Cell] | None:
    faithful = [row for row in rows if _value(row, "agreement") >= FAITHFUL and _value(row, "speedup") >= FASTER]
    return max(faithful, key=lambda row: _value(row, "speedup"), default=None)


def _depth_clause(row: dict[str, Cell], record: RunRecord) -> str:
    if _number(row.get("mean_layers")) is None:
        return ""
    of = f" of {record.num_layers}" if record.num_layers else ""
    return f", with {fixed(row['mean_layers'], 1)}{of} layers before a token is emitted"


def _agreement_clause(row: dict[str, Cell]) -> str:
    if _number(row.get("agreement")) is None:
        return ""
    return f", and {percent(row['agreement'])} of the tokens are full depth's"


def _cost_words(setup: Setup | None) -> list[str]:
    if setup is None or setup.exit_cost_in_layers < NOTABLE_COST * setup.spec.num_layers:
        return []
    exits = plural(len(setup.asked_exits), "exit")
    return [
        f"One reason is the size of the model: to ask its {exits} is to read as many weights as "
        f"{fixed(setup.exit_cost_in_layers, 1)} of its {plural(setup.spec.num_layers, 'layer')} hold, because each exit "
        f"multiplies an output matrix of {setup.spec.vocab_size:,} rows. Exits weigh less in a wider and deeper model."
    ]


def _unsure_words(rows: TableRows) -> list[str]:
    """Said when thresholds were never met, which no number in the sentence before shows; drafts are not told apart."""
    rows = [row for row in rows if row.get("decoding") != "self_speculative"]
    left = [1 - share for row in rows if (share := _number(row.get(share_column(FINAL)))) is not None]
    if not left or max(left) >= HARDLY_ANY:
        return []
    return [f"Less than {percent(HARDLY_ANY)} of the tokens left early at any of them: no exit is that sure of itself yet."]


def outlook_words(record: RunRecord, setup: Setup | None) -> list[str]:
    """What a run that is meant to be used needs beyond this one; [] where this one has it."""
    steps = trained_steps(record)
    if setup is None or not steps or not setup.parameters:
        return []
    tokens = setup.tokens_after(steps)
    ratio = tokens / setup.parameters
    if ratio >= TOKENS_PER_PARAMETER:
        return []
    return [
        f"This run has seen {count(tokens)} tokens, {ratio:.2g} per parameter. About {TOKENS_PER_PARAMETER} are usual for "
        "a model meant for use, and published early-exit models saw more: EE-LLM trained 1.3 billion parameters on 300 billion.",
        "In its first minutes every head learns the same easy things, frequent tokens and short phrases, so the exits stay close "
        "together and their confidence says little.",
        "They draw apart with more steps, more text and more layers: raise trainer.max_steps, choose a larger model, give it "
        "your own text (data=text data.path=...).",
    ]


def summary_words(record: RunRecord, setup: Setup | None) -> list[str]:
    """The paragraphs at the top of the page and at the end of the terminal output."""
    paragraphs = [exit_words(record) or validation_words(record), speed_words(record, setup), outlook_words(record, setup)]
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def validation_words(record: RunRecord) -> list[str]:
    """The last validation losses, for a run without evaluation."""
    last = {head: curve.values[-1] for head, curve in record.curves(VAL_LOSS).items() if curve.values}
    if FINAL not in last:
        return []
    exits = [f"{head} {fixed(value)}" for head, value in last.items() if head != FINAL]
    others = f"; the exits' {listing(exits)}" if exits else ""
    return [f"The last validation loss of the final head is {fixed(last[FINAL])} nats per token{others}."]


def _first_and_final(record: RunRecord) -> tuple[dict[str, Cell] | None, dict[str, Cell] | None]:
    rows = {str(row["head"]): row for row in record.exits}
    exits = [head for head in record.heads if head != FINAL and head in rows]
    return (rows[exits[0]] if exits else None), rows.get(FINAL)


def _number(value: Cell) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _value(row: dict[str, Cell], column: str) -> float:
    """A cell as a number; minus infinity for nothing, so that it never is the best."""
    number = _number(row.get(column))
    return -math.inf if number is None else number
