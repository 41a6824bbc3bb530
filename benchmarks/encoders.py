"""Encoders: ours beside materialised attention and, for Nystrom, transformers' own layer.

The materialised side are the oracles of the test suite: the references' own operations over the
same weights. Each measurement is a process of its own, and those of a comparison take turns; of the
times the best are kept, of the memory the largest resident set of the measured part (weights and
interpreter included, loading not). Both sides must give the same numbers, or the run fails. The
rate of a plain matrix product is taken in the same processes: the last column is our CPU time over
what the floating-point operations of the architecture would take at that rate.

    python benchmarks/encoders.py                           # everything: some 20 minutes
    python benchmarks/encoders.py --only brainlm-5m         # cases whose name has this in it
    python benchmarks/encoders.py --quick                   # tiny sizes, in one process
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the oracles are in tests/

AGREEMENT = 1e-3
"""Largest relative difference of the two sides' numbers (losses, norms of features, gradients)."""
LONG_S = 10.0
"""A first run that takes longer counts as a measurement; a shorter one is a warm-up."""
CONTEXT_TOKENS, TARGET_TOKENS = 940, 1646
"""Of the training step: one sample of the reference's masks on 450 x 10 tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    model: str
    preset: str
    batch: int
    work: str
    """'encoder' and 'forward' without gradients, 'train' forward and backward."""
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the config that differ from the preset."""
    rival: str = "materialised"


def cases(*, quick: bool) -> list[Case]:
    """The table: published sizes, or tiny ones."""
    if quick:
        jepa: dict[str, Any] = {"n_parcels": 24, "width": 32, "depth": 2}
        lm: dict[str, Any] = {"n_parcels": 24, "width": 32, "mask_ratio": 0.2}
        image = {"width": 32, "depth": 2, "n_heads": 2, "dim_hidden": 64, "decoder_width": 32}
        image |= {"decoder_depth": 1, "decoder_n_heads": 2, "decoder_dim_hidden": 64}
        image |= {"n_parcels": 40, "n_trs": 32, "image_size": 48}
        sizes = [("brainjepa", "tiny", jepa, (1,)), ("brainlm", "tiny", lm, (2,))]
        sizes += [("brainlm", "111m", image, (2,))]
        layer: dict[str, Any] = {"n_parcels": 24, "width": 32, "n_landmarks": 8}
    else:
        sizes = [("brainjepa", "base", {}, (1, 2)), ("brainlm", "5m", {}, (1, 2, 4))]
        sizes += [("brainlm", "13m", {}, (1, 2, 4)), ("brainlm", "111m", {}, (1, 4))]
        layer = {}
    found = []
    for model, preset, changes, batches in sizes:
        for work in ("encoder", "train") if model == "brainjepa" else ("forward", "train"):
            found += [
                Case(
                    name=f"{model}-{preset} {work} b{batch}",
                    model=model,
                    preset=preset,
                    batch=batch,
                    work=work,
                    changes=tuple(changes.items()),
                )
                for batch in batches
                if not (model == "brainjepa" and work == "train" and batch > 1)
            ]
    found += [
        Case(
            name=f"nystrom-layer {work} b1",
            model="nystrom",
            preset="tiny" if quick else "5m",
            batch=1,
            work=work,
            changes=tuple(({"attention": "nystrom"} | layer).items()),
            rival="transformers",
        )
        for work in ("forward", "train")
    ]
    return found


# -- one side of one case, in a process of its own -------------------------------------------------


def make(case: Case, side: str) -> tuple[Callable[[], Any], list[Any], float]:
    """What to run, the weights whose gradients count, and its floating-point operations."""
    import torch

    from brainfusion import encoders

    torch.manual_seed(0)
    if case.model == "nystrom":
        return make_layer(case, side)
    changes: dict[str, Any] = dict(case.changes)
    if case.model == "brainjepa":
        n_parcels = changes.get("n_parcels", 450)
        changes["gradient"] = torch.randn(n_parcels, 30)
    module: Any = encoders.create(case.model, case.preset, **changes)
    if case.work != "train":
        module.eval()
    if case.model == "brainjepa":
        return make_brainjepa(case, side, module)
    return make_brainlm(case, side, module)


