"""The table of speed against quality says what a forward from scratch for every token says."""

from __future__ import annotations

from collections import Counter

import pytest

from eellm.benchmark.speed_quality import following, speed_against_quality
from eellm.config.schema import DecodingConfig, ExitPolicyConfig
from eellm.decoding.continuation import Request
from eellm.decoding.decoder import Decoder, DecoderOptions
from eellm.decoding.model.kv_cache import KVCache
from eellm.decoding.model.segments import InferenceModel
from eellm.decoding.policy import never_exit
from eellm.decoding.setting import swept
from eellm.metrics.tables import TableRow
from eellm.model.spec import ModelSpec
from tests import workers
from tests.decoding import oracle
from tests.decoding.models import spec
from tests.decoding.pipelines import Cut, build
from tests.decoding.test_decoder import weights

COUNT = 12
PROMPTS = [(5, 17, 3), (42, 8, 1, 30, 2), (60,)]
THRESHOLDS = [1.5, 0.5, 0.0]
ONE_RANK = Cut()


def decoding_config(max_pending: int | None = 3) -> DecodingConfig:
    return DecodingConfig(
        mode="catch_up",
        prompts=[],
        max_new_tokens=COUNT,
        max_batch=1,
        max_tokens=None,
        draft_length="auto",
        max_pending=max_pending,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop=[],
        stop_at_eos=True,
        compile=False,
    )


def policy_config(kind: str, active: tuple[int, ...] = (1, 3), layer: int | None = None) -> ExitPolicyConfig:
    return ExitPolicyConfig(kind=kind, threshold=0.8, layer=layer, active=list(active), min_new_tokens=2, calibration=None)


def table(
    rank: int, spec_: ModelSpec, modes: tuple[str, ...], cut: Cut = ONE_RANK, max_pending: int | None = 3
) -> list[TableRow]:
    decoding = decoding_config(max_pending)
    settings = swept(modes, decoding, policy_config("max_probability"), THRESHOLDS, spec_)
    return speed_against_quality(*build(spec_, cut), PROMPTS, settings, decoding, repeats=2)


def agreement(spec_: ModelSpec, parameters: dict, rule: oracle.Rule) -> float:
    """Follow full depth's text; the rule's pending tokens are counted along it."""
    same = 0
    for prompt in PROMPTS:
        text = [token.id for token in oracle.decode(spec_, parameters, prompt, COUNT, oracle.Rule("never"))]
        logits = oracle.head_logits(spec_, parameters, [*prompt, *text])
        pending = 0
        for number in range(1, COUNT):
            here = {name: all_[len(prompt) - 1 + number] for name, all_ in logits.items()}
            forced = number < rule.min_new_tokens or pending >= rule.max_pending
            head = "final" if forced else oracle.who_speaks(spec_, here, rule)
            pending = 0 if head == "final" else pending + 1
            same += int(here[head].argmax()) == text[number]
    return same / (len(PROMPTS) * (COUNT - 1))


def test_rows_against_the_plain_model() -> None:
    spec_ = spec()
    rows = workers.run(1, table, spec_, ("catch_up",))[0]
    assert [(row["decoding"], row["policy"], row["threshold"]) for row in rows] == [
        ("full", "never", None),
        *(("catch_up", "max_probability", threshold) for threshold in THRESHOLDS),
    ]
    assert rows[0]["speedup"] == rows[0]["agreement"] == 1.0
    assert rows[0]["mean_layers"] == 4.0
    agreements = []
    for row, threshold in zip(rows[1:], THRESHOLDS, strict=True):
        rule = oracle.Rule("max_probability", {1: threshold, 3: threshold}, min_new_tokens=2, max_pending=3)
        tokens = [token for prompt in PROMPTS for token in oracle.decode(spec_, weights(spec_), prompt, COUNT, rule)[1:]]
        heads = Counter(token.head for token in tokens)
        for head in spec_.heads:
            assert row[f"share_{head}"] == pytest.approx(heads[head] / len(tokens))
        layers = {"exit_01": 1, "exit_03": 3, "final": 4}
        assert row["mean_layers"] == pytest.approx(sum(layers[head] * count for head, count in heads.items()) / len(tokens))
        assert row["agreement"] == pytest.approx(agreement(spec_, weights(spec_), rule))
        assert row["tokens_per_second"] > 0
        assert row["speedup"] > 0
        assert row["accuracy"] is None
        agreements.append(row["agreement"])
    assert agreements[0] == 1.0 > agreements[1] > agreements[2]


