"""The models of the tests of `mlsys.perf`: small configs of every kind, and the torch modules that they describe.

The modules are written from the descriptions of the models, not from the formulas. Rotary positions are left out:
they have no parameters, no matrix product, and keep nothing that the forward pass made.
"""

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlsys.perf.configs import Config, Experts, LatentAttention, gpt, llama

# --- modules ----------------------------------------------------------------------------------------------------------


class KeepInput(torch.autograd.Function):
    """RMSNorm that keeps its input, as a fused kernel does (torch's own keeps more on a CPU)."""

    @staticmethod
    def forward(ctx, x, scale):
        rstd = x.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        ctx.save_for_backward(x, scale, rstd)
        return x * rstd * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale, rstd = ctx.saved_tensors
        unit, scaled = x * rstd, grad * scale
        by_row = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * rstd
        return by_row, (grad * unit).sum(dim=tuple(range(grad.ndim - 1)))


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return KeepInput.apply(x, self.scale)


def norm(config, d):
    return nn.LayerNorm(d, bias=config.bias) if config.norm == "layernorm" else RMSNorm(d)


def drop(x, on):
    return torch.native_dropout(x, 0.1, True)[0] if on else x


def core(q, k, v, dropout):
    """(b, h, t, d), (b, h_kv, t, d), (b, h_kv, t, dv) → (b, h, t, dv); no copy of keys and values for each group."""
    b, h, t, d = q.shape
    group = h // k.shape[1]
    scores = q.reshape(b, k.shape[1], group * t, d) @ k.mT / math.sqrt(d)
    hidden = torch.full((t, t), -math.inf, dtype=q.dtype, device=q.device).triu(1).repeat(group, 1)
    return (drop(torch.softmax(scores + hidden, -1), dropout) @ v).reshape(b, h, t, v.shape[-1])


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        self.q = nn.Linear(c.d_model, c.heads * c.head_dim, bias=c.bias)
        self.k = nn.Linear(c.d_model, c.kv_heads * c.head_dim, bias=c.bias)
        self.v = nn.Linear(c.d_model, c.kv_heads * c.head_dim, bias=c.bias)
        self.out = nn.Linear(c.heads * c.head_dim, c.d_model, bias=c.bias)

    def qkv(self, x):
        heads = (self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads)
        return [linear(x).unflatten(-1, (n, -1)).transpose(1, 2) for linear, n in heads]


class Latent(nn.Module):
    """Multi-head latent attention; keys and values are expanded, as in training."""

    def __init__(self, c):
        super().__init__()
        m = c.latent
        self.heads, self.m = c.heads, m
        query = c.heads * (m.nope_dim + m.rope_dim)
        if m.query_rank:
            self.q_down = nn.Linear(c.d_model, m.query_rank, bias=c.bias)
            self.q_norm = norm(c, m.query_rank)
        self.q_up = nn.Linear(m.query_rank or c.d_model, query, bias=c.bias)
        self.kv_down = nn.Linear(c.d_model, m.kv_rank, bias=c.bias)
        # One matrix with kv_down in DeepSeek's code; its bias, if any, is part of that matrix's.
        self.key_rope = nn.Linear(c.d_model, m.rope_dim, bias=c.bias)
        self.kv_norm = norm(c, m.kv_rank)
        self.k_up = nn.Linear(m.kv_rank, c.heads * m.nope_dim, bias=c.bias)
        self.v_up = nn.Linear(m.kv_rank, c.heads * m.value_dim, bias=c.bias)
        self.out = nn.Linear(c.heads * m.value_dim, c.d_model, bias=c.bias)

    def qkv(self, x):
        q = self.q_up(self.q_norm(self.q_down(x)) if self.m.query_rank else x)
        compressed = self.kv_norm(self.kv_down(x))
        k, v, q = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.k_up(compressed), self.v_up(compressed), q)
        )
        shared = self.key_rope(x)[:, None].expand(-1, self.heads, -1, -1)
        return q, torch.cat([k, shared], -1), v


class MLP(nn.Module):
    def __init__(self, c, d_ff):
        super().__init__()
        self.gated = c.activation == "swiglu"
        self.up = nn.Linear(c.d_model, d_ff, bias=c.bias)
        if self.gated:
            self.gate = nn.Linear(c.d_model, d_ff, bias=c.bias)
        self.down = nn.Linear(d_ff, c.d_model, bias=c.bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gated else F.gelu(self.up(x)))


