"""Published numbers about what models and machines cost: sizes, FLOPs, utilisation, rooflines, caches, scaling laws."""

from __future__ import annotations

from dataclasses import replace

from mlsys.claims.core import Claim, Status
from mlsys.perf import hardware, inference, roofline, scaling_laws, transformer
from mlsys.perf.configs import MODELS, Config, gpt, llama

NANOGPT = "Karpathy 2023, nanoGPT, transformer_sizing.ipynb"
PALM = "Chowdhery et al. 2022, arXiv:2204.02311"
GPT_3 = "Brown et al. 2020, arXiv:2005.14165"
LLAMA_3 = "Llama Team 2024, arXiv:2407.21783"
LORA = "Hu et al. 2021, arXiv:2106.09685"
VLLM = "Kwon et al. 2023, arXiv:2309.06180"
TPU = "Jouppi et al. 2017, arXiv:1704.04760"
SCALING_BOOK = "Austin et al. 2025, How to Scale Your Model, Inference"
CHINCHILLA = "Hoffmann et al. 2022, arXiv:2203.15556"
DEEPSEEK = "DeepSeek-AI 2024, arXiv:2412.19437, abstract"
DEEPSEEK_INSIGHTS = "Zhao et al. 2025, arXiv:2505.09343, Table 1"

NANO = replace(MODELS["gpt2"], bias=False)
OPT_66B = gpt(64, 9216, 72, vocab=50272, context=2048)
OPT_175B = gpt(96, 12288, 96, vocab=50272, context=2048)
LLAMA_405B = llama(126, 16384, 128, 53248, vocab=128256, context=8192, kv_heads=8)
QWEN_72B = llama(80, 8192, 64, 29568, vocab=152064, context=32768, kv_heads=8)
# The Llama-2-13B of the scaling book's table with its key/value heads cut to a fifth, 40 to 8
LLAMA_13B_GQA = replace(MODELS["llama-2-13b"], kv_heads=8)
# One socket and one die of the machines that the TPU paper compares with, by its Table 2
HASWELL = hardware.Hardware("18-core Haswell", peak={"float32": 1.3e12}, bandwidth=51e9, memory=256 * 2**30)
K80 = hardware.Hardware("K80, one die", peak={"float32": 2.8e12}, bandwidth=160e9, memory=12 * 2**30)
V5E_BANDWIDTH = 8 * 8.2e11  # bytes/s: the eight TPU v5e chips of that table, at the bandwidth that it states
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


def palm_mfu() -> float:
    """PaLM 540B: 238,300 tokens a second on 6,144 TPU v4 chips, in percent of their peak (appendix B)."""
    per_token = transformer.palm_flops_per_token(palm(118, 18432, 48), 2048)
    peak = 6144 * hardware.find("tpu-v4").peak["bfloat16"]
    return 100 * transformer.mfu(238_300, per_token, peak)


def nanogpt_mfu() -> float:
    """Batches of 100 sequences of 1,024 tokens in 0.755 s on one A100, in percent."""
    flops = transformer.training_flops(NANO, 1, 1024).total
    return 100 * flops * 100 / 0.755 / hardware.find("a100-40").peak["bfloat16"]


def lora_parameters(config: Config, rank: int) -> int:
    """Trained numbers with LoRA on W_q and W_v of every layer: A is rank × d_in, B is d_out × rank."""
    total = 0
    for _ in range(config.layers):
        for d_out in (config.heads * config.head_dim, config.kv_heads * config.head_dim):
            total += rank * config.d_model + d_out * rank
    return total


def decode_ms(config: Config, batch: int) -> float:
    """Step time of the scaling book's table: context 8192, weights and cache in 16 bits, eight TPU v5e."""
    step = inference.decode_step(config, batch, 8192, V5E_BANDWIDTH)
    return 1e3 * step.seconds


def decode_gqa_ms() -> float:
    """The second table: a cache of a fifth of the heads at batch 64, beside the weights of the full model."""
    cache = 64 * 8192 * inference.kv_cache_bytes_per_token(LLAMA_13B_GQA)
    return 1e3 * (inference.weight_bytes(MODELS["llama-2-13b"]) + cache) / V5E_BANDWIDTH


def tpu_v1_tops(weights_per_op: float) -> float:
    """TPU v1, TOP/s that the roofline allows at so many multiply-accumulates a byte of weights."""
    tpu = hardware.find("tpu-v1")
    return roofline.attainable(2 * weights_per_op, tpu, "int8") / 1e12


