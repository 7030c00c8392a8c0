"""A small contract, quick to start (no torch), for testing what runs contracts: softmax over the last axis."""

import numpy as np

from mlsys.contracts import Contract, Wrong


def softmax(x, *, temperature=1.0):
    scaled = x / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def overflows(x, *, temperature=1.0):
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(x / temperature)
        return weights / weights.sum(-1, keepdims=True)


def first_axis(x, *, temperature=1.0):
    return softmax(x.T, temperature=temperature).T


def no_temperature(x, *, temperature=1.0):
    return softmax(x)


def unnormalised(x, *, temperature=1.0):
    return np.exp(x / temperature - (x / temperature).max(-1, keepdims=True))


def inputs(case, seed, device):
    x = np.random.default_rng(seed).standard_normal((case["rows"], case["columns"])).astype(np.float32)
    return {"x": x * np.float32(case.get("scale", 1)), "temperature": case.get("temperature", 1.0)}


SOFTMAX = Contract(
    name="toy.softmax",
    signature="softmax(x, *, temperature=1.0) -> weights of the shape of x",
    reference=softmax,
    cases=[
        {"rows": 1, "columns": 1},
        {"rows": 3, "columns": 3},
        {"rows": 2, "columns": 5, "temperature": 0.5},
        {"rows": 4, "columns": 3, "scale": 1e4},
        {"rows": 0, "columns": 3},
    ],
    inputs=inputs,
    call=lambda impl, given: {"out": impl(given["x"], temperature=given["temperature"])},
    oracle=lambda given: {"out": softmax(given["x"].astype(np.float64), temperature=given["temperature"])},
    tolerance=lambda given, name, want: 1e-5,
    wrong={
        "overflows": Wrong(overflows, "subtract each row's maximum before exp"),
        "first_axis": Wrong(first_axis, "normalise over the last axis"),
        "no_temperature": Wrong(no_temperature, "divide by the temperature"),
        "unnormalised": Wrong(unnormalised, "divide by the row's sum"),
    },
)
