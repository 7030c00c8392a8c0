"""Published numbers about transformers: how large they are, and what FLOPs and share of its peak a machine spends."""

from __future__ import annotations

from dataclasses import replace

from mlsys.claims.core import Claim
from mlsys.perf import hardware, transformer
from mlsys.perf.configs import MODELS, Config

NANOGPT = "Karpathy 2023, nanoGPT, transformer_sizing.ipynb"
PALM = "Chowdhery et al. 2022, arXiv:2204.02311"
GPT_3 = "Brown et al. 2020, arXiv:2005.14165"
LLAMA_3 = "Llama Team 2024, arXiv:2407.21783"
LORA = "Hu et al. 2021, arXiv:2106.09685"
DEEPSEEK = "DeepSeek-AI 2024, arXiv:2412.19437, abstract"

NANO = replace(MODELS["gpt2"], bias=False)
GPT_3_CONFIG = MODELS["gpt3"]


def palm(layers: int, d_model: int, heads: int) -> Config:
    """PaLM: multi-query attention, heads 256 wide, SwiGLU four times as wide, 256,000 tied embeddings, no biases."""
    return Config(
        vocab=256_000,
        context=2048,
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=1,
        head_dim=256,
        d_ff=4 * d_model,
        activation="swiglu",
        positions="rope",
        tied=True,
        bias=False,
        source=f"{PALM}, Table 1",
    )


def total(config: Config) -> int:
    """Every parameter of a model."""
    return transformer.parameters(config).total


def lora_parameters(config: Config, rank: int) -> int:
    """Trained numbers with LoRA on W_q and W_v of every layer: A is rank × d_in, B is d_out × rank."""
    total = 0
    for _ in range(config.layers):
        for d_out in (config.heads * config.head_dim, config.kv_heads * config.head_dim):
            total += rank * config.d_model + d_out * rank
    return total


SIZES = [
    Claim(
        name="nanogpt-parameters",
        area="perf.transformer",
        source=NANOGPT,
        what="parameters of GPT-2 124M without biases",
        unit="",
        published=124_337_664,
        digits=0,
        compute=lambda: total(NANO),
    ),
    Claim(
        name="gpt2-parameters",
        area="perf.transformer",
        source="Radford et al. 2019, Table 2",
        what="parameters of the smallest GPT-2 (12 layers, 768 wide)",
        unit="M",
        published=117,
        digits=0,
        compute=lambda: total(MODELS["gpt2"]) / 1e6,
        expected="disagrees",
        reason="the paper's table undercounts: the released weights hold 124 M numbers, as its authors later said",
    ),
    Claim(
        name="gpt3-parameters",
        area="perf.transformer",
        source=f"{GPT_3}, Table D.1",
        what="parameters of GPT-3",
        unit="M",
        published=174_600,
        digits=-2,
        compute=lambda: total(GPT_3_CONFIG) / 1e6,
    ),
    Claim(
        name="gpt3-training-flops",
        area="perf.transformer",
        source=f"{GPT_3}, Table D.1",
        what="FLOPs to train GPT-3 on 300 billion tokens, 6 for each parameter and token",
        unit="× 10²³",
        published=3.14,
        digits=2,
        compute=lambda: 6 * total(GPT_3_CONFIG) * 300e9 / 1e23,
    ),
    Claim(
        name="gpt3-petaflop-days",
        area="perf.transformer",
        source=f"{GPT_3}, Table D.1",
        what="the same in days of one petaFLOP/s",
        unit="PF-days",
        published=3640,
        digits=-1,
        compute=lambda: transformer.training_seconds(6 * total(GPT_3_CONFIG) * 300e9, 1, 1e15) / 86400,
    ),
    Claim(
        name="palm-8b-parameters",
        area="perf.transformer",
        source=f"{PALM}, Table 1",
        what="parameters of PaLM 8B (multi-query, SwiGLU)",
        unit="B",
        published=8.63,
        digits=2,
        compute=lambda: total(palm(32, 4096, 16)) / 1e9,
    ),
    Claim(
        name="palm-540b-parameters",
        area="perf.transformer",
        source=f"{PALM}, Table 1",
        what="parameters of PaLM 540B",
        unit="B",
        published=540.35,
        digits=2,
        compute=lambda: total(palm(118, 18432, 48)) / 1e9,
        tolerance=1e-4,
        expected="approximate",
        reason="ours has two norms in a block where PaLM's parallel block has one (2 M); the rest is rounding",
    ),
    Claim(
        name="mixtral-parameters",
        area="perf.transformer",
        source="Jiang et al. 2024, arXiv:2401.04088, abstract",
        what="parameters of Mixtral 8x7B",
        unit="B",
        published=47,
        digits=0,
        compute=lambda: total(MODELS["mixtral-8x7b"]) / 1e9,
    ),
    Claim(
        name="mixtral-active",
        area="perf.transformer",
        source="Jiang et al. 2024, arXiv:2401.04088, abstract",
        what="parameters of Mixtral 8x7B that one token uses",
        unit="B",
        published=13,
        digits=0,
        compute=lambda: transformer.parameters(MODELS["mixtral-8x7b"]).active / 1e9,
    ),
    Claim(
        name="deepseek-v3-parameters",
        area="perf.transformer",
        source=DEEPSEEK,
        what="parameters of DeepSeek-V3, without its multi-token-prediction module",
        unit="B",
        published=671,
        digits=0,
        compute=lambda: total(MODELS["deepseek-v3"]) / 1e9,
    ),
    Claim(
        name="deepseek-v3-active",
        area="perf.transformer",
        source=DEEPSEEK,
        what="parameters of DeepSeek-V3 that one token uses",
        unit="B",
        published=37,
        digits=0,
        compute=lambda: transformer.parameters(MODELS["deepseek-v3"]).active / 1e9,
        tolerance=0.03,
        expected="approximate",
        reason="ours counts the whole token embedding, of which a token reads one row; without it 36.6 B",
    ),
    Claim(
        name="lora-rank-1",
        area="perf.transformer",
        source=f"{LORA}, Table 4",
        what="trained parameters of GPT-3 with LoRA of rank 1 on W_q and W_v",
        unit="M",
        published=4.7,
        digits=1,
        compute=lambda: lora_parameters(GPT_3_CONFIG, 1) / 1e6,
    ),
    Claim(
        name="lora-rank-8",
        area="perf.transformer",
        source=f"{LORA}, Table 4",
        what="trained parameters of GPT-3 with LoRA of rank 8 on W_q and W_v",
        unit="M",
        published=37.7,
        digits=1,
        compute=lambda: lora_parameters(GPT_3_CONFIG, 8) / 1e6,
    ),
    Claim(
        name="lora-checkpoint",
        area="perf.transformer",
        source=f"{LORA}, section 4.2",
        what="16-bit checkpoint of a LoRA of rank 4 on W_q and W_v of GPT-3",
        unit="MB",
        published=35,
        digits=0,
        compute=lambda: 2 * lora_parameters(GPT_3_CONFIG, 4) / 1e6,
        tolerance=0.10,
        expected="approximate",
        reason="ours in units of 10⁶ bytes; in units of 2²⁰ it is 36.0, and the paper rounds",
    ),
]


