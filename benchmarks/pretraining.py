"""Pretraining: the loader alone, the step alone, both together; masks; against plain ways.

The loader draws windows from memory-mapped shards and conditions them on the fly; beside it stands
one that opens one .npy file a recording and standardises it in a Python loop over parcels. The step
is forward, backward and AdamW; beside it stands the same step with materialised attention (the
oracles of the test suite, over the same weights and draws; both must give the same loss). Together:
the loop that pretraining runs, batches made ahead by 0, 1 and 2 threads, and the share of the time
that steps wait for them. What runs alone is measured in windows a CPU second, what runs together by
the clock. The cohort is synthetic, in a temporary folder.

    python benchmarks/pretraining.py                                      # tiny presets, 100 x 490
    python benchmarks/pretraining.py --models brainlm --preset 5m --batch 2    # a published size
    python benchmarks/pretraining.py --quick                              # small: does it run?
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the oracles are in tests/

import numpy as np
import torch
from torch import Tensor

from brainfusion.data.conditioning import InputConditioning
from brainfusion.data.prefetch import Prefetch
from brainfusion.data.recordings import Recordings, RecordingWriter
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders import create
from brainfusion.encoders.brainjepa import BrainJEPA
from brainfusion.encoders.masking import mask_rng, sample_masks
from brainfusion.encoders.pretrain_config import DataConfig
from brainfusion.encoders.pretrain_inputs import PretrainInputs
from brainfusion.runtime.distributed import Ranks

TR_S = 0.735
MASK_BATCH = 16
BUDGET_MS, BUDGET_WAIT = 1.0, 0.05
AGREEMENT = 1e-3


def best(run: Callable[[], Any], repeats: int) -> float:
    """The least CPU seconds of some runs; the first is a warm-up and not counted."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)


# -- the data: our shards, and one file a recording ----------------------------------------------


def make_recordings(folder: Path, *, n: int, n_parcels: int, n_trs: int) -> tuple[Recordings, Path]:
    """Random recordings as shards, and the same ones as files."""
    rng, single = np.random.default_rng(0), folder / "files"
    single.mkdir()
    with RecordingWriter(folder / "shards", n_parcels=n_parcels) as writer:
        for i in range(n):
            bold = rng.standard_normal((n_parcels, n_trs), dtype=np.float32)
            writer.add(bold, recording=f"r{i}", subject=f"s{i}", tr_s=TR_S)
            np.save(single / f"{i}.npy", bold)
    return Recordings.open(folder / "shards"), single


def our_loader(recordings: Recordings, kind: str, window_trs: int) -> Callable[..., np.ndarray]:
    """`batch(step, size)` as pretraining makes it, with nothing measured yet."""
    rows = list(range(len(recordings)))
    conditioning = InputConditioning(
        standardiser=Standardiser.fit(kind, recordings, rows, cohort="benchmark"),
        tr_s=TR_S,
        resampling="linear",
        statistics=None,
    )
    inputs = PretrainInputs(
        recordings=recordings,
        data=DataConfig(standardiser=kind),
        window_trs=window_trs,
        conditioning=conditioning,
        train_rows=rows,
        validation_rows=rows,
    )
    return lambda step, size: inputs.batch(size, seed=0, step=step, ranks=Ranks())


def plain_loader(folder: Path, kind: str, window_trs: int) -> Callable[..., np.ndarray]:
    """One file a recording, opened for each window; scaled parcel by parcel in Python."""
    paths = sorted(folder.glob("*.npy"))

    def batch(step: int, size: int) -> np.ndarray:
        rng, windows = np.random.default_rng([0, step]), []
        for _ in range(size):
            bold = np.load(paths[rng.integers(len(paths))])
            if kind == "recording-zscore":
                bold = (bold - bold.mean()) / bold.std(ddof=1)
            else:
                for parcel in range(len(bold)):
                    line = bold[parcel]
                    bold[parcel] = (line - line.mean()) / line.std(ddof=1)
            start = rng.integers(bold.shape[1] - window_trs + 1)
            windows.append(bold[:, start : start + window_trs])
        return np.stack(windows).astype(np.float32)

    return batch


# -- the step: ours, and with materialised attention ---------------------------------------------


