"""A linear layer whose matrix is quantized, in place of an `nn.Linear`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlsys.quant import llm_int8
from mlsys.quant._scheme import Scheme
from mlsys.quant._tensor import QuantizedTensor
from mlsys.quant.llm_int8 import Kept
from mlsys.quant.packing import packed_bytes
from mlsys.quant.qlinear import PreparedWeight, prepare, qlinear

PARTS = ("codes", "scale", "zero")


class QuantizedLinear(nn.Module):
    """y = qlinear(x, Ŵ) + b. All that it holds are buffers: nothing in it is trained.

    quantized:    Ŵ (out, in). A method may have quantized another matrix than W, and says so by the next two:
    divisor:      s (in,): inputs are divided by it first, so that Ŵ ≈ W · diag(s) (AWQ, SmoothQuant).
    threshold:    columns of x with a number as large as this are multiplied as floats (LLM.int8()); None: none are.
    outliers:     columns of W as they were, which always are.
    activations:  None, or "int8": each row of inputs is rounded before it is multiplied.
    dtype:        of `weight`, for models that read it themselves.

    A cast of the model, `.to(torch.bfloat16)`, changes `dtype` only: the scheme says what buffers are. Outputs have the
    dtype of the inputs.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        divisor: Tensor | None = None,
        outliers: Kept | None = None,
        threshold: float | None = None,
        activations: Literal["int8"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = quantized.shape
        self.threshold = threshold
        self.activations = activations
        self.description = describe(quantized)
        for name, part in parts(quantized).items():
            self.register_buffer(name, part)
        columns, kept = (outliers.columns, outliers.weights) if outliers is not None else (None, None)
        self.bias: Tensor | None
        self.divisor: Tensor | None
        self.outlier_columns: Tensor | None
        self.outlier_weight: Tensor | None
        for name, tensor in (
            ("bias", bias),
            ("divisor", divisor),
            ("outlier_columns", columns),
            ("outlier_weight", kept),
        ):
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        self._prepared: PreparedWeight | None = None

    @property
    def quantized(self) -> QuantizedTensor:
        """Ŵ; it shares memory with the buffers."""
        return restore({name: b for name, b in self._buffers.items() if b is not None}, self.description)

    @property
    def weight(self) -> Tensor:
        """The matrix that inputs are multiplied with in all, written out anew (out, in)."""
        return self.dequantize().to(self.dtype)

    def dequantize(self) -> Tensor:
        """The same in float32."""
        w = self.quantized.dequantize()
        if self.divisor is not None:
            w = w / self.divisor
        if self.outlier_columns is not None and self.outlier_weight is not None:
            w = w.index_copy(1, self.outlier_columns, self.outlier_weight.float())
        return w

    @property
    def nbytes(self) -> int:
        """Of all buffers but the bias."""
        return sum(b.nbytes for name, b in self._buffers.items() if b is not None and name != "bias")

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (out · in)."""
        return 8 * self.nbytes / max(self.out_features * self.in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._weight(), self.bias
        if self.divisor is not None:
            wide = torch.promote_types(x.dtype, torch.float32)  # in 16 bits the divisor would be rounded first
            x = (x.to(wide) / self.divisor).to(x.dtype)
        if self.threshold is None:
            return qlinear(x, weight, bias, activations=self.activations)
        kept = None
        if self.outlier_columns is not None and self.outlier_weight is not None:
            kept = Kept(self.outlier_columns, self.outlier_weight)
        return llm_int8.linear(x, weight, bias, threshold=self.threshold, kept=kept)

    def _weight(self) -> PreparedWeight:
        """What was prepared in the first call; anew, if a buffer has been replaced or changed in place since."""
        prepared = self._prepared
        if prepared is None or prepared.stale or not self._made_of(prepared.weight):
            self._prepared = prepared = prepare(self.quantized)
        return prepared

    def _made_of(self, quantized: QuantizedTensor) -> bool:
        return all(part is self._buffers[name] for name, part in parts(quantized).items())

    def extra_repr(self) -> str:
        """For `print(module)`."""
        text = f"{self.in_features}, {self.out_features}, {self.description['scheme']}, bias={self.bias is not None}"
        if self.activations:
            text += f", activations={self.activations}"
        if self.divisor is not None:
            text += ", inputs divided"
        return text if self.outlier_columns is None else text + f", {len(self.outlier_columns)} outlier columns"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Devices change, dtypes do not."""
        self._prepared = None  # it points into the buffers as they were
        before = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device)).dtype  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})["description"] = self.description

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Codes of another scheme are numbers of another meaning: refused, where `copy_` would take them."""
        self._prepared = None
        other = local_metadata.get("description", self.description)
        if other != self.description:
            errors.append(
                f"{prefix[:-1]}: the state is of {other['scheme']}, and the layer {self.description['scheme']}"
            )
            return
        for name, own in self._buffers.items():
            given = state_dict.get(prefix + name)
            if own is not None and isinstance(given, Tensor) and given.dtype != own.dtype:
                errors.append(f"{prefix}{name}: {given.dtype} in the state, {own.dtype} in the layer")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was prepared holds addresses."""
        return {**self.__dict__, "_prepared": None}


