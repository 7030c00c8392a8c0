"""`mlsys cost train|serve|allreduce`: what a layout should cost, with every formula and its numbers."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from mlsys.commands import UsageError

if TYPE_CHECKING:
    from mlsys.perf.configs import Config
    from mlsys.perf.worksheet import Worksheet

EXAMPLES = """examples:
  mlsys cost train --model gpt3 --gpus 1024 --tp 8 --pp 16 --recompute full
  mlsys cost train --model llama-2-7b --gpus 8 --zero 3 --tokens 2e12 --hardware h100
  mlsys cost serve --model llama-3-70b --gpus 4 --batch 32 --context 8192
  mlsys cost allreduce --ranks 8 --size 64MiB --hardware h100
  mlsys cost models                                  the names that --model takes
"""
SIZES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZES |= {"KB": 1e3, "K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `mlsys cost`."""
    parser.epilog = EXAMPLES
    kinds = parser.add_subparsers(dest="kind", metavar="train|serve|allreduce|models", required=True)
    style = argparse.RawDescriptionHelpFormatter

    train = kinds.add_parser("train", help="memory of a device, time of a step, days of a run", formatter_class=style)
    _machine(train, "gpt3", "a100-80")
    train.add_argument("--gpus", type=int, default=8, help="all devices (default %(default)s)")
    train.add_argument("--tp", type=int, default=1, help="tensor-parallel devices (default %(default)s)")
    train.add_argument("--pp", type=int, default=1, help="pipeline stages (default %(default)s)")
    train.add_argument("--chunks", type=int, default=1, help="model chunks of a stage: above 1, interleaved schedule")
    train.add_argument("--batch", type=int, help="sequences in a step (default: four microbatches for each stage)")
    train.add_argument("--microbatch", type=int, default=1, help="sequences in a microbatch (default %(default)s)")
    train.add_argument("--seq", type=int, help="tokens of a sequence (default: the model's context)")
    train.add_argument("--tokens", type=float, default=300e9, help="tokens of the whole run (default 300e9)")
    train.add_argument("--recompute", choices=("none", "selective", "full"), default="none", help="of activations")
    train.add_argument("--sequence-parallel", action="store_true", help="split norms and residuals too")
    train.add_argument("--zero", type=int, default=0, choices=(0, 1, 2, 3), help="ZeRO stage (default %(default)s)")
    train.add_argument("--efficiency", type=float, default=0.5, help="share of the peak reached (default %(default)s)")

    serve = kinds.add_parser("serve", help="memory, decode step and first token", formatter_class=style)
    _machine(serve, "llama-3-8b", "h100")
    serve.add_argument("--gpus", type=int, default=1, help="devices that share every matrix (default %(default)s)")
    serve.add_argument("--batch", type=int, default=1, help="sequences decoded together (default %(default)s)")
    serve.add_argument("--context", type=int, help="tokens of each in the cache (default: the model's context)")
    serve.add_argument("--prompt", type=int, help="tokens to prefill (default: --context)")
    serve.add_argument("--weight-bits", type=float, default=16, help="of a weight (default %(default)s)")
    serve.add_argument("--cache-bits", type=float, default=16, help="of an element of the cache (default %(default)s)")

    reduce = kinds.add_parser(
        "allreduce", help="the algorithms for one all-reduce, side by side", formatter_class=style
    )
    reduce.add_argument("--ranks", type=int, default=8, help="how many (default %(default)s)")
    reduce.add_argument("--size", type=size, default=size("64MiB"), help="of the vector: 4KiB, 64MiB … (default 64MiB)")
    reduce.add_argument("--hardware", default="h100", help="whose link carries it (default %(default)s)")
    reduce.add_argument("--bandwidth", type=size, metavar="BYTES/S", help="instead of the hardware's: 25GB …")
    reduce.add_argument("--latency", type=duration, help="of a message, instead of the hardware's: 5us …")
    reduce.add_argument("--local", type=int, help="ranks in a node, for the hierarchical one")

    models = kinds.add_parser("models", help="the models that --model knows, with their sizes", formatter_class=style)
    for kind in (train, serve, reduce, models):
        kind.add_argument("--json", action="store_true", help="one JSON object a line")


def _machine(parser: argparse.ArgumentParser, model: str, hardware: str) -> None:
    parser.add_argument("--model", default=model, help="a name of `mlsys cost models` (default %(default)s)")
    parser.add_argument("--hardware", default=hardware, help="a published machine (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the arithmetic (default %(default)s)")
    parser.add_argument("--node", type=int, default=8, help="devices on one fast link (default %(default)s)")


def size(text: str) -> float:
    """Bytes of "64MiB", "25 GB" or "4096"."""
    return _with_unit(text, SIZES, "64MiB, 25GB or 4096 (B for bytes; a small b would be bits)")


def duration(text: str) -> float:
    """Seconds of "5us", "1.5 ms" or "0.1"."""
    return _with_unit(text, TIMES, "5us, 1.5ms or 0.1")


