"""The formulas against torch's own counter, on a plain transcription of the network's matrix products."""

import pytest

from eellm.metrics import flops
from eellm.model.spec import ExitSpec, ModelSpec

torch = pytest.importorskip("torch")
from torch.nn.functional import linear  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

BATCH, SEQUENCE = 3, 24


def make_spec(**changes):
    shapes = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "num_query_groups": 2, "head_dim": 12, "ffn_hidden_size": 80}
    exits = tuple(ExitSpec(layer, head) for layer, head in ((1, "embedding"), (2, "norm"), (3, "mlp"), (4, "block")))
    return ModelSpec(**{**shapes, "vocab_size": 101, "padded_vocab_size": 128, "max_positions": 64, "exits": exits, **changes})


def activations(spec):
    return torch.empty(BATCH, SEQUENCE, spec.hidden_size, requires_grad=True, device="meta")


def weight(rows, columns):
    return torch.empty(rows, columns, requires_grad=True, device="meta")  # shapes are all that is counted


def attention(spec, hidden):
    query_width, key_width = spec.num_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    heads = (
        linear(hidden, weight(width, spec.hidden_size)).view(BATCH, SEQUENCE, -1, spec.head_dim).transpose(1, 2)
        for width in (query_width, key_width, key_width)
    )
    query, key, value = (part.repeat_interleave(spec.num_heads // part.shape[1], 1).flatten(0, 1) for part in heads)
    context = torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(-1), value)
    merged = context.view(BATCH, spec.num_heads, SEQUENCE, -1).transpose(1, 2).flatten(2)
    return linear(merged, weight(spec.hidden_size, query_width))


def mlp(spec, hidden):
    inner = linear(hidden, weight(spec.ffn_hidden_size, spec.hidden_size)).relu()
    if spec.gated:
        inner = inner * linear(hidden, weight(spec.ffn_hidden_size, spec.hidden_size))
    return linear(inner, weight(spec.hidden_size, spec.ffn_hidden_size))


def layer(spec, hidden):
    hidden = hidden + attention(spec, hidden)
    return hidden + mlp(spec, hidden)


def head(spec, exit_, hidden):
    if exit_ is not None and exit_.head == "mlp":
        hidden = hidden + mlp(spec, hidden)
    if exit_ is not None and exit_.head == "block":
        hidden = layer(spec, hidden)
    return linear(hidden, weight(spec.vocab_size, spec.hidden_size)).logsumexp(-1).sum()


def network(spec):
    hidden = activations(spec)
    loss = torch.zeros((), device="meta")
    for number in range(1, spec.num_layers + 1):
        hidden = layer(spec, hidden)
        if number in spec.exit_layers:
            loss = loss + head(spec, spec.exit_at(number), hidden)
    return loss + head(spec, None, hidden)


def counted(action):
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "gelu"}, {"exits": ()}, {"num_query_groups": 4, "head_dim": 8}, {"padded_vocab_size": 1024}],
    ids=str,
)
def test_forward_and_training_equal_the_counter(changes):
    spec = make_spec(**changes)
    tokens = BATCH * SEQUENCE
    assert counted(lambda: network(spec)) == tokens * flops.forward_flops(spec, SEQUENCE)
    assert counted(lambda: network(spec).backward()) == tokens * flops.training_flops(spec, SEQUENCE)


def test_each_head_is_counted_with_its_body():
    spec = make_spec()
    hidden = activations(spec)
    for exit_ in (*spec.exits, None):
        expected = counted(lambda exit_=exit_: head(spec, exit_, hidden)) / (BATCH * SEQUENCE)
        assert flops.flops_by_head(spec, SEQUENCE)["final" if exit_ is None else exit_.name] == expected


def test_recomputation_is_hardware_flops_only():
    spec = make_spec(attention="unfused")
    tokens = BATCH * SEQUENCE
    once = counted(lambda: layer(spec, activations(spec))) // tokens
    model = flops.training_flops(spec, SEQUENCE)
    assert flops.hardware_flops(spec, SEQUENCE) == model
    assert flops.hardware_flops(spec, SEQUENCE, "full") == model + spec.num_layers * once
    scores = 2 * 2 * SEQUENCE * spec.num_heads * spec.head_dim
    assert flops.hardware_flops(spec, SEQUENCE, "selective") == model + spec.num_layers * scores


def test_a_fused_kernel_repeats_one_product_of_attention():
    spec = make_spec(attention="sdpa")
    query = torch.empty(BATCH, spec.num_heads, SEQUENCE, spec.head_dim).shape
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    per_layer = sdpa_backward_flop_count(query, query, query, query) - 2 * sdpa_flop_count(query, query, query)
    layers_with_attention = spec.num_layers + 1
    extra = flops.hardware_flops(spec, SEQUENCE) - flops.training_flops(spec, SEQUENCE)
    assert extra * BATCH * SEQUENCE == layers_with_attention * per_layer