def parts(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that it is made of, by name: codes, scale, zero; scale_codes … where scales are quantized."""
    found = {"codes": quantized.codes}
    if isinstance(quantized.scale, QuantizedTensor):
        found |= {f"scale_{name}": part for name, part in parts(quantized.scale).items()}
    elif quantized.scale is not None:
        found["scale"] = quantized.scale
    if quantized.zero is not None:
        found["zero"] = quantized.zero
    return found


def describe(quantized: QuantizedTensor) -> dict[str, Any]:
    """What else it is, for JSON: scheme and shape, and those of its scales."""
    scale = quantized.scale
    nested = {"scale": describe(scale)} if isinstance(scale, QuantizedTensor) else {}
    return {"scheme": str(quantized.scheme), "shape": list(quantized.shape), **nested}


def restore(tensors: Mapping[str, Tensor], description: Mapping[str, Any], prefix: str = "") -> QuantizedTensor:
    """The record of `parts` and `describe`. ValueError if its tensors are not those of its scheme and shape."""
    scale: Tensor | QuantizedTensor | None = tensors.get(f"{prefix}scale")
    if "scale" in description:
        scale = restore(tensors, description["scale"], f"{prefix}scale_")
    scheme, shape = Scheme.parse(description["scheme"]), tuple(int(n) for n in description["shape"])
    record = QuantizedTensor(tensors[f"{prefix}codes"], scale, tensors.get(f"{prefix}zero"), shape, scheme)
    _check(record, prefix)
    return record


def _check(record: QuantizedTensor, prefix: str) -> None:
    """ValueError unless all parts have the sizes that scheme and shape say: compiled code reads them unseen."""
    rows, columns, scheme = record.rows, record.columns, record.scheme
    wide = scheme.bits > 8
    want = (rows, columns if wide else packed_bytes(columns, scheme.bits))
    if tuple(record.codes.shape) != want or record.codes.dtype != (torch.int16 if wide else torch.uint8):
        raise ValueError(f"{prefix}codes are {record.codes.dtype} {tuple(record.codes.shape)}, and should be {want}")
    groups = {(1, 1)} if scheme.group == "tensor" else {(rows, scheme.groups(columns))}
    scales = record.scale
    if isinstance(scales, QuantizedTensor):
        fits = math.prod(scales.shape) in {math.prod(size) for size in groups}  # double-quantized ones lie in one row
    else:
        fits = (scheme.scales == "none") if scales is None else tuple(scales.shape) in groups
    if not fits:
        raise ValueError(f"{prefix}scale has a shape that {scheme} of {rows} × {columns} does not have")
    if record.zero is not None and tuple(record.zero.shape) not in groups | {(1, 1)}:
        raise ValueError(f"{prefix}zero has shape {tuple(record.zero.shape)}, not that of the scales")


def from_tensors(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> QuantizedLinear:
    """The layer whose buffers these are; `description` also says "activations" and "threshold"."""
    outliers = None
    if "outlier_columns" in tensors:
        outliers = Kept(tensors["outlier_columns"], tensors["outlier_weight"])
    record = restore(tensors, description)
    rows, columns = record.shape
    for name, size in (("bias", rows), ("divisor", columns)):
        if name in tensors and tuple(tensors[name].shape) != (size,):
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, and should have ({size},)")
    if outliers is not None:
        where = outliers.columns
        inside = where.dtype == torch.int64 and where.ndim == 1 and bool(((where >= 0) & (where < columns)).all())
        if not inside or tuple(outliers.weights.shape) != (rows, len(where)):
            raise ValueError(f"outlier_columns and outlier_weight are not those of a layer {rows} × {columns}")
    with torch.no_grad():
        return QuantizedLinear(
            record,
            tensors.get("bias"),
            divisor=tensors.get("divisor"),
            outliers=outliers,
            threshold=description.get("threshold"),
            activations=description.get("activations"),
        )