def ridge_macs(machine: hardware.Hardware) -> float:
    """The ridge in multiply-accumulates a byte, as the TPU paper counts operations; an operation is half of one."""
    (dtype,) = machine.peak
    return roofline.ridge(machine, dtype) / 2


def checkpoint_gb() -> float:
    """NanoGPT 124M with AdamW in float32: the weights and two moments, GB."""
    state = transformer.state_bytes(transformer.parameters(NANO), mixed=False)
    return (state.weights + state.momentum + state.variance) / 1e9


def optimal_exponent(law: scaling_laws.Chinchilla) -> float:
    """The a of N_opt ∝ C^a, from two optima found a thousandfold apart."""
    from math import log

    (small, _), (large, _) = (law.compute_optimal(c) for c in (1e21, 1e24))
    return log(large / small) / log(1e3)


def refit_tokens() -> float:
    """Tokens for each parameter that the re-fitted law wants at Gopher's budget."""
    parameters, tokens = scaling_laws.BESIROGLU.compute_optimal(5.76e23)
    return tokens / parameters


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

CACHE = [
    Claim(
        name="opt-13b-kv-token",
        area="perf.inference",
        source=f"{VLLM}, section 3",
        what="KV cache of one token of OPT-13B in 16 bits",
        unit="KiB",
        published=800,
        digits=0,
        compute=lambda: inference.kv_cache_bytes_per_token(MODELS["opt-13b"]) / 1024,
    ),
    Claim(
        name="opt-13b-kv-request",
        area="perf.inference",
        source=f"{VLLM}, section 3",
        what="KV cache of a request of OPT-13B with all of its 2,048 tokens",
        unit="GiB",
        published=1.6,
        digits=1,
        compute=lambda: 2048 * inference.kv_cache_bytes_per_token(MODELS["opt-13b"]) / 2**30,
    ),
    Claim(
        name="vllm-slots-13b",
        area="perf.inference",
        source=f"{VLLM}, Table 1",
        what="KV slots of OPT-13B in the 12 GB that an A100-40GB has left",
        unit="K",
        published=15.7,
        digits=1,
        compute=lambda: inference.kv_slots(12 * 2**30, MODELS["opt-13b"]) / 1e3,
    ),
    Claim(
        name="vllm-slots-66b",
        area="perf.inference",
        source=f"{VLLM}, Table 1",
        what="KV slots of OPT-66B in the 21 GB that four A100-40GB have left",
        unit="K",
        published=9.7,
        digits=1,
        compute=lambda: inference.kv_slots(21 * 2**30, OPT_66B) / 1e3,
        tolerance=0.02,
        expected="approximate",
        reason="the paper prints the memory left in whole GB: 21.3 would give 9.7",
    ),
    Claim(
        name="vllm-slots-175b",
        area="perf.inference",
        source=f"{VLLM}, Table 1",
        what="KV slots of OPT-175B in the 264 GB that eight A100-80GB have left",
        unit="K",
        published=60.1,
        digits=1,
        compute=lambda: inference.kv_slots(264 * 2**30, OPT_175B) / 1e3,
    ),
    Claim(
        name="kv-deepseek-v3",
        area="perf.inference",
        source=DEEPSEEK_INSIGHTS,
        what="KV cache of one token of DeepSeek-V3 (latent attention) in 16 bits",
        unit="KB",
        published=70.272,
        digits=3,
        compute=lambda: inference.kv_cache_bytes_per_token(MODELS["deepseek-v3"]) / 1e3,
    ),
    Claim(
        name="kv-qwen-72b",
        area="perf.inference",
        source=DEEPSEEK_INSIGHTS,
        what="KV cache of one token of Qwen-2.5 72B (grouped queries) in 16 bits",
        unit="KB",
        published=327.680,
        digits=3,
        compute=lambda: inference.kv_cache_bytes_per_token(QWEN_72B) / 1e3,
    ),
    Claim(
        name="kv-llama-405b",
        area="perf.inference",
        source=DEEPSEEK_INSIGHTS,
        what="KV cache of one token of Llama-3.1 405B (grouped queries) in 16 bits",
        unit="KB",
        published=516.096,
        digits=3,
        compute=lambda: inference.kv_cache_bytes_per_token(LLAMA_405B) / 1e3,
    ),
    *(
        Claim(
            name=f"decode-13b-batch-{batch}",
            area="perf.inference",
            source=f"{SCALING_BOOK}, first table of the LLaMA 2-13B section",
            what=f"least time of a decode step, Llama-2-13B, 8,192 tokens of context, batch {batch}, eight TPU v5e",
            unit="ms",
            published=published,
            digits=2,
            compute=lambda batch=batch: decode_ms(MODELS["llama-2-13b"], batch),  # type: ignore[misc]
            tolerance=0.01,
            expected="approximate",
            reason="the book rounds the weights to 26 GB and the cache of a sequence to 6.7 GB",
        )
        for batch, published in ((1, 4.98), (64, 69.33), (240, 249.09))
    ),
    Claim(
        name="decode-13b-gqa",
        area="perf.inference",
        source=f"{SCALING_BOOK}, second table of the LLaMA 2-13B section",
        what="the same at batch 64 with a fifth of the key/value heads",
        unit="ms",
        published=17.04,
        digits=2,
        compute=decode_gqa_ms,
        tolerance=0.01,
        expected="approximate",
        reason="rounded as above; the book keeps the full model's weights, and so do we",
    ),
]