def palm_mfu() -> float:
    """PaLM 540B: 238,300 tokens a second on 6,144 TPU v4 chips, in percent of their peak (appendix B)."""
    per_token = transformer.palm_flops_per_token(palm(118, 18432, 48), 2048)
    peak = 6144 * hardware.find("tpu-v4").peak["bfloat16"]
    return 100 * transformer.mfu(238_300, per_token, peak)


def nanogpt_mfu() -> float:
    """Batches of 100 sequences of 1,024 tokens in 0.755 s on one A100, in percent."""
    flops = transformer.training_flops(NANO, 1, 1024).total
    return 100 * flops * 100 / 0.755 / hardware.find("a100-40").peak["bfloat16"]


def checkpoint_gb() -> float:
    """NanoGPT 124M with AdamW in float32: the weights and two moments, GB."""
    state = transformer.state_bytes(transformer.parameters(NANO), mixed=False)
    return (state.weights + state.momentum + state.variance) / 1e9


FLOPS = [
    Claim(
        name="nanogpt-forward-flops",
        area="perf.transformer",
        source=NANOGPT,
        what="FLOPs of one forward pass over 1,024 tokens",
        unit="",
        published=291_648_307_200,
        digits=0,
        compute=lambda: transformer.forward_flops(NANO, 1, 1024).total,
    ),
    Claim(
        name="nanogpt-palm-formula",
        area="perf.transformer",
        source=NANOGPT,
        what="FLOPs of a training step over 1,024 tokens by PaLM's formula",
        unit="",
        published=879_894_724_608,
        digits=0,
        compute=lambda: transformer.palm_flops_per_token(NANO, 1024) * 1024,
        tolerance=0.01,
        expected="approximate",
        reason="the notebook counts the position embeddings as weights, which multiply nothing; ours leaves them out",
    ),
    Claim(
        name="nanogpt-mfu",
        area="perf.transformer",
        source=NANOGPT,
        what="FLOP utilisation of one A100 at 100 sequences of 1,024 tokens in 0.755 s",
        unit="%",
        published=37.14,
        digits=2,
        compute=nanogpt_mfu,
    ),
    Claim(
        name="nanogpt-checkpoint",
        area="perf.transformer",
        source=NANOGPT,
        what="checkpoint: weights and two Adam moments in float32",
        unit="GB",
        published=1.49,
        digits=2,
        compute=checkpoint_gb,
    ),
    Claim(
        name="nanogpt-days",
        area="perf.transformer",
        source=NANOGPT,
        what="days to train on 300 billion tokens with eight A100 at 30% utilisation, 6 FLOPs a parameter and token",
        unit="days",
        published=3.46,
        digits=2,
        compute=lambda: (
            transformer.training_seconds(6 * total(NANO) * 300e9, 8, 0.3 * hardware.find("a100-40").peak["bfloat16"])
            / 86400
        ),
    ),
    Claim(
        name="palm-mfu",
        area="perf.transformer",
        source=f"{PALM}, Table 3 and appendix B",
        what="model FLOP utilisation of PaLM 540B, 238.3 K tokens/s on 6,144 TPU v4",
        unit="%",
        published=46.2,
        digits=1,
        compute=palm_mfu,
    ),
    Claim(
        name="llama3-405b-mfu",
        area="perf.hardware",
        source=f"{LLAMA_3}, Table 4",
        what="utilisation of an H100 in 16 bits at 430 TFLOP/s",
        unit="%",
        published=43,
        digits=0,
        compute=lambda: 100 * 430e12 / hardware.find("h100").peak["bfloat16"],
    ),
    Claim(
        name="llama3-405b-mfu-16k",
        area="perf.hardware",
        source=f"{LLAMA_3}, Table 4",
        what="the same at 400 TFLOP/s on 16,384 of them",
        unit="%",
        published=41,
        digits=0,
        compute=lambda: 100 * 400e12 / hardware.find("h100").peak["bfloat16"],
        tolerance=0.02,
        expected="approximate",
        reason="the paper rounded the rate before it printed it: 41% of 989 is 405",
    ),
]