def test_every_mode_at_every_threshold() -> None:
    """What leaves early is the policy's affair, so ways of catching up agree; speculation emits full depth's tokens."""
    spec_ = spec()
    modes = ("self_speculative", "full", "catch_up", "kv_recompute")
    rows = workers.run(1, table, spec_, modes)[0]
    assert [(row["decoding"], row["threshold"]) for row in rows] == [
        ("full", None),
        *((mode, threshold) for mode in modes if mode != "full" for threshold in THRESHOLDS),
    ]
    drafted, caught_up, recomputed = (rows[1 + 3 * number : 4 + 3 * number] for number in range(3))
    for row in drafted:
        assert (row["agreement"], row["share_final"], row["mean_layers"]) == (1.0, 1.0, 4.0)
    for one, other in zip(caught_up, recomputed, strict=True):
        for column in ("agreement", "mean_layers", "share_exit_01", "share_final"):
            assert one[column] == pytest.approx(other[column])
    assert caught_up[-1]["agreement"] < 1.0


@pytest.mark.dist
@pytest.mark.parametrize("cut", [Cut(pp=2), Cut(pp=2, tp=2, layers_per_stage=(3, 1))], ids=["pp2", "tp2 x pp2"])
def test_over_stages_the_table_is_that_of_one_rank(cut: Cut) -> None:
    """The pipeline emits what catching up emits, and full depth is full depth; times are their own."""
    spec_ = spec()
    ranks = workers.run(cut.pp * cut.tp, table, spec_, ("pipeline",), cut, None)
    alone = workers.run(1, table, spec_, ("catch_up",), ONE_RANK, None)[0]
    assert ranks[cut.tp :] == [[]] * cut.tp, "later stages have no tokens to speak of"
    for rows in ranks[: cut.tp]:
        assert [row["decoding"] for row in rows] == ["full", "pipeline", "pipeline", "pipeline"]
        for own, wanted in zip(rows, alone, strict=True):
            assert own.keys() == wanted.keys()
            for column in wanted.keys() - {"decoding", "tokens_per_second", "speedup"}:
                assert own[column] == wanted[column], column
            assert own["tokens_per_second"] > 0
            assert own["speedup"] > 0
    assert alone[1]["agreement"] == 1.0 > alone[2]["agreement"] > alone[3]["agreement"]


def test_policies_without_thresholds_are_measured_once_and_patience_counts() -> None:
    spec_, decoding = spec(), decoding_config()

    def policies(kind: str, layer: int | None = None) -> list:
        settings = swept(["catch_up"], decoding, policy_config(kind, layer=layer), [0.2, 0.5], spec_)
        return [setting.policy.threshold for setting in settings]

    assert policies("margin") == [None, 0.2, 0.5]
    assert policies("fixed_layer", layer=3) == [None, None]
    assert policies("never") == [None]
    assert policies("patience") == [None, 1.0, 2.0]


def caches_of_a_table(rank: int, spec_: ModelSpec) -> int:
    sizes: list[int] = []
    cache = InferenceModel.cache

    def counted(model: InferenceModel, max_tokens: int, sequences: int = 1) -> KVCache:
        sizes.append(max_tokens)
        return cache(model, max_tokens, sequences)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InferenceModel, "cache", counted)
        table(rank, spec_, ("catch_up",))
    assert set(sizes) == {max(map(len, PROMPTS)) + COUNT - 1}
    return len(sizes)


def test_a_setting_has_one_cache_for_all_prompts() -> None:
    """A new one would drop the CUDA graphs that were captured with the old one, while their steps are timed."""
    assert workers.run(1, caches_of_a_table, spec())[0] == 1 + len(THRESHOLDS)


def followed(rank: int, spec_: ModelSpec, text: list[int]) -> tuple[list[int], list[int]]:
    stage, _ = build(spec_, ONE_RANK)
    exits = swept(["self_speculative"], decoding_config(), policy_config("max_probability"), [0.0], spec_)[1]
    full = Decoder(stage, never_exit(spec_), DecoderOptions("full"))
    drafts = Decoder(stage, exits.policy, DecoderOptions("self_speculative", draft_length=3))
    return tuple(following(decoder, PROMPTS[0], Request(len(text)), text) for decoder in (full, drafts))


def test_a_text_is_followed_wherever_it_leads() -> None:
    """Of a text that no decoder would write: at each place the token that a forward from scratch predicts there."""
    spec_, text = spec(), [(7 * place + 3) % 61 for place in range(COUNT)]
    logits = oracle.head_logits(spec_, weights(spec_), [*PROMPTS[0], *text])["final"]
    wanted = [int(row.argmax()) for row in logits[len(PROMPTS[0]) - 1 : -1]]
    assert wanted != text
    assert workers.run(1, followed, spec_, text)[0] == (wanted, wanted)