# name, multiply-accumulates a byte (Table 1), measured TOP/s (Table 3), and what ours has to be
TPU_WORKLOADS: tuple[tuple[str, float, float, Status, str], ...] = (
    ("mlp0", 200, 12.3, "approximate", "a bound, nearly reached: it only streams weights"),
    ("mlp1", 168, 9.7, "approximate", "a bound, nearly reached: it only streams weights"),
    (
        "lstm1",
        96,
        2.8,
        "disagrees",
        "a bound: small matrices and dependent steps leave the matrix unit waiting",
    ),
    ("cnn0", 2888, 86.0, "approximate", "a bound, nearly reached: compute binds"),
    (
        "cnn1",
        1750,
        14.1,
        "disagrees",
        "a bound: shallow layers and fully connected ones leave most of the matrix unit idle",
    ),
)

ROOFLINES = [
    Claim(
        name="tpu-v1-ridge",
        area="perf.roofline",
        source=f"{TPU}, Figure 5",
        what="ridge of TPU v1, multiply-accumulates a byte of weights",
        unit="MAC/B",
        published=1350,
        digits=-1,
        compute=lambda: ridge_macs(hardware.find("tpu-v1")),
    ),
    Claim(
        name="haswell-ridge",
        area="perf.roofline",
        source=f"{TPU}, Figure 6",
        what="ridge of an 18-core Haswell, 1.3 TFLOP/s and 51 GB/s",
        unit="MAC/B",
        published=13,
        digits=0,
        compute=lambda: ridge_macs(HASWELL),
    ),
    Claim(
        name="k80-ridge",
        area="perf.roofline",
        source=f"{TPU}, Figure 7",
        what="ridge of one die of a K80, 2.8 TFLOP/s and 160 GB/s",
        unit="MAC/B",
        published=9,
        digits=0,
        compute=lambda: ridge_macs(K80),
    ),
    *(
        Claim(
            name=f"tpu-v1-{name}",
            area="perf.roofline",
            source=f"{TPU}, Tables 1 and 3",
            what=f"TOP/s of {name.upper()} on TPU v1 ({intensity} MAC/B): ours the roofline's bound, theirs measured",
            unit="TOP/s",
            published=published,
            digits=1,
            compute=lambda intensity=intensity: tpu_v1_tops(intensity),  # type: ignore[misc]
            tolerance=0.20,
            expected=expected,
            reason=reason,
        )
        for name, intensity, published, expected, reason in TPU_WORKLOADS
    ),
]

LAWS = [
    Claim(
        name="chinchilla-exponent",
        area="perf.scaling_laws",
        source=f"{CHINCHILLA}, Table 2, approach 3",
        what="a of N ∝ C^a, minimising the fitted loss",
        unit="",
        published=0.46,
        digits=2,
        compute=lambda: optimal_exponent(scaling_laws.CHINCHILLA),
        tolerance=0.03,
        expected="approximate",
        reason="the printed α and β have two digits",
    ),
    Claim(
        name="chinchilla-refit-tokens",
        area="perf.scaling_laws",
        source=f"{CHINCHILLA}, section 4 (Chinchilla: 70 B parameters, 1.4 T tokens)",
        what="tokens for each parameter: Chinchilla's own; ours by the law that Besiroglu et al. 2024 fitted again",
        unit="",
        published=20,
        digits=0,
        compute=refit_tokens,
        tolerance=0.10,
        expected="approximate",
        reason="the re-fit (arXiv:2404.10102) is of the same runs; Chinchilla followed the first two approaches",
    ),
]

CLAIMS = [*SIZES, *FLOPS, *CACHE, *ROOFLINES, *LAWS]
