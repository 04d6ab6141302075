"""Rows of benchmark=decoding against arithmetic by hand: times from a list, bytes from the parameters' own sizes."""

from __future__ import annotations

import importlib.util
import math
import statistics

import pytest

from eellm.benchmark.decoding import modes_on
from eellm.benchmark.figure import Figure
from eellm.benchmark.speculation import Comparison
from eellm.benchmark.transformers_llama import is_llama, why_not
from eellm.decoding.policy import never_exit
from eellm.model.spec import ExitSpec
from tests import workers
from tests.benchmark import generating
from tests.benchmark.generating import NEW_TOKENS, PENDING, PROMPTS, SECONDS
from tests.decoding import oracle
from tests.decoding.models import policy, spec
from tests.decoding.test_decoder import weights

pytestmark = pytest.mark.dist

MODES = ("catch_up", "self_speculative")
SPEC = spec(activation="gelu")
"""No Llama, so that `transformers`, which may be installed or not, takes no part."""
TIMED = NEW_TOKENS - 1
FULL, BY_ROWS, PRODUCTS = (SECONDS[name][1:] for name in ("full", "by_rows", "products"))
CATCH_UP, SPECULATIVE = (SECONDS[name][1:] for name in ("catch_up", "self_speculative"))


def numel(prefix: str) -> int:
    return sum(array.size for name, array in weights(SPEC).items() if name.startswith(prefix))


def bytes_per_token() -> tuple[float, float]:
    """At full depth; and when every token leaves at the first exit but the one that finds `PENDING` waiting and takes
    them through the other layers. fp32; the exit is the output matrix alone; padded rows of it are not read."""
    layers = [numel(f"layers.{number}.") for number in (1, 2, 3, 4)]
    matrix = SPEC.vocab_size * SPEC.hidden_size
    full = sum(layers) + numel("heads.final.") + matrix
    deep = TIMED // (PENDING + 1)
    early = (TIMED - deep) * (layers[0] + matrix) + deep * full
    return 4.0 * full, 4.0 * early / TIMED


@pytest.fixture(scope="module")
def rows() -> dict[str, Figure]:
    figures = workers.run(1, generating.figures_of, SPEC, policy(SPEC, "fixed_layer", 0.0, (1,)), MODES)[0]
    return {figure.name: figure for figure in figures}


def test_the_rows(rows: dict[str, Figure]) -> None:
    assert list(rows) == [
        *("full/speed", "full/by_rows", "full/of_by_rows", "full/products", "full/of_products", "full/over_transformers"),
        *("catch_up/speedup", "catch_up/bound", "catch_up/of_bound", "self_speculative/speedup", "self_speculative/differing"),
        *(f"batch_{batch}/{mode}" for batch in (1, 2) for mode in ("full", *MODES)),
    ]


def test_full_depth_against_its_products(rows: dict[str, Figure]) -> None:
    assert rows["full/speed"].value == statistics.median(TIMED / seconds for seconds in FULL)
    for name, seconds in (("by_rows", BY_ROWS), ("products", PRODUCTS)):
        assert rows[f"full/{name}"].value == statistics.median(TIMED / taken for taken in seconds)
        ratios = sorted(products / full for products, full in zip(seconds, FULL, strict=True))
        row = rows[f"full/of_{name}"]
        assert row.interval is not None
        assert [row.interval.low, row.value, row.interval.high] == pytest.approx(ratios)
    row = rows["full/of_by_rows"]
    assert (row.target, row.meets, row.is_clear) == (0.8, False, False), "0.75, and up to 0.9"
    assert rows["full/of_products"].target is None


def test_early_exit_against_the_bytes_it_reads(rows: dict[str, Figure]) -> None:
    speedups = [full / own for full, own in zip(FULL, CATCH_UP, strict=True)]
    assert rows["catch_up/speedup"].value == pytest.approx(statistics.median(speedups))
    full, early = bytes_per_token()
    assert rows["catch_up/bound"].value == pytest.approx(full / early)
    of_bound = rows["catch_up/of_bound"]
    assert of_bound.value == pytest.approx(statistics.median(speedups) / (full / early))
    assert of_bound.target == 0.9
    assert of_bound.meets == (of_bound.value >= 0.9)


def test_speculation_loses_neither_time_nor_tokens(rows: dict[str, Figure]) -> None:
    row = rows["self_speculative/speedup"]
    assert row.value == pytest.approx(statistics.median(full / own for full, own in zip(FULL, SPECULATIVE, strict=True)))
    assert (row.target, row.meets) == (0.95, True)
    differing = rows["self_speculative/differing"]
    assert (differing.value, differing.target, differing.meets) == (0.0, 0.0, True)
    assert differing.label.endswith(f" {len(PROMPTS) * TIMED}")
    drafted = int(differing.note.split()[0])
    assert drafted >= len(PROMPTS) * TIMED / 2, "whatever the timed decoder has come to think of drafts"


def test_batches_count_all_their_tokens(rows: dict[str, Figure]) -> None:
    for mode, seconds in {"full": FULL, "catch_up": CATCH_UP, "self_speculative": SPECULATIVE}.items():
        one, two = (statistics.median(batch * TIMED / (batch * taken) for taken in seconds) for batch in (1, 2))
        assert (rows[f"batch_1/{mode}"].value, rows[f"batch_2/{mode}"].value) == pytest.approx((one, two))


