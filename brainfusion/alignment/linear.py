"""Alignments in closed form, at the interface of the trained one: ridge-CCA, PLS and ridge.

`linear_maps` says what the methods are. What they leave open is chosen on the validation people:
the ridges and the components of rcca by the information that their pairs have
(`data.cca_choice`), the components of pls, the penalty and the components of ridge by their AUC.
Nothing is drawn at random. The main process fits; the others are sent what it found.

Shape legend: n people, i columns of a side, o columns put out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from brainfusion.alignment.config import AlignConfig
from brainfusion.alignment.density_ratio import DensityRatio
from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.linear_maps import LinearMaps, pls_maps, rcca_maps, ridge_maps
from brainfusion.alignment.losses.info_nce import info_nce
from brainfusion.alignment.model import Alignment
from brainfusion.alignment.outcome import describe_inputs
from brainfusion.alignment.prepare import check, conditioned, fit_conditioners
from brainfusion.alignment.train import TrainResult
from brainfusion.alignment.validation import effective_rank, pair_auc, uniformity
from brainfusion.runtime import config as configs
from brainfusion.runtime.distributed import Ranks, barrier
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import check_writable, write_json
from brainfusion.runtime.logs import MetricsLog, say
from brainfusion.runtime.threads import one_thread

Method = Literal["rcca", "pls", "ridge"]

METHODS: tuple[Method, ...] = ("rcca", "pls", "ridge")
COMPONENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of components to try."""
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Ridge penalties to try, as shares of the mean variance of the brain's columns."""


class LinearModel(nn.Module):
    """A linear map of each modality into one space, behind the interface of `AlignmentModel`."""

    log_scale: Tensor
    spare: Tensor
    logit_bias = None

    def __init__(
        self,
        dims_in: Mapping[str, int],
        *,
        dim_out: int,
        method: Method,
        min_scale: float = 1.0,
        max_scale: float = 100.0,
    ) -> None:
        """Make maps of zeros, to be filled by `fit_linear` or by a saved state.

        Args:
            dims_in: Input columns of each modality, by the modality's name.
            dim_out: Columns of the maps; rcca puts out one more, the spare one.
            method: What the maps are.
            min_scale: Least logit scale.
            max_scale: Greatest logit scale.
        """
        super().__init__()
        self.settings: dict[str, Any] = {
            "kind": "linear",
            "dims_in": dict(dims_in),
            "dim_out": dim_out,
            "method": method,
            "min_scale": min_scale,
            "max_scale": max_scale,
        }
        self.maps = nn.ModuleDict({name: _Map(dim, dim_out) for name, dim in dims_in.items()})
        self.register_buffer("spare", torch.tensor(0.0))
        self.register_buffer("log_scale", torch.tensor(math.log(min_scale)))

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The multiplier of the cosines that makes the validation people's loss least."""
        return self.log_scale.exp()

    def embed(self, name: str, inputs: Any) -> Float[Tensor, "n o"]:
        """Conditioned features of the modality `name` to unit rows of the shared space."""
        if name not in self.maps:
            raise UserError(f"no modality '{name}' in this model. {nearest(name, self.maps)}")
        rows = self.maps[name](inputs)
        if self.settings["method"] == "rcca":
            rows = torch.cat([rows, self.spare.to(rows.dtype).expand(len(rows), 1)], dim=1)
        return F.normalize(rows, dim=-1)