def make_steps(model: str, preset: str, n_parcels: int) -> tuple[Any, Callable, Callable]:
    """The module, `step(bold, draws)` of ours and of the oracle; each returns its loss."""
    torch.manual_seed(0)
    changes: dict[str, Any] = {"n_parcels": n_parcels} if preset == "tiny" else {}
    if model == "brainjepa":
        changes["gradient"] = torch.randn(changes.get("n_parcels", 450), 30)
    module: Any = create(model, preset, **changes)
    if model == "brainlm":  # dropout would make the losses differ
        module.position_dropout.p = module.decoder.position_dropout.p = 0.0
    xyz = 40 * torch.randn(module.n_parcels, 3)
    ours = functools.partial(_our_loss, module, xyz)
    plain, leaves = _plain_loss(module, xyz)
    weights = [p for p in module.parameters() if p.requires_grad]
    return module, _stepper(ours, weights), _stepper(plain, leaves)


def _stepper(loss_of: Callable[..., Tensor], weights: list[Tensor]) -> Callable[..., float]:
    optimizer = torch.optim.AdamW(weights, lr=0.0)  # the same weights at every step

    def step(bold: Tensor, draws: list[Tensor]) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(bold, draws)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _our_loss(module: Any, xyz: Tensor, bold: Tensor, draws: list[Tensor]) -> Tensor:
    if isinstance(module, BrainJEPA):
        return module(bold, draws[:1], draws[1:])
    return module(bold, xyz, noise=draws[0]).loss


