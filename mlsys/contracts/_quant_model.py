"""What quantizing a whole module must do: each layer that is not excluded, for the inputs of the module as it was.

The implementation is anything called as `quantize_(module, scheme, method, calibration=batches, exclude=patterns)`,
which changes `module` in place. `method` is "rtn" (the nearest codes, no calibration) or "gptq" (the paper's Algorithm
1 on the grid of round-to-nearest, with 1% damping, and H of the layer's inputs in eval mode). Layers are calibrated on
what the module gives them before any of it is quantized. Judged are:

- what the module gives for new inputs afterwards, in eval mode;
- that the mode it was in (here: train) and the calibration inputs are as they were.

How layers are stored is not judged: writing Ŵ back into `nn.Linear` will do.

See also:
    `mlsys.quant.model`, `mlsys.contracts.core`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mlsys.contracts import _quant_gptq
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong

SIGNATURE = "quantize_(module, scheme, method, calibration=batches or None, exclude=[patterns]) -> anything"
WIDTHS = {"up": (18, 12), "block.0": (10, 18), "block.2": (7, 10)}  # (out, in)
BATCHES, ROWS = 3, 20
NEAR = 1e-4  # of the largest output


class Module(nn.Module):
    """Three layers, two of them inside another module, and dropout, which calibration must not see."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 18)
        self.dropout = nn.Dropout(0.5)
        self.block = nn.Sequential(nn.Linear(18, 10), nn.Tanh(), nn.Linear(10, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block(self.dropout(torch.relu(self.up(x))))
        return y


def case(scheme: str, method: str = "rtn", *, exclude: str = "") -> Case:
    """One case; `exclude` is a pattern."""
    return {"scheme": scheme, "method": method, "exclude": exclude}


CASES = [
    case("int4"),
    case("int8:sym", exclude="block.2"),
    case("int3:g6"),
    case("int3:g5", exclude="block.*"),
    case("int4", "gptq"),
    case("int3:g6:sym", "gptq"),
    case("int2:g5", "gptq", exclude="up"),
    case("int3", "gptq", exclude="*.0"),
]


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """Weights and biases by name, correlated calibration inputs (batches, rows, 12), and new ones."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, (rows, columns) in WIDTHS.items():
        weights[f"{name}.weight"] = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        weights[f"{name}.bias"] = 0.3 * rng.standard_normal(rows)
    x = rng.standard_normal((BATCHES * ROWS + 8, 5)) @ rng.standard_normal((5, 12))
    x += 0.2 * rng.standard_normal(x.shape)
    x *= np.repeat([0.4, 1.0, 2.0, 1.0], [ROWS, ROWS, ROWS, 8])[:, None]  # batches are not alike
    tensors = {name: torch.from_numpy(w).float().to(device) for name, w in weights.items()}
    batches, new = torch.from_numpy(x).float().to(device).split([BATCHES * ROWS, 8])
    return {**tensors, "batches": batches.reshape(BATCHES, ROWS, 12), "x": new, **case}


def build(given: Mapping[str, Any]) -> Module:
    """The module of these weights, in train mode."""
    module = Module().to(given["x"].device)
    module.load_state_dict({name: given[name].clone() for name in module.state_dict()})
    return module.train()


def call(impl: Callable[..., Any], given: Inputs) -> Results:
    """The module's outputs, the calibration inputs and the mode, after it was quantized."""
    module = build(given)
    batches = list(given["batches"].clone())
    calibration = batches if given["method"] == "gptq" else None
    random = torch.get_rng_state()
    torch.manual_seed(0)  # if dropout is on, it is always the same
    try:
        impl(module, given["scheme"], given["method"], calibration=calibration, exclude=patterns(given))
    finally:
        torch.set_rng_state(random)
    modes = np.array([float(part.training) for part in module.children()])
    with torch.no_grad():
        out = module.eval()(given["x"])
    if not isinstance(out, torch.Tensor):
        raise Mismatch(f"the module gives {type(out).__name__} afterwards, expected a tensor")
    return {"out": out, "modes": modes, "calibration": torch.stack(batches)}


def patterns(given: Mapping[str, Any]) -> list[str]:
    """As `exclude` takes them."""
    return [given["exclude"]] if given["exclude"] else []


def oracle(given: Inputs) -> dict[str, np.ndarray]:
    """Layer by layer in float64: inputs of the module as it was, then codes of each layer by themselves."""
    exact = {name: t.cpu().double().numpy() for name, t in given.items() if isinstance(t, torch.Tensor)}

    def forward(x: np.ndarray, changed: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        seen = {}
        for name, act in (("up", lambda y: np.maximum(y, 0)), ("block.0", np.tanh), ("block.2", lambda y: y)):
            seen[name] = x
            x = act(x @ changed.get(name, exact[f"{name}.weight"]).T + exact[f"{name}.bias"])
        return seen, x

    seen, _ = forward(exact["batches"].reshape(-1, 12), {})
    rounded = {}
    for name in WIDTHS:
        if any(fnmatchcase(name, pattern) for pattern in patterns(given)):
            continue
        H = torch.from_numpy(seen[name].T @ seen[name])
        w = torch.from_numpy(exact[f"{name}.weight"])
        rounded[name] = _quant_gptq.plain(w, H, given["scheme"], alone=given["method"] == "rtn").double().numpy()
    _, out = forward(exact["x"], rounded)
    return {"out": out, "modes": np.ones(3), "calibration": exact["batches"]}


def tolerance(given: Inputs, name: str, want: np.ndarray) -> float:
    """Outputs to float32's precision; modes and calibration inputs are as they were."""
    return NEAR * float(np.abs(want).max()) if name == "out" else 0.0


def plain(
    module: nn.Module,
    scheme: str,
    method: str,
    *,
    calibration: list[torch.Tensor] | None = None,
    exclude: list[str] | None = None,
    no_bias: bool = False,
    all_layers: bool = False,
    along_out: bool = False,
    one_group: bool = False,
    stale: bool = False,
    dropout: bool = False,
    first: bool = False,
    last: bool = False,
    centred: bool = False,
    outputs: bool = False,
    in_place: bool = False,
    eval_after: bool = False,
    top_only: bool = False,
    biased: bool = False,
) -> None:
    """As short as it can be, with places to go wrong."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    modes = {part: part.training for part in module.modules()}
    module.train(dropout)
    batches = calibration or []
    if in_place:
        for batch in batches:
            batch.div_(2)
    used = batches[:1] if first else batches[-1:] if last else batches
    chosen = {
        name: layer
        for name, layer in layers.items()
        if (all_layers or not any(fnmatchcase(name, pattern) for pattern in exclude or []))
        and not (top_only and "." in name)
    }
    new: dict[str, torch.Tensor] = {}
    for name, layer in chosen.items():
        w = layer.weight.detach()
        columns = w.shape[1]
        H = torch.eye(columns, dtype=torch.float64, device=w.device)
        if method == "gptq":
            H = H * 0
            given: list[torch.Tensor] = []
            handle = layer.register_forward_hook(
                lambda _, x, y, given=given: given.append((y if outputs else x[0]).detach().double())
            )
            with torch.no_grad():
                for batch in used:
                    module(batch)
            handle.remove()
            for x in given:
                if outputs:  # of another width: as many as there are
                    x = torch.nn.functional.pad(x, (0, max(0, columns - x.shape[1])))[:, :columns]
                if centred:
                    x = x - x.mean(dim=0)
                H += x.T @ x
        alone = method != "gptq"
        if one_group:
            scheme = ":".join(part for part in scheme.split(":") if part[0] != "g" or part == "gptq")
        if along_out:
            rounded = _quant_gptq.plain(w.T.cpu(), torch.eye(len(w)).double(), scheme, alone=True).T
        else:
            rounded = _quant_gptq.plain(w.cpu(), H.cpu(), scheme, alone=alone)
        new[name] = rounded.to(w)
        if stale:
            layer.weight.data.copy_(new[name])
        if biased and layer.bias is not None:
            layer.bias.data.copy_(
                _quant_gptq.plain(layer.bias.data[None].cpu(), torch.eye(len(w)).double(), scheme, alone=True)[0]
            )
    for name, rounded in new.items():
        chosen[name].weight.data.copy_(rounded)
        if no_bias:
            chosen[name].bias.data.zero_()
    for part, training in modes.items():
        part.training = training and not eval_after


def _wrong(hint: str, **knobs: Any) -> Wrong:
    return Wrong(partial(plain, **knobs), hint)


WRONG = {
    "no_bias": _wrong("the new layer adds the bias of the old one", no_bias=True),
    "bias_rounded": _wrong("only weights are quantized; biases are few, and stay floats", biased=True),
    "excluded_too": _wrong("layers whose names match `exclude` stay as they are", all_layers=True),
    "top_only": _wrong("look at named_modules(), not only at the module's own children", top_only=True),
    "along_out": _wrong("weights are (out, in), and groups lie along in: rows, not columns", along_out=True),
    "one_group": _wrong("each group of g columns has a scale of its own", one_group=True),
    "changed_before": _wrong(
        "calibrate all layers before any is changed: this one's inputs came from layers already quantized", stale=True
    ),
    "dropout": _wrong("calibrate in eval mode: dropout was on", dropout=True),
    "first_batch": _wrong("H is the sum over all batches, not that of the first", first=True),
    "last_batch": _wrong("H is the sum over all batches, not that of the last", last=True),
    "centred": _wrong("H is Σ x xᵀ, no covariance: leave the mean in", centred=True),
    "outputs": _wrong("H is that of what the layer is given, not of what it gives: a forward *pre*-hook", outputs=True),
    "inputs_changed": _wrong("calibration inputs belong to the caller: do not change them in place", in_place=True),
    "left_in_eval": _wrong("put each part back into the mode, train or eval, that it was in", eval_after=True),
}


def contract(name: str, reference: Callable[..., Any]) -> Contract:
    """The contract of quantizing a module, for this implementation."""
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=reference,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=tolerance,
        wrong=WRONG,
    )