class _Map(nn.Module):
    mean: Tensor
    weight: Tensor

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim_in))
        self.register_buffer("weight", torch.zeros(dim_in, dim_out))

    def forward(self, inputs: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        return (inputs - self.mean) @ self.weight


def fit_linear(
    features: Mapping[str, np.ndarray | GeneVectors],
    labels: Sequence[str],
    *,
    method: Method,
    config: AlignConfig,
    run_dir: Path,
    covariates: np.ndarray | None = None,
    covariate_names: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Align two modalities in closed form; the files are those of `train`.

    Of the config, `n_components`, `residualise`, the bounds of the logit scale and `score` have an
    effect. The conditioners do not whiten: how much to do so is what these methods differ in.

    Args:
        features: [n, d] or gene vectors a modality, row-paired; the brain first.
        labels: "train", "validation" or "test", a row; test rows are not looked at.
        method: "rcca", "pls" or "ridge".
        config: The settings.
        run_dir: Gets config.yaml, metrics.jsonl (a row a candidate), summary.json and model/.
        covariates: [n, c] from `design_matrix(subjects, config.residualise)`.
        covariate_names: Their names, kept with the model.
        meta: Facts to keep with the model. JSON values.
        ranks: Where this process stands; one process if omitted.

    Returns:
        The alignment on the CPU, and its summary.

    Raises:
        UserError: As `train`; an unknown method, other than two modalities, or pooled genes.
    """
    ranks = ranks or Ranks()
    _check_method(features, method, config)
    rows = check(features, labels, config, covariates)
    if ranks.is_main:
        check_writable(run_dir)
        configs.save(run_dir / "config.yaml", config)
    conditioners = fit_conditioners(
        features, rows["train"], replace(config, whiten=False), covariates, covariate_names, ranks
    )
    found: list[Any] = [None]
    if ranks.is_main:
        sides = {
            split: [
                np.asarray(conditioned(c, features[name], rows[split], covariates), np.float64)
                for name, c in conditioners.items()
            ]
            for split in ("train", "validation")
        }
        try:
            found = [_fit(method, sides, list(conditioners), config)]
        except UserError as error:  # raised on all ranks, so that none waits for another
            found = [error]
    if ranks.world_size > 1:
        dist.broadcast_object_list(found, src=0, device=ranks.device)
    if isinstance(found[0], UserError):
        raise found[0]
    model, head, candidates, best = found[0]
    log = MetricsLog(run_dir / "metrics.jsonl", active=ranks.is_main)
    for row in candidates:
        log.write(**row)
    summary = _summary(best, len(candidates), rows, conditioners, method, config, ranks)
    alignment = Alignment(
        model=model.eval(),
        conditioners=conditioners,
        head=head,
        info={"config": configs.to_dict(config), "summary": summary, "meta": dict(meta or {})},
    )
    if ranks.is_main:
        alignment.save(run_dir / "model")
        write_json(run_dir / "summary.json", {**summary, "meta": dict(meta or {})})
        say(_sentence(summary))
    barrier()
    return TrainResult(alignment=alignment, summary=summary, run_dir=run_dir)


# -- choosing ------------------------------------------------------------------------------------


def _candidates(
    method: Method, x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray
) -> Iterator[LinearMaps]:
    if method == "rcca":
        yield rcca_maps(x, y, x_val, y_val)
        return
    # Components beyond half the people are fitted to noise.
    least_width = y.shape[1] if method == "ridge" else min(x.shape[1], y.shape[1])
    most = max(1, min(len(x) // 2, least_width))
    counts = sorted({min(k, most) for k in COMPONENTS})
    if method == "ridge":
        for k in counts:
            yield from ridge_maps(x, y, n_components=k, penalties=PENALTIES)
        return
    whole = pls_maps(x, y, n_components=most)
    for k in counts:
        yield replace(
            whole,
            weights=(whole.weights[0][:, :k], whole.weights[1][:, :k]),
            chosen={"n_components": min(k, whole.weights[0].shape[1])},
        )


def _fit(
    method: Method,
    sides: Mapping[str, list[np.ndarray]],
    names: list[str],
    config: AlignConfig,
) -> tuple[LinearModel, DensityRatio | None, list[dict[str, Any]], dict[str, Any]]:
    """The best candidate on the validation people, its head, all candidates' rows, its own row."""
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    kept: tuple[LinearModel, LinearMaps] | None = None
    with one_thread(), torch.no_grad():
        for step, maps in enumerate(_candidates(method, *sides["train"], *sides["validation"]), 1):
            model = _model(maps, names, method, config)
            auc = pair_auc(*_embed(model, names, sides["validation"]))
            rows.append({"step": step, **maps.chosen, "validation_auc": auc})
            if auc > best.get("validation_auc", -1.0):
                best, kept = rows[-1], (model, maps)
        assert kept is not None
        model, maps = kept
        training, validation = (_embed(model, names, sides[s]) for s in ("train", "validation"))
        _set_scale(model, *validation)
        best |= _measured(model, training, validation)
        head = None
        if method == "rcca" and config.score == "density-ratio":
            parts = (
                {name: rows.numpy() for name, rows in zip(names, part, strict=True)}
                for part in (training, validation)
            )
            head = DensityRatio.fit(*parts)
            best["validation_density_ratio"] = head.information
    if maps.held_out:
        best["held_out_correlations"] = list(maps.held_out)
    return model, head, rows, {**best, "chosen": maps.chosen}


def _measured(
    model: LinearModel, training: Sequence[Tensor], validation: Sequence[Tensor]
) -> dict[str, float]:
    """What `train` measures of its best step, by the same names."""
    (a, b), scale, log_n = validation, model.logit_scale, math.log(len(training[0]))
    loss = float(info_nce(training[0], training[1], scale, local=True))
    return {
        "loss": loss,
        "loss_over_log_n": loss / log_n,
        "log_n": log_n,
        "logit_scale": float(scale),
        "validation_information": math.log(len(a)) - float(info_nce(a, b, scale, local=True)),
        "validation_alignment": float((a - b).square().sum(1).mean()),
        "validation_uniformity": (uniformity(a) + uniformity(b)) / 2,
        "effective_rank": (effective_rank(a) + effective_rank(b)) / 2,
    }


def _model(
    maps: LinearMaps, names: Sequence[str], method: Method, config: AlignConfig
) -> LinearModel:
    dims = {name: len(weight) for name, weight in zip(names, maps.weights, strict=True)}
    model = LinearModel(
        dims,
        dim_out=maps.weights[0].shape[1],
        method=method,
        min_scale=config.min_scale,
        max_scale=config.max_scale,
    )
    for name, mean, weight in zip(names, maps.means, maps.weights, strict=True):
        own = model.maps[name]
        assert isinstance(own, _Map)
        own.mean.copy_(torch.from_numpy(mean))
        own.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    model.spare.fill_(maps.spare)
    return model


def _embed(model: LinearModel, names: Sequence[str], sides: Sequence[np.ndarray]) -> list[Tensor]:
    return [
        model.embed(name, torch.from_numpy(side.astype(np.float32)))
        for name, side in zip(names, sides, strict=True)
    ]


def _set_scale(model: LinearModel, a: Tensor, b: Tensor) -> None:
    """The logit scale at which these people's loss is least, within its bounds."""
    low, high = model.settings["min_scale"], model.settings["max_scale"]
    scales = torch.from_numpy(np.geomspace(low, high, 25)).float()
    losses = [float(info_nce(a, b, scale, local=True)) for scale in scales]
    model.log_scale.copy_(scales[int(np.argmin(losses))].log())


# -- checks and results --------------------------------------------------------------------------

_IN_USE = ("n_components", "residualise", "dna_pool", "min_scale", "max_scale", "score")


def _check_method(features: Mapping[str, Any], method: str, config: AlignConfig) -> None:
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'. {nearest(method, METHODS)}")
    if len(features) != 2:
        raise UserError(
            f"method '{method}' aligns two modalities, not {len(features)}: name one brain "
            "encoder and one DNA side (models joined by + are one), or use --method infonce."
        )
    if config.dna_pool != "concat":
        raise UserError(
            f"method '{method}' takes genes side by side: expected dna_pool='concat', got "
            f"{config.dna_pool!r}; or use --method infonce."
        )
    changed = [
        f.name
        for f in fields(config)
        if f.name not in _IN_USE and getattr(config, f.name) != f.default
    ]
    if changed:
        say(f"warning: no effect with --method {method}: {', '.join(changed)}.")


def _summary(
    best: dict[str, Any],
    n_candidates: int,
    rows: Mapping[str, np.ndarray],
    conditioners: Mapping[str, Any],
    method: Method,
    config: AlignConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    measured = ("loss", "loss_over_log_n", "log_n", "logit_scale", "held_out_correlations")
    # Training people's pairs are always told apart: only the others can say that there is a link.
    least = 0.5 + 1.645 / math.sqrt(12 * len(rows["validation"]))
    return {
        "method": method,
        "modalities": list(conditioners),
        **{f"n_{split}": len(people) for split, people in rows.items()},
        "n_steps": n_candidates,
        "best_step": best["step"],
        "chosen": best["chosen"],
        **{key: best[key] for key in measured if key in best},
        **{key: value for key, value in best.items() if key.startswith("validation_")},
        "signal": best["validation_auc"] > least,
        "logit_scale_bounds": [config.min_scale, config.max_scale],
        "effective_rank": best["effective_rank"],
        "n_processes": ranks.world_size,
        **describe_inputs(conditioners, config),
    }


def _sentence(summary: Mapping[str, Any]) -> str:
    chosen = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in summary["chosen"].items())
    found = (
        f"{summary['method']}: aligned {summary['n_train']} people, {chosen}; validation AUC "
        f"{summary['validation_auc']:.3f} (chance 0.5)"
    )
    return f"{found}." if summary["signal"] else f"{found}. No pairing signal yet."