def _plain_loss(module: Any, xyz: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The oracle over the same weights, and those of them that are trained."""
    from brainfusion.encoders import to_upstream
    from tests.oracles import brainjepa_reference, brainlm_reference, ours

    config = module.config
    if isinstance(module, BrainJEPA):
        states = ours.brainjepa_states(module)
        leaves, settings = ours.brainjepa_trained(states), ours.brainjepa_settings(config)
        gradient = module.encoder.position.gradient
        return (
            lambda bold, draws: brainjepa_reference.loss(
                states, settings, gradient, bold, draws[:1], draws[1:]
            )
        ), leaves
    state = {key: value.clone() for key, value in to_upstream(module).items()}
    leaves = [value.requires_grad_() for key, value in state.items() if not key.endswith(".pe")]
    settings = ours.brainlm_settings(config)

    def loss(bold: Tensor, draws: list[Tensor]) -> Tensor:
        scaled = xyz.expand(len(bold), -1, -1) / config.xyz_unit_mm
        return brainlm_reference.forward(state, settings, bold, scaled, draws[0]).loss

    return loss, leaves


def draws_of(module: Any, size: int, step: int) -> list[Tensor]:
    """Masks of a step, as pretraining draws them."""
    if isinstance(module, BrainJEPA):
        grid = (module.n_parcels, module.n_tokens // module.n_parcels)
        context, target = sample_masks(grid, size, mask_rng(0, step))
        return [context[0], target[0]]
    noise = np.random.default_rng([0, step]).random((size, module.n_tokens), dtype=np.float32)
    return [torch.from_numpy(noise)]


# -- the table -------------------------------------------------------------------------------------


def masks_table(repeats: int) -> None:
    """Milliseconds of the masks of one batch of 16, at the published grid."""
    print(f"\nmasks, a batch of {MASK_BATCH} on 450 x 10 tokens (budget {BUDGET_MS:g} ms)")
    for mode in ("unbiased", "reference"):
        counter = iter(range(10**6))
        ms = 1e3 * best(
            lambda mode=mode, counter=counter: sample_masks(
                (450, 10), MASK_BATCH, mask_rng(0, next(counter)), mode=mode
            ),
            20 * repeats,
        )
        print(f"  {mode:<12} {ms:>7.2f} ms  {'' if ms < BUDGET_MS else 'OVER BUDGET'}")


def loader_table(recordings: Recordings, files: Path, window_trs: int, repeats: int) -> None:
    """Windows a CPU second of our loader and the plain one; ours on its first pass, too."""
    n_steps = len(recordings) // MASK_BATCH
    print(
        f"\n{'loader alone, a CPU second':<28} {'ours':>10} {'first pass':>12} "
        f"{'one file each':>14} {'ratio':>7} {'first':>6}"
    )
    for kind in ("recording-zscore", "parcel-zscore"):
        # A loader that has seen a recording keeps its mean and deviation, so ours has two rates.
        fresh = [our_loader(recordings, kind, window_trs) for _ in range(repeats + 1)]
        seen, plain = fresh[-1], plain_loader(files, kind, window_trs)
        runs = (
            functools.partial(_draw, [seen], n_steps),
            functools.partial(_draw, fresh, n_steps),
            functools.partial(_draw, [plain], n_steps),
        )
        ours, first, theirs = (n_steps * MASK_BATCH / best(run, repeats) for run in runs)
        print(
            f"  {kind:<26} {ours:>8,.0f}/s {first:>10,.0f}/s {theirs:>12,.0f}/s "
            f"{ours / theirs:>7.2f} {first / theirs:>6.2f}"
        )


def _draw(loaders: list[Callable[..., np.ndarray]], n_steps: int) -> None:
    """Batches of the last loader, which is taken off where there are several."""
    loader = loaders.pop() if len(loaders) > 1 else loaders[0]
    for step in range(n_steps):
        loader(step, MASK_BATCH)


def together(
    loader: Callable[..., np.ndarray], step: Callable, module: Any, *, size: int, n_steps: int,
    workers: int,
) -> tuple[float, float]:  # fmt: skip
    """Windows a second of the loop, and the share of the time that it waits for data."""

    def make(number: int) -> tuple[Tensor, list[Tensor]]:
        return torch.from_numpy(loader(number, size)), draws_of(module, size, number)

    begin, waited = time.perf_counter(), 0.0
    if workers:
        with Prefetch(make, 0, n_steps, depth=2 * workers, workers=workers) as batches:
            next(batches)  # the first is always waited for
            first, begin = batches.waited_s, time.perf_counter()
            for batch, draws in batches:
                step(batch, draws)
            waited = batches.waited_s - first
        n_steps -= 1
    else:
        for number in range(n_steps):
            before = time.perf_counter()
            batch, draws = make(number)
            waited += time.perf_counter() - before
            step(batch, draws)
    seconds = time.perf_counter() - begin
    return n_steps * size / seconds, waited / seconds


def model_table(model: str, options: argparse.Namespace, folder: Path) -> None:
    """Steps of a model: ours, the oracle's, and the loop with 0, 1 and 2 threads ahead."""
    n_parcels = 24 if options.quick else 100
    module, ours, plain = make_steps(model, options.preset, n_parcels)
    n_trs = max(module.window_trs, 20 if options.quick else 490)
    place = folder / model
    place.mkdir()
    recordings, files = make_recordings(
        place, n=20 if options.quick else 200, n_parcels=module.n_parcels, n_trs=n_trs
    )
    loader, size = our_loader(recordings, "recording-zscore", module.window_trs), options.batch
    batch, draws = torch.from_numpy(loader(0, size)), draws_of(module, size, 0)
    losses = ours(batch, draws), plain(batch, draws)
    if abs(losses[0] - losses[1]) > AGREEMENT * abs(losses[1]):
        raise SystemExit(f"{model}: loss {losses[0]:.6g}, materialised {losses[1]:.6g}.")
    repeats = 1 if options.quick else 5
    rates = [size / best(lambda run=run: run(batch, draws), repeats) for run in (ours, plain)]
    print(
        f"\n{model} {options.preset}, {module.n_parcels} x {module.window_trs} windows of "
        f"recordings of {n_trs}, batches of {size}, {torch.get_num_threads()} torch thread(s)"
    )
    loader_table(recordings, files, module.window_trs, repeats)
    print(
        f"\n  step alone, a CPU second   {rates[0]:>8,.1f}/s, materialised {rates[1]:,.1f}/s, "
        f"ratio {rates[0] / rates[1]:.2f}"
    )
    for workers in (0, 1, 2):
        rate, wait = together(
            loader, ours, module, size=size, n_steps=3 if options.quick else 12, workers=workers
        )
        over = "OVER BUDGET" if workers == 2 and wait > BUDGET_WAIT else ""
        print(f"  together, {workers} thread(s) ahead {rate:>8,.1f}/s, waits {wait:>6.2%}  {over}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["brainlm", "brainjepa"])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for the steps")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    masks_table(1 if options.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            model_table(model, options, Path(folder))


if __name__ == "__main__":
    main()