def make_brainjepa(
    case: Case, side: str, module: Any
) -> tuple[Callable[[], Any], list[Any], float]:
    """The encoder over all tokens, or a training step with one context and one target mask."""
    import torch

    from tests.oracles import brainjepa_reference as reference
    from tests.oracles import ours

    config, n = module.config, module.n_tokens
    fmri = torch.randn(case.batch, config.n_parcels, config.n_trs)
    n_context, n_target = (x * n // 4500 for x in (CONTEXT_TOKENS, TARGET_TOKENS))
    order = torch.stack([torch.randperm(n) for _ in range(case.batch)])
    context = [order[:, :n_context].sort(1).values]
    target = [order[:, n_context : n_context + n_target].sort(1).values]
    n_flops = operations(n, config.width, config.depth, 4 * config.width)
    n_flops += 2 * n * config.patch_trs * config.width
    if case.work == "train":
        n_both, narrow = n_context + n_target, config.predictor_width
        n_flops += 3 * operations(n_context, config.width, config.depth, 4 * config.width)
        n_flops += 3 * operations(n_both, narrow, config.predictor_depth, 4 * narrow)
    n_flops *= case.batch
    if side == "ours":
        if case.work == "encoder":
            encoder = module.encoder
            return lambda: encoder(fmri), [], n_flops
        named = module.named_parameters()
        return lambda: module(fmri, context, target), [p for _, p in named], n_flops

    gradient = module.encoder.position.gradient
    settings, states = ours.brainjepa_settings(config), ours.brainjepa_states(module)
    if case.work == "encoder":
        state = states["encoder"]
        return lambda: reference.encoder(state, settings, gradient, fmri), [], n_flops
    leaves = ours.brainjepa_trained(states)
    return (
        lambda: reference.loss(states, settings, gradient, fmri, context, target),
        leaves,
        n_flops,
    )


def make_brainlm(case: Case, side: str, module: Any) -> tuple[Callable[[], Any], list[Any], float]:
    """The whole masked autoencoder with its loss, of either family."""
    import torch

    from brainfusion.encoders import to_upstream
    from tests.oracles import brainlm_image_reference, brainlm_reference, ours

    config = module.config
    image = hasattr(config, "patch_size")
    signal = torch.randn(case.batch, config.n_parcels, config.n_trs)
    xyz = torch.randn(case.batch, config.n_parcels, 3) * 40
    noise = torch.rand(case.batch, module.n_tokens)
    n_seen = 1 + int(module.n_tokens * (1 - config.mask_ratio))
    n_all = 1 + module.n_tokens
    wide = config.decoder_width if image else config.width
    n_flops = operations(n_seen, config.width, config.depth, config.dim_hidden)
    n_flops += operations(n_all, wide, config.decoder_depth, config.decoder_dim_hidden)
    if image:
        n_flops += 2 * config.patch_size**2 * (n_seen * config.width + n_all * wide)
        n_flops += 2 * n_seen * config.width * wide
    else:
        n_flops += n_all * wide * (3 * wide + config.patch_trs) + 2 * n_seen * wide * (
            wide + config.patch_trs
        )
        taps = config.conv_kernel_size or 0
        n_flops += 2 * taps * wide * (n_seen * config.depth + n_all * config.decoder_depth)
    n_flops *= case.batch * (3 if case.work == "train" else 1)
    if side == "ours":
        if not image:  # the reference's dropout costs time, and makes numbers incomparable
            module.position_dropout.p = module.decoder.position_dropout.p = 0.0
            return lambda: module(signal, xyz, noise=noise).loss, trained(module), n_flops
        return lambda: module(signal, noise=noise).loss, trained(module), n_flops

    state = to_upstream(module)
    leaves = []
    for key, value in state.items():
        # oneDNN's gradient of the grouped convolution is wrong: computed, but not compared.
        if not key.endswith((".pe", "position_embeddings", "decoder_pos_embed")):
            value.requires_grad_(case.work == "train")
            if not key.endswith("conv.weight"):
                leaves.append(value)
    if image:
        settings = ours.brainlm_image_settings(config)
        forward = brainlm_image_reference.forward
        return lambda: forward(state, settings, signal, noise).loss, leaves, n_flops
    settings = ours.brainlm_settings(config)
    scaled, lm = xyz / config.xyz_unit_mm, brainlm_reference.forward
    return lambda: lm(state, settings, signal, scaled, noise).loss, leaves, n_flops


def make_layer(case: Case, side: str) -> tuple[Callable[[], Any], list[Any], float]:
    """Nystrom attention with its convolution and output layer on 64 runs of 64 tokens, or fewer."""
    import torch
    from torch import nn

    from brainfusion.encoders import create

    module: Any = create("brainlm", case.preset, **dict(case.changes))
    ours, config = module.layers[0].attention, module.config
    nn.init.normal_(ours.conv_weight, std=0.1)
    length, marks = config.n_landmarks**2, config.n_landmarks
    x = torch.randn(case.batch, length, config.width, requires_grad=case.work == "train")
    n_flops = 2 * length * config.width * (4 * config.width + 4 * marks + config.conv_kernel_size)
    n_flops *= case.batch * (3 if case.work == "train" else 1)
    leaves = [p for p in ours.parameters() if p is not ours.conv_weight]
    if side == "ours":
        return lambda: square(ours(x)), [x, *leaves], n_flops

    from transformers import NystromformerConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.nystromformer import (  # pyright: ignore[reportMissingImports]
        modeling_nystromformer as nystromformer,
    )

    theirs: Any = nystromformer.NystromformerSelfAttention(
        NystromformerConfig(
            hidden_size=config.width,
            num_attention_heads=config.n_heads,
            num_landmarks=marks,
            segment_means_seq_len=length,
            conv_kernel_size=config.conv_kernel_size,
            attention_probs_dropout_prob=0.0,
        )
    )
    layers = (theirs.query, theirs.key, theirs.value)
    with torch.no_grad():
        for layer, weight, bias in zip(
            layers, ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        theirs.conv.weight.copy_(ours.conv_weight)
    leaves = [x, *(p for layer in (*layers, ours.proj) for p in layer.parameters())]
    return lambda: square(ours.proj(theirs(x)[0])), leaves, n_flops


def square(x: Any) -> Any:
    """A scalar to start a backward pass from."""
    return x.square().mean()


def trained(module: Any) -> list[Any]:
    """Parameters with a gradient, but for the filters of the convolutions."""
    return [p for name, p in module.named_parameters() if not name.endswith("conv_weight")]


def operations(n_tokens: int, width: int, depth: int, dim_hidden: int) -> float:
    """Floating-point operations of `depth` transformer blocks: matrix products alone."""
    linear = 2 * n_tokens * width * (4 * width + 2 * dim_hidden)
    return float(depth * (linear + 4 * n_tokens**2 * width))


def measure(case: Case, side: str, n_threads: int, *, size: int = 1024) -> dict[str, float]:
    """Times and memory of one side, in this process; `size` is that of the plain product."""
    import torch

    if n_threads:
        torch.set_num_threads(n_threads)
    run, leaves, n_flops = make(case, side)
    train = case.work == "train"

    def once() -> Any:
        with torch.set_grad_enabled(train):
            out = run()
            if train:
                out.backward()
            return out

    rate = product_rate(size)
    reset_peak()
    times, out = [], None
    while len(times) < 3:
        for leaf in leaves:
            leaf.grad = None
        begin = (time.perf_counter(), time.process_time())
        out = once()
        times.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        if len(times) == 2 and sum(wall for wall, _ in times) > LONG_S:
            break
    if times[0][0] < LONG_S:
        times = times[1:]
    peak = current_peak_mib()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return {
        "wall_s": min(wall for wall, _ in times),
        "cpu_s": min(cpu for _, cpu in times),
        "peak_mib": peak,
        "rate": max(rate, product_rate(size)),
        "n_flops": n_flops,
        "value": digest(out),
        "gradient": sum(float(g.double().square().sum()) for g in grads) ** 0.5,
    }


def digest(out: Any) -> float:
    """One number that any change of a feature, or of their order, would move."""
    import torch

    out = out.detach()
    if out.ndim == 0:
        return float(out)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return float((out * probe).double().sum() / out.numel() ** 0.5)


def product_rate(size: int, repeats: int = 30) -> float:
    """Operations a CPU second of a plain matrix product."""
    import torch

    square, best = torch.randn(size, size), 0.0
    for _ in range(3):
        begin = time.process_time()
        for _ in range(repeats // 3):
            torch.mm(square, square)
        best = max(best, repeats // 3 * 2 * size**3 / (time.process_time() - begin))
    return best


def reset_peak() -> None:
    """Forget the largest resident set so far (Linux; elsewhere loading the weights counts)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def current_peak_mib() -> float:
    """The largest resident set since `reset_peak`."""
    from brainfusion.runtime.memory import peak_mib

    if sys.platform != "linux":
        return peak_mib()
    status = Path("/proc/self/status").read_text().split("\n")
    return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


# -- the table -------------------------------------------------------------------------------------


def measure_apart(case: Case, side: str, n_threads: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", case.name, side, "--threads", str(n_threads)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name}: {side} failed (see above).")
    return json.loads(done.stdout.split("\n")[-2])


def compare(case: Case, options: argparse.Namespace) -> str:
    """Measure both sides in turns; one line of the table."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(1 if options.quick else options.rounds):
        for side in ("ours", case.rival):
            if options.quick:
                row = measure(case, side, options.threads, size=128)
            else:
                row = measure_apart(case, side, options.threads)
            old = best.setdefault(side, row)
            for key in ("wall_s", "cpu_s"):
                old[key] = min(old[key], row[key])
            for key in ("peak_mib", "rate"):
                old[key] = max(old[key], row[key])
    ours, other = best["ours"], best[case.rival]
    for key in ("value", "gradient"):
        if abs(ours[key] - other[key]) > AGREEMENT * abs(other[key]):
            raise SystemExit(f"{case.name}: {key} {ours[key]:.6g}, {case.rival} {other[key]:.6g}.")
    rate = max(ours["rate"], other["rate"])
    return (
        f"{case.name:<28} {ours['cpu_s']:>8.3f} {ours['wall_s']:>8.3f} {ours['peak_mib']:>7.0f} "
        f"{other['cpu_s'] / ours['cpu_s']:>8.2f} {other['wall_s'] / ours['wall_s']:>7.2f} "
        f"{ours['peak_mib'] / other['peak_mib']:>7.2f} {ours['n_flops'] / 1e12:>7.3f} "
        f"{rate / 1e9:>8.0f} {ours['cpu_s'] * rate / ours['n_flops']:>7.2f}  {case.rival}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, one process")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    table = cases(quick=options.quick)
    if options.one:
        case = next(case for case in table if case.name == options.one[0])
        print(json.dumps(measure(case, options.one[1], options.threads)))
        return
    table = [case for case in table if options.only in case.name]
    if not table:
        raise SystemExit(f"no case has '{options.only}' in its name.")
    if importlib.util.find_spec("transformers") is None:
        table = [case for case in table if case.rival != "transformers"]
        print("transformers is not installed: no comparison with its Nystromformer layer.")
    print(
        f"{'':<28} {'ours':^25} {'other / ours':>16} {'ours /':>7} {'':>7} {'product':>8} "
        f"{'x time':>7}\n{'case':<28} {'CPU s':>8} {'wall s':>8} {'MiB':>7} {'CPU':>8} {'wall':>7} "
        f"{'MiB':>7} {'TFLOP':>7} {'GFLOP/s':>8} {'of FLOP':>7}  other"
    )
    for case in table:
        print(compare(case, options), flush=True)


if __name__ == "__main__":
    main()