def _with_unit(text: str, units: dict[str, float], examples: str) -> float:
    match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([^\d.]*?)\s*", text)
    if not match or match[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; write it like {examples}")
    return float(match[1]) * units[match[2]]


def run(args: argparse.Namespace) -> int:
    """Work the sheet out and print it."""
    return {"train": _train, "serve": _serve, "allreduce": _allreduce, "models": _models}[args.kind](args)


def _train(args: argparse.Namespace) -> int:
    from mlsys.perf import hardware, sheets

    options = "gpus tp pp chunks batch microbatch seq tokens recompute sequence_parallel zero efficiency dtype node"
    settings = {name: getattr(args, name) for name in options.split()}
    _print(sheets.train(_model(args.model), hardware.find(args.hardware), **settings), args.json)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from mlsys.perf import hardware, sheets

    options = "gpus batch context prompt weight_bits cache_bits dtype node"
    settings = {name: getattr(args, name) for name in options.split()}
    _print(sheets.serve(_model(args.model), hardware.find(args.hardware), **settings), args.json)
    return 0


def _model(name: str) -> Config:
    from mlsys.catalog import nearest
    from mlsys.perf.configs import MODELS

    if name not in MODELS:
        near = nearest(name, MODELS)
        raise UsageError(
            f"no model {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(MODELS)}")
        )
    return MODELS[name]


def _print(sheet: Worksheet, as_json: bool) -> None:
    if as_json:
        for row in sheet.rows():
            print(json.dumps(row, ensure_ascii=False))
        return
    from mlsys.perf.worksheet import quantity

    wide = max(len(line.name) for line in sheet.lines)
    results = [quantity(line.value, line.unit) for line in sheet.lines]
    widest = max(map(len, results))
    for index, (line, result) in enumerate(zip(sheet.lines, results)):
        if index in sheet.sections:
            print(f"\n{sheet.sections[index]}" if index else sheet.sections[index])
        note = f"  {line.note}" if line.note else ""
        print(f"  {line.name:<{wide}}  {result:>{widest}}{note}".rstrip())
        if line.formula:
            print(f"  {'':<{wide}}  {'':>{widest}}    = {line.formula}")
            if line.filled != line.formula:
                print(f"  {'':<{wide}}  {'':>{widest}}    = {line.filled}")


def _allreduce(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from mlsys.perf import sheets

    bandwidth = _link_bandwidth(args.hardware) if args.bandwidth is None else args.bandwidth
    latency = _link_latency(args.hardware) if args.latency is None else args.latency
    rows = sheets.all_reduce(args.ranks, args.size, latency, bandwidth, local=args.local)
    if args.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    from mlsys.perf.worksheet import quantity

    print(
        f"all-reduce of {quantity(args.size, 'B')} over {args.ranks} ranks; "
        f"α = {quantity(latency, 's')} a message, 1/β = {quantity(bandwidth, 'B/s')}; time = steps·α + bytes·β\n"
    )
    table = [
        {
            "algorithm": row["algorithm"],
            "steps": with_formula(row, "steps", str(row["steps"])),
            "bytes on the path": with_formula(row, "bytes", quantity(row["bytes"], "B")),
            "time": quantity(row["seconds"], "s"),
            "bus bandwidth": quantity(row["bus_bandwidth"], "B/s"),
            "": "fastest" if row["fastest"] else "",
        }
        for row in rows
    ]
    print(tabulate(table, headers="keys", disable_numparse=True))
    return 0


def with_formula(row: dict[str, Any], key: str, value: str) -> str:
    """A count with the formula that it comes from, if there is one."""
    formula = row.get(f"{key}_formula")
    return f"{formula} = {value}" if formula else value


def _link_bandwidth(name: str) -> float:
    from mlsys.perf import hardware

    found = hardware.find(name)
    if found.link is None:
        raise UsageError(f"{found.name} has no link on record; give --bandwidth")
    return found.link.bandwidth


def _link_latency(name: str) -> float:
    from mlsys.perf import hardware

    found = hardware.find(name)
    if found.link is None or found.link.latency is None:
        raise UsageError(f"no latency of a link of {found.name} is on record; give --latency")
    return found.link.latency


def _models(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from mlsys.perf import inference, transformer
    from mlsys.perf.configs import MODELS
    from mlsys.perf.worksheet import quantity

    rows = []
    for name, config in MODELS.items():
        count = transformer.parameters(config)
        rows.append(
            {
                "model": name,
                "parameters": count.total,
                "active": count.active,
                "layers": config.layers,
                "width": config.d_model,
                "context": config.context,
                "kv_bytes_per_token": inference.kv_cache_bytes_per_token(config),
                "source": config.source,
            }
        )
    if args.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    for row in rows:
        row["parameters"], row["active"] = (f"{row[key] / 1e9:.4g} B" for key in ("parameters", "active"))  # type: ignore[operator]
        row["KV cache a token"] = quantity(row.pop("kv_bytes_per_token"), "B")  # type: ignore[arg-type]
        row["source"] = row.pop("source")
    print(tabulate(rows, headers="keys", disable_numparse=True))
    return 0
