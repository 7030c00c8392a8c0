"""Published numbers about inference: the bytes of KV caches, the requests that fit, the time of a decoding step."""

from __future__ import annotations

from dataclasses import replace

from mlsys.claims.core import Claim
from mlsys.perf import inference
from mlsys.perf.configs import MODELS, Config, gpt, llama

VLLM = "Kwon et al. 2023, arXiv:2309.06180"
SCALING_BOOK = "Austin et al. 2025, How to Scale Your Model, Inference"
DEEPSEEK_INSIGHTS = "Zhao et al. 2025, arXiv:2505.09343, Table 1"

OPT_66B = gpt(64, 9216, 72, vocab=50272, context=2048)
OPT_175B = gpt(96, 12288, 96, vocab=50272, context=2048)
LLAMA_405B = llama(126, 16384, 128, 53248, vocab=128256, context=8192, kv_heads=8)
QWEN_72B = llama(80, 8192, 64, 29568, vocab=152064, context=32768, kv_heads=8)
# The Llama-2-13B of the scaling book's table with its key/value heads cut to a fifth, 40 to 8
LLAMA_13B_GQA = replace(MODELS["llama-2-13b"], kv_heads=8)
V5E_BANDWIDTH = 8 * 8.2e11  # bytes/s: the eight TPU v5e chips of that table, at the bandwidth that it states


def decode_ms(config: Config, batch: int) -> float:
    """Step time of the scaling book's table: context 8192, weights and cache in 16 bits, eight TPU v5e."""
    step = inference.decode_step(config, batch, 8192, V5E_BANDWIDTH)
    return 1e3 * step.seconds


def decode_gqa_ms() -> float:
    """The second table: a cache of a fifth of the heads at batch 64, beside the weights of the full model."""
    cache = 64 * 8192 * inference.kv_cache_bytes_per_token(LLAMA_13B_GQA)
    return 1e3 * (inference.weight_bytes(MODELS["llama-2-13b"]) + cache) / V5E_BANDWIDTH


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
