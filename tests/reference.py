"""The oracle: the multi-exit model and its loss in plain PyTorch, from a dictionary of whole parameters by global name.

Independent of `eellm.model`'s modules and of megatron-core: no tensor parallelism, no pipeline, no chunks, all logits at once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from eellm.data.batch import GlobalBatch, Microbatch
from eellm.model.objective import HeadWeights
from eellm.model.spec import ModelSpec

ACTIVATION = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x) ** 2,
}


class Reference:
    """`parameters`: global name -> whole tensor."""

    def __init__(self, spec: ModelSpec, parameters: dict[str, torch.Tensor]):
        self.spec, self.parameters = spec, parameters

    def norm(self, x, name, kind=None):
        weight = self.parameters[f"{name}.weight"]
        if (kind or self.spec.norm) == "rmsnorm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.norm_eps) * weight
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.spec.norm_eps)
        return scaled * weight + self.parameters[f"{name}.bias"]

    def linear(self, x, name):
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def rotate(self, x, positions):
        width = int(self.spec.head_dim * self.spec.rotary_fraction) // 2 * 2
        out = x.clone()
        for i in range(width // 2):
            angle = positions.to(x.dtype) * self.spec.rotary_base ** (-2 * i / width)
            a, b = x[..., i], x[..., i + width // 2]
            cos, sin = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
            out[..., i], out[..., i + width // 2] = a * cos - b * sin, b * cos + a * sin
        return out

    def attention(self, x, name, batch: Microbatch):
        spec = self.spec
        per_group = spec.num_heads // spec.num_query_groups
        mixed = self.linear(x, f"{name}.linear_qkv").unflatten(-1, (spec.num_query_groups, per_group + 2, spec.head_dim))
        query, key, value = mixed[..., :per_group, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
        if spec.qk_norm == "head":
            query = self.norm(query, f"{name}.q_layernorm", "rmsnorm")
            key = self.norm(key, f"{name}.k_layernorm", "rmsnorm")
        elif spec.qk_norm == "projection":
            query = self.norm(query.flatten(2), f"{name}.q_norm", "rmsnorm").view_as(query)
            key = self.norm(key.flatten(2), f"{name}.k_norm", "rmsnorm").view_as(key)
        if spec.position == "rotary":
            query, key = self.rotate(query, batch.positions), self.rotate(key, batch.positions)
        key, value = key.repeat_interleave(per_group, 2), value.repeat_interleave(per_group, 2)
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(spec.head_dim)
        order = torch.arange(x.shape[1])
        allowed = order[:, None] >= order[None, :]
        if spec.sliding_window is not None:
            allowed = allowed & (order[:, None] - order[None, :] < spec.sliding_window)
        allowed = allowed.expand(x.shape[0], 1, -1, -1)
        if batch.documents is not None:
            allowed = allowed & (batch.documents[:, None, :, None] == batch.documents[:, None, None, :])
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return self.linear(torch.einsum("bnqk,bknd->bqnd", weights, value).flatten(2), f"{name}.linear_proj")

    def mlp(self, x, name):
        inner = self.linear(x, f"{name}.linear_fc1")
        activation = ACTIVATION[self.spec.activation]
        if self.spec.gated:
            gate, up = inner.chunk(2, -1)
            return self.linear(activation(gate) * up, f"{name}.linear_fc2")
        return self.linear(activation(inner), f"{name}.linear_fc2")

    def layer(self, x, name, batch):
        def attend(y):
            return self.attention(y, f"{name}.attention", batch)

        def transform(y):
            return self.mlp(y, f"{name}.mlp")

        if self.spec.norm_placement == "after":
            x = x + self.norm(attend(x), f"{name}.attention_norm")
            return x + self.norm(transform(x), f"{name}.mlp_norm")
        attended = attend(self.norm(x, f"{name}.attention_norm"))
        if self.spec.residual == "parallel":
            return x + attended + transform(self.norm(x, f"{name}.mlp_norm"))
        x = x + attended
        return x + transform(self.norm(x, f"{name}.mlp_norm"))

    def head(self, x, name, batch):
        kind, temperature, tied = "norm", 1.0, True
        if name != "final":
            exit_ = next(e for e in self.spec.exits if e.name == name)
            kind, temperature, tied = exit_.head, exit_.temperature, exit_.tie_output
        if kind == "block":
            x = self.layer(x, f"heads.{name}.block", batch)
        if kind == "mlp":
            x = x + self.mlp(self.norm(x, f"heads.{name}.mlp_norm"), f"heads.{name}.mlp")
        if kind != "embedding":
            x = self.norm(x, f"heads.{name}.norm")
        matrix = "embedding.tokens.weight" if self.spec.tie_embeddings else "output.weight"
        weight = self.parameters[matrix if tied else f"heads.{name}.output.weight"]
        return (x @ weight.t())[..., : self.spec.vocab_size] / temperature

    def logits(self, batch: Microbatch) -> dict[str, torch.Tensor]:
        """Head name -> logits [b, s, vocabulary], divided by the head's temperature."""
        x = self.parameters["embedding.tokens.weight"][batch.tokens]
        if self.spec.position == "learned":
            x = x + self.parameters["embedding.positions.weight"][batch.positions]
        logits = {}
        for number in range(1, (self.spec.depth or self.spec.num_layers) + 1):
            x = self.layer(x, f"layers.{number}", batch)
            for exit_ in self.spec.exits:
                if exit_.layer == number:
                    logits[exit_.name] = self.head(x, exit_.name, batch)
        if self.spec.has_final_head:
            logits["final"] = self.head(x, "final", batch)
        return logits

    def losses(self, batch: GlobalBatch, weights: HeadWeights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(objective divided by the global token count, plain mean loss by head)."""
        objective, sums, tokens = 0.0, {}, batch.loss_mask.sum()
        for index in range(len(batch)):
            microbatch = batch[index]
            mask = microbatch.loss_mask
            for name, logits in self.logits(microbatch).items():
                loss = F.cross_entropy(logits.transpose(1, 2), microbatch.labels, reduction="none")
                sums[name] = sums.get(name, 0.0) + (loss * mask).sum()
                coefficient = mask
                if weights.token_confidence and name != "final":
                    confidence = logits.softmax(-1).amax(-1).detach() * mask
                    coefficient = confidence * mask.sum() / confidence.sum().clamp(min=1e-12)  # a microbatch may be all masked
                objective = objective + weights.values[name] * (loss * coefficient).sum()
        return objective / tokens, {name: value / tokens for name, value in sums.items()}