class Mixture(nn.Module):
    def __init__(self, c):
        super().__init__()
        e = self.e = c.experts
        self.router = nn.Linear(c.d_model, e.count, bias=False)
        if e.router_bias:
            self.balance = nn.Parameter(torch.zeros(e.count))
        self.experts = nn.ModuleList(MLP(c, e.d_ff) for _ in range(e.count))
        self.shared = nn.ModuleList(MLP(c, e.d_ff) for _ in range(e.shared))

    def forward(self, x):
        rows = x.flatten(0, 1)
        probabilities = self.router(rows).float().softmax(-1)
        weights, chosen = probabilities.topk(self.e.per_token)
        out = sum((expert(rows) for expert in self.shared), torch.zeros_like(rows))
        for i, expert in enumerate(self.experts):
            row, slot = (chosen == i).nonzero(as_tuple=True)
            weighted = expert(rows[row]) * weights[row, slot, None].to(x.dtype)
            out = out.index_put((row,), weighted, accumulate=True)  # index_add would keep `weighted`
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, c, layer, dropout):
        super().__init__()
        self.dropout = dropout
        self.norm1, self.norm2 = norm(c, c.d_model), norm(c, c.d_model)
        self.attention = Latent(c) if c.latent else Attention(c)
        self.mlp = Mixture(c) if c.has_experts(layer) else MLP(c, c.d_ff)
        self.recompute = "none"

    def forward(self, x):
        qkv = self.attention.qkv(self.norm1(x))
        if self.recompute == "selective":
            out = checkpoint(core, *qkv, self.dropout, use_reentrant=True)
        else:
            out = core(*qkv, self.dropout)
        x = x + drop(self.attention.out(out.transpose(1, 2).flatten(2)), self.dropout)
        return x + drop(self.mlp(self.norm2(x)), self.dropout)


class Model(nn.Module):
    def __init__(self, c, dropout=False):
        super().__init__()
        self.dropout = dropout
        self.tokens = nn.Embedding(c.vocab, c.d_model)
        self.positions = nn.Embedding(c.context, c.d_model) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(c, layer, dropout) for layer in range(c.layers))
        self.norm = norm(c, c.d_model)
        self.output = nn.Linear(c.d_model, c.vocab, bias=False)
        if c.tied:
            self.output.weight = self.tokens.weight
        self.recompute = "none"

    def forward(self, tokens, last=False):
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = drop(x, self.dropout)
        for block in self.blocks:
            block.recompute = self.recompute
            x = checkpoint(block, x, use_reentrant=True) if self.recompute == "full" else block(x)
        return self.output(self.norm(x[:, -1:] if last else x))


def loss(model, tokens):
    logits = model(tokens).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def draw_tokens(config, batch, seq):
    return torch.randint(config.vocab, (batch, seq), generator=torch.Generator().manual_seed(0))


# --- configs ----------------------------------------------------------------------------------------------------------

GPT = gpt(2, 24, 3, vocab=50, context=16)
GQA = llama(2, 24, 6, 40, vocab=50, context=16, kv_heads=2)
MOE = llama(
    5, 16, 2, 24, vocab=50, context=16, experts=Experts(4, 2, 12, shared=1, first_dense=1, interval=2, router_bias=True)
)
MLA = llama(
    3, 24, 4, 40, vocab=50, context=16, experts=Experts(6, 3, 10, first_dense=1),
    latent=LatentAttention(query_rank=10, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5),
)  # fmt: skip
SMALL = {
    "gpt": GPT,
    "gpt without biases": replace(GPT, bias=False, tied=False),
    "heads narrower than the model": replace(GPT, heads=3, kv_heads=1, head_dim=4),
    "gqa": GQA,
    "moe, every other layer": MOE,
    "moe of GELU with biases": replace(GPT, experts=Experts(4, 1, 20)),
    "mla": MLA,
    "mla, queries not compressed": replace(MLA, latent=replace(MLA.latent, query_rank=0)),
}


@st.composite
def configs(draw, divisible_by=1):
    """Any small config; the widths that tensor parallelism divides are multiples of `divisible_by`."""
    kv_heads = divisible_by * draw(st.integers(1, 2))
    latent = st.builds(
        LatentAttention,
        query_rank=st.sampled_from((0, 7)), kv_rank=st.integers(2, 9), nope_dim=st.integers(1, 5),
        rope_dim=st.sampled_from((2, 4)), value_dim=st.integers(2, 6),
    )  # fmt: skip
    experts = st.builds(
        Experts,
        count=st.integers(2, 5), per_token=st.integers(1, 2), d_ff=st.integers(2, 9).map(lambda n: n * divisible_by),
        shared=st.integers(0, 2), first_dense=st.integers(0, 2), interval=st.integers(1, 3), router_bias=st.booleans(),
    )  # fmt: skip
    return Config(
        vocab=divisible_by * draw(st.integers(2, 40)),
        context=32,
        layers=draw(st.integers(1, 5)),
        d_model=draw(st.integers(2, 20)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        d_ff=divisible_by * draw(st.integers(2, 30)),
        norm=draw(st.sampled_from(("layernorm", "rmsnorm"))),
        activation=draw(st.sampled_from(("gelu", "swiglu"))),
        positions=draw(st.sampled_from(("learned", "rope"))),
        tied=draw(st.booleans()),
        bias=draw(st.booleans()),
        latent=draw(st.none() | latent),
        experts=draw(st.none() | experts),
    )
