"""Training a language model so that being killed costs seconds: one file holds all that the next step depends on.

A model learns to give the next token of real text a high probability. Step i of n takes a batch of b windows of
t + 1 tokens, and moves the weights θ against the gradient g of the mean loss:

    loss = −mean log p(next token)                                  nats a token; e^loss is the perplexity
    g    ← g · min(1, clip / ‖g‖)                                   one bad batch may not throw the weights far
    m    ← β₁ m + (1 − β₁) g                                        mean of the gradient
    v    ← β₂ v + (1 − β₂) g²                                       mean of its square
    θ    ← θ − η(i) · (m̂ / (√v̂ + ε) + λ θ)                          AdamW; λ for matrices only
    η(i) : rises linearly for the first steps, then falls along a cosine to a tenth

m̂ = m / (1 − β₁^(i+1)) and v̂ alike make up for starting from 0. Norms' weights and
biases are not decayed: pulling a scale towards 0 does not make a model simpler.

**Resuming is bit-equal**: k steps, a kill, and m more steps give the very weights of k + m steps. For that, the next
step must be a function of what the file holds, and of nothing else:

- θ, m, v and i are in the file. That is the whole state: there is no dropout.
- A batch is a pure function of (seed, i), by a counter-based generator (Philox). So there is no generator state to
  save, no position in an epoch, and any batch can be drawn again to look at it.
- η depends on i and on the planned number of steps, never on the clock. A budget in minutes is turned into a number
  of steps once, before the first, and that number is in the file; were it measured anew, another part of the cosine
  would follow.
- Floating-point sums depend on their order, and that on the number of threads, on torch's version and on the CPU's
  vector width. The file records them, and `Trainer.resume` refuses others unless told that bit-equality may go.
- The file is replaced all at once (`mlsys.files.write_atomic`), so a kill during a save leaves the one before.

The optimizer is `torch.optim.AdamW`, what a project would use: its state is plain tensors that can be read and put
back by name, and its fused form takes half the time of a loop in Python. On a GPU, some backward kernels add in no
fixed order; bit-equality there also needs `torch.use_deterministic_algorithms(True)`, which is the caller's to set.

Cost:
    A step is about 6 · parameters · b · t FLOPs in matmuls, plus attention's; AdamW reads and writes each parameter
    once. A checkpoint is one write of 12 bytes a parameter, and a checksum of them.

Memory:
    16 bytes a parameter in float32: θ, g, m, v; and the activations. While saving, up to 24 more: the bytes of each
    tensor, and the file made of them.

Papers:
    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (AdamW: decay apart from the gradient).
    Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5 (cosine schedule).
    Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC (Philox: random numbers by counting).
    Brown et al. 2020, arXiv:2005.14165, appendix B (β₂ = 0.95, λ = 0.1, clipping at 1, cosine to a tenth).

See also:
    `mlsys train` (which drives it), `mlsys.models.transformer` (the model), `mlsys.data.text` (the tokens).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn

from mlsys.files import write_atomic
from mlsys.models.transformer import Transformer

FORMAT = 1
Stream = npt.NDArray[np.integer[Any]]


class CheckpointError(ValueError):
    """The file is no checkpoint, is damaged, or belongs to another run: the message says which and what to do."""


class Diverged(ValueError):
    """The loss or the gradient is no longer a number; the weights are those of the last good step."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, beside the model's first weights and the tokens.

    steps:        how many there will be: the schedule depends on it.
    batch:        windows in a batch.
    seq:          tokens in a window.
    lr:           the highest learning rate.
    warmup:       share of the steps in which it rises to that.
    floor:        what it falls to at the last step, as a share of `lr`.
    betas:        of the running means of gradient and square.
    eps:          added to the root of the square.
    weight_decay: λ, of matrices.
    clip:         largest norm of the whole gradient.
    seed:         of the batches.
    """

    steps: int
    batch: int = 16
    seq: int = 128
    lr: float = 3e-3
    warmup: float = 0.05
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed!r}: a whole number from 0 to 2⁶⁴ − 1 is needed")
        for name in ("lr", "eps", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: a number above 0 is needed")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay!r}: a number of at least 0 is needed")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: a share between 0 and 1 is needed")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas!r}: two numbers from 0 to below 1 are needed")


def learning_rate(step: int, config: TrainConfig) -> float:
    """η of this step (from 0): linear to `lr` over the warm-up, then a cosine to `floor · lr` at the last step."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(config.steps - 1 - warmup, 1)  # 0 … 1
    return config.lr * (config.floor + (1 - config.floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters to decay (matrices, embeddings) and those not to (norms' weights, biases), each once."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied matrix is yielded once
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


class Batches:
    """Windows of a token stream at random places: batch i is a pure function of (seed, i).

    Philox turns a counter into random bits, with no state beside the counter. Its raw bits are used rather than a
    generator's `integers`, whose results NumPy may change between versions.
    """

    def __init__(self, stream: Stream, batch: int, seq: int, seed: int = 0) -> None:
        if stream.ndim != 1 or stream.dtype.kind not in "iu":
            raise ValueError(f"stream must be a flat array of integers, got {stream.dtype} of shape {stream.shape}")
        if len(stream) <= seq:
            raise ValueError(
                f"stream holds {len(stream)} tokens: a window of seq={seq} and its targets need {seq + 1}; "
                "give more text, or a smaller seq"
            )
        self.stream, self.batch, self.seq, self.seed = stream, batch, seq, seed

    def __call__(self, step: int) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Inputs and targets (each input's next token) of this step, from 0."""
        bits = np.random.Philox(key=self.seed, counter=step << 64).random_raw(self.batch)  # steps are 2⁶⁴ blocks apart
        starts = bits % np.uint64(len(self.stream) - self.seq)
        return _windows(self.stream, starts.astype(np.int64), self.seq)


def _windows(stream: Stream, starts: npt.NDArray[np.int64], seq: int) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(stream[starts[:, None] + np.arange(seq + 1)].astype(np.int64))  # (b, seq + 1)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model: Transformer, stream: Stream, seq: int, *, windows: int | None = None, batch: int = 16) -> float:
    """Mean loss in nats a token over windows of `seq` tokens, side by side; at most `windows`, evenly spread.

    Always the same ones, so that two evaluations can be compared. The first tokens of a window have little to go
    by, so the loss is above that of one long context. ValueError if the stream is shorter than seq + 1.
    """
    count = (len(stream) - 1) // seq
    if count < 1:
        raise ValueError(
            f"stream holds {len(stream)} tokens: seq={seq} needs {seq + 1}; give more text or a smaller seq"
        )
    chosen = np.arange(count) if windows is None else np.unique(np.linspace(0, count - 1, windows).astype(np.int64))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for first in range(0, len(chosen), batch):
        inputs, targets = _windows(stream, chosen[first : first + batch] * seq, seq)
        total += model.loss(inputs.to(device), targets.to(device)).item() * targets.numel()
    model.train(training)
    return total / (len(chosen) * seq)


def environment(device: torch.device) -> dict[str, Any]:
    """What the order of floating-point sums depends on beside the code."""
    vectors = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"torch": torch.__version__, "device": device.type, "threads": torch.get_num_threads(), "vectors": vectors}


class Trainer:
    """A run: the model, AdamW's moments, and how many steps are done (`done`).

    stream: the training tokens.
    notes:  anything JSON can hold that should travel in the checkpoint, such as where the text is from.

    Where gradients are from and who updates what is in `make_optimizer`, `gradients` and `update`: on several
    processes these are other ones, and everything else is the same (`mlsys train --parallel`).
    """

    def __init__(
        self, model: Transformer, stream: Stream, config: TrainConfig, notes: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.config, self.notes = model, config, dict(notes or {})
        self.device = next(model.parameters()).device
        self.batches = Batches(stream, config.batch, config.seq, config.seed)
        self.done = 0
        matrices, vectors = decay_groups(model)
        self.optimizer = self.make_optimizer(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True},
        )
        # AdamW would make these at its first step; made here, a run has the same tensors at every step.
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._stream_digest = _stream_digest(stream)

    def make_optimizer(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
        """AdamW over these groups of the model's parameters."""
        return torch.optim.AdamW(groups, **options)

    def gradients(self, inputs: Int[Tensor, "b t"], targets: Int[Tensor, "b t"]) -> tuple[float, float]:
        """Put the clipped gradient of the batch's mean loss where the optimizer reads it: the loss, and its norm."""
        loss = self.model.loss(inputs.to(self.device), targets.to(self.device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        return loss.item(), norm.item()

    def update(self) -> None:
        """Move the weights by the gradient."""
        self.optimizer.step()

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done."""
        return self.done >= self.config.steps

    def step(self) -> float:
        """Do one step and return the loss of its batch before it, in nats a token.

        ValueError if all steps are done; `Diverged`, with the weights unchanged, if the loss is not finite.
        """
        if self.finished:
            raise ValueError(
                f"all {self.config.steps} steps are done: a longer run is another run, with its own schedule"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss, norm = self.gradients(*self.batches(self.done))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"step {self.done}: the loss is {loss}, the gradient's norm {norm}; "
                f"a learning rate below lr={self.config.lr} or a longer warmup may hold"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.config)
        self.update()
        self.done += 1
        return loss

    def evaluate(self, stream: Stream, *, windows: int | None = None) -> float:
        """`evaluate` the model as it is now, on windows as long as those it is trained on."""
        return evaluate(self.model, stream, self.config.seq, windows=windows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the checkpoint, all at once: the same bytes for the same state."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        information = self.information()
        information["sha256"] = _digest(information, tensors)
        # One entry: safetensors writes several in an order that changes from process to process.
        metadata = {"training": json.dumps(information, sort_keys=True)}
        write_atomic(path, safetensors.torch.save(tensors, metadata=metadata))

    def information(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside its tensors, for JSON; `Checkpoint.of` reads it."""
        return {
            "format": FORMAT,
            "done": self.done,
            "config": asdict(self.config),
            "environment": environment(self.device),
            "stream": self._stream_digest,
            "notes": self.notes,
        }

    def check_same(self, checkpoint: Checkpoint, *, exact: bool = True) -> None:
        """Refuse a checkpoint of a run with other settings or tokens, and one of another environment if `exact`.

        Raises CheckpointError; of another environment (torch's version, threads, device, vector width), on which
        rounding depends, it warns if `exact` is false.
        """
        if checkpoint.config != self.config:
            different = [f.name for f in fields(TrainConfig) if _differs(f.name, checkpoint.config, self.config)]
            raise CheckpointError(f"{checkpoint.path} is of a run with other settings: {', '.join(different)}")
        if checkpoint.stream != self._stream_digest:
            raise CheckpointError(
                f"{checkpoint.path} is of a run on other tokens: the text or the tokenizer has changed; start a new run"
            )
        then, now = checkpoint.environment, environment(self.device)
        check_alike(checkpoint, then, now, exact=exact)

    def restore(self, checkpoint: Checkpoint, *, exact: bool = True) -> None:
        """Take over the state of a checkpoint of the same run; CheckpointError, also as `check_same`, of another."""
        self.check_same(checkpoint, exact=exact)
        own = self._tensors()
        shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
        for name in sorted({*own, *shapes}):
            mine = tuple(own[name].shape) if name in own else None
            if mine != shapes.get(name):
                raise CheckpointError(
                    f"{checkpoint.path} is of another model: {name} is {shapes.get(name, 'missing')} there and "
                    f"{mine or 'missing'} here"
                )
        with torch.no_grad():
            # Copied into memory that torch allocated, which is aligned: a matmul on memory that begins elsewhere
            # may add in another order.
            for name, tensor in own.items():
                tensor.copy_(checkpoint.tensors[name])
            for state in self.optimizer.state.values():
                state["step"].fill_(float(checkpoint.done))
        self.done = checkpoint.done

    @classmethod
    def resume(cls, path: str | os.PathLike[str], model: Transformer, stream: Stream, *, exact: bool = True) -> Trainer:
        """The run whose checkpoint is at `path`, ready for its next step; `model` has its architecture, any weights.

        Raises as `read` and `Trainer.restore` do.
        """
        checkpoint = read(path)
        trainer = cls(model, stream, checkpoint.config, checkpoint.notes)
        trainer.restore(checkpoint, exact=exact)
        return trainer

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name: weights, AdamW's two means, and buffers that the model wants saved."""
        aliases = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.model.named_parameters()}
        tensors |= {f"model.{name}": t for name, t in self.model.state_dict().items() if name not in aliases}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                state = self.optimizer.state[parameter]
                tensors |= {f"mean.{name}": state["exp_avg"], f"square.{name}": state["exp_avg_sq"]}
        return tensors


def check_alike(checkpoint: Checkpoint, then: Mapping[str, Any], now: Mapping[str, Any], *, exact: bool) -> None:
    """Refuse, or if not `exact` warn of, what rounding depends on and what is not now as it was then."""
    changed = [f"{key} {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]]
    if changed:
        problem = f"{checkpoint.path} cannot be continued bit-equally: {'; '.join(changed)}"
        if exact:
            raise CheckpointError(f"{problem}; restore them, or resume with exact=False")
        warnings.warn(problem, stacklevel=4)  # of who restores


def _differs(name: str, a: TrainConfig, b: TrainConfig) -> bool:
    return bool(getattr(a, name) != getattr(b, name))


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds; `done` is the number of steps behind it, `stream` a digest of the tokens."""

    path: Path
    done: int
    config: TrainConfig
    environment: Mapping[str, Any]
    stream: str
    notes: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, path: Path, information: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
        """From what `Trainer.information` says, and the tensors."""
        config = information["config"]
        return cls(
            path=path,
            done=information["done"],
            config=TrainConfig(**{**config, "betas": tuple(config["betas"])}),
            environment=information["environment"],
            stream=information["stream"],
            notes=information["notes"],
            tensors=tensors,
        )


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a file. FileNotFoundError if there is none; CheckpointError if it is not whole."""
    file = Path(path)
    data = file.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        information = json.loads(_metadata(data)["training"])
        version, checksum = information["format"], information.pop("sha256")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no checkpoint, or is damaged ({error}); start the run again") from None
    if version != FORMAT:
        raise CheckpointError(f"{file} has format {version}, this version reads {FORMAT}; start the run again")
    if _digest(information, tensors) != checksum:
        raise CheckpointError(f"{file} is damaged: its checksum is wrong; start the run again")
    return Checkpoint.of(file, information, tensors)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of length, then JSON (the library reads it from a path only)."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    return header["__metadata__"]


def _digest(information: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(information, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _stream_digest(stream: Stream) -> str:
    return hashlib.sha256(stream.astype("<u4").data).hexdigest()