def test_what_was_not_run_says_so(rows: dict[str, Figure]) -> None:
    row = rows["full/over_transformers"]
    assert (row.value, row.meets, row.note) == (None, None, "not run: no such architecture")
    assert row.target == 1.5, "the model is small"
    assert row.row("single")["value"] is None


def test_differences_are_found_and_their_margin_is_the_full_models() -> None:
    found: dict[str, Comparison] = workers.run(1, generating.differences, SPEC)[0]
    drafted = found["self_speculative"].drafted
    assert drafted > 0
    assert found["self_speculative"] == Comparison(len(PROMPTS) * TIMED, drafted, [])
    margins = []
    for prompt in PROMPTS:
        text = [token.id for token in oracle.decode(SPEC, weights(SPEC), tuple(prompt), NEW_TOKENS, oracle.Rule("never"))]
        rule = oracle.Rule("max_probability", dict.fromkeys(SPEC.exit_layers, 0.0))
        own = oracle.follow(SPEC, weights(SPEC), tuple(prompt), text, rule)
        logits = oracle.head_logits(SPEC, weights(SPEC), [*prompt, *text])["final"]
        for place, (token, wanted) in enumerate(zip(own, text, strict=True)):
            if token.id != wanted:
                best, second = logits[len(prompt) - 1 + place].topk(2).values.tolist()
                margins.append(best - second)
    assert len(margins) > 5
    assert found["catch_up"].tokens == len(PROMPTS) * TIMED
    assert found["catch_up"].margins == pytest.approx(margins, abs=1e-3)


def test_a_token_that_differs_is_counted_and_misses_the_target() -> None:
    rows = workers.run(1, generating.loss_of, SPEC, policy(SPEC, "max_probability", 0.0), 1)[0]
    assert [row.name for row in rows] == ["self_speculative/differing", "self_speculative/widest_margin"]
    assert (rows[0].value, rows[0].meets) == (1.0, False)


def test_speculation_that_drafts_nothing_has_shown_nothing() -> None:
    (row,) = workers.run(1, generating.loss_of, SPEC, policy(SPEC, "max_probability", 1.5), 1)[0]
    assert (row.value, row.meets, row.note) == (None, None, "not run: no exit was sure enough to draft")


def test_the_products_of_a_step_are_repeated_as_graphs_are() -> None:
    assert workers.run(1, generating.captured_products, SPEC, 5)[0] == (1, 5)


def test_modes_are_those_that_one_stage_can_run() -> None:
    wanted = ("self_speculative", "pipeline", "full", "catch_up")
    assert modes_on(wanted, policy(SPEC, "max_probability", 0.5)) == ["catch_up", "self_speculative"]
    assert modes_on(wanted, never_exit(SPEC)) == []


def test_a_model_without_exits_is_compared_with_the_machine_alone() -> None:
    figures = workers.run(1, generating.figures_of, spec(exits=(), activation="gelu"), never_exit(SPEC), ())[0]
    names = [figure.name for figure in figures]
    assert names == [
        *("full/speed", "full/by_rows", "full/of_by_rows", "full/products", "full/of_products", "full/over_transformers"),
        "batch_1/full",
        "batch_2/full",
    ]


@pytest.mark.parametrize(
    "change",
    [{"norm": "layernorm"}, {"position": "learned"}, {"qkv_bias": True}, {"linear_bias": True}, {"residual": "parallel"}]
    + [{"rotary_fraction": 0.5}, {"sliding_window": 8}, {"qk_norm": "head"}, {"norm_placement": "after"}, {"activation": "gelu"}],
)
def test_only_llamas_are_compared_with_llama(change: dict) -> None:
    assert is_llama(spec())
    assert not is_llama(spec(**change))
    assert why_not(spec(**change), tp=1) == "no such architecture"
    assert why_not(spec(), tp=2) == "it runs on one rank"


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, reason in ((None, "transformers is not installed"), (object(), None)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        assert why_not(spec(), tp=1) == reason


@pytest.mark.parametrize("tied", [True, False])
def test_llama_has_the_same_parameters_and_is_timed_beside_us(tied: bool) -> None:
    pytest.importorskip("transformers")
    spec_ = spec(vocab_size=64, tie_embeddings=tied, exits=(ExitSpec(1, "norm"),))
    ours, theirs = workers.run(1, generating.shapes, spec_)[0]
    assert ours == theirs
    figures = workers.run(1, generating.llama_figures, spec_)[0]
    assert [figure.name for figure in figures] == ["full/transformers", "full/over_transformers"]
    assert figures[0].value == pytest.approx(statistics.median(NEW_TOKENS / seconds for seconds in SECONDS["theirs"][1:]))
    ratios = [theirs / ours for theirs, ours in zip(SECONDS["theirs"][1:], FULL, strict=True)]
    assert figures[1].value == pytest.approx(statistics.median(ratios))
    assert (figures[1].target, figures[1].meets) == (1.5, math.isclose(figures[1].value, 1.5) or figures[1].value > 1.5)
