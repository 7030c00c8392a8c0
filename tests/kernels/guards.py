"""Memory that shows what a kernel should not have done: poison where it must write, fences where it must not.

    with Fences() as fences:
        x = fences.around(x)        # a copy of x, with its strides, between two fences of NaN
        out = kernel(x)             # what it allocates inside is fenced too, and full of NaN until it is written
    # here: AssertionError if a fence was written to

A load beyond a tensor brings in a NaN; a store beyond it changes a fence; a place that is not stored to stays NaN. The
fences of whole numbers are the least that their dtype has. Used as `import_file(Path(...) / "guards.py").Fences`.
"""

import torch
from torch.overrides import TorchFunctionMode

MARGIN = 4096  # numbers on either side: more than a block that is off by one reaches over
EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
FILLED = {torch.zeros, torch.zeros_like, torch.full, torch.full_like, torch.ones, torch.ones_like}
FILLED |= {torch.Tensor.new_zeros, torch.Tensor.new_full, torch.Tensor.new_ones}


class Fences(TorchFunctionMode):
    """While it is entered, every tensor that is allocated lies between fences; they are looked at when it is left."""

    def __init__(self):
        super().__init__()
        self.buffers = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in EMPTY:
            return self.around(result, copy=False)
        return self.around(result) if func in FILLED else result

    def around(self, x, copy=True):
        """A tensor of x's shape and strides between fences: a copy of x, or nothing but poison."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if not x.numel():
                return x
            extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            buffer = torch.full((extent + 2 * MARGIN,), poison(x.dtype), dtype=x.dtype, device=x.device)
            self.buffers.append((buffer, extent))
            inside = torch.as_strided(buffer, x.shape, x.stride(), MARGIN)
            if copy:
                inside.copy_(x)
        return inside.requires_grad_(x.requires_grad)

    def check(self):
        """AssertionError if a fence is not as it was."""
        with torch._C.DisableTorchFunction():
            for buffer, extent in self.buffers:
                for where, fence in (("before", buffer[:MARGIN]), ("after", buffer[MARGIN + extent :])):
                    intact = torch.isnan(fence) if buffer.dtype.is_floating_point else fence == poison(buffer.dtype)
                    assert intact.all(), f"{int((~intact).sum())} numbers were stored {where} a tensor of {extent}"

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        if kind is None:
            self.check()


def poison(dtype):
    """What a tensor of this dtype should never hold."""
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).min
