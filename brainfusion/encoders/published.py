"""The authors' checkpoints, ready to embed a cohort: weights, input conditioning, parcels.

A file of the authors holds weights alone. What their inputs looked like is in
`brainfusion.data.conditioning.PUBLISHED`; which parcel stands in which row is nowhere: BrainLM's
424 rows are those of A424 by number, Brain-JEPA's 450 are 50 subcortical parcels of Tian S3, then
400 cortical ones of Schaefer (17 networks).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainfusion import encoders
from brainfusion.data.atlas import Atlas, match_parcels
from brainfusion.data.cohort import Cohort
from brainfusion.data.conditioning import PUBLISHED, InputConditioning
from brainfusion.data.standardise import FITTED, Standardiser, check_kind
from brainfusion.encoders import ENCODERS, brainjepa_upstream
from brainfusion.encoders.brainjepa import PRESETS, BrainJEPAConfig
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.gradients import connectivity_of, gradient_table
from brainfusion.runtime import config as configs
from brainfusion.runtime.errors import CheckpointError, UserError
from brainfusion.runtime.files import hash_file, read_json
from brainfusion.runtime.logs import say

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The authors' weights in a folder, beside config.json."""
_CORTICAL = "Networks_"  # in every name of Schaefer's parcels, in none of Tian's
_N_TIAN, _N_SCHAEFER = 50, 400


def is_published(path: Path) -> bool:
    """Whether `path` is an authors' checkpoint (a file, or a folder as on their hub), not a run.

    A checkpoint folder of ours holds `state.json`, theirs `config.json`.
    """
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        return bool(names.intersection(WEIGHTS)) and "state.json" not in names
    return path.is_file() and not (path.parent / "state.json").exists()


def load_published(
    model: str,
    path: Path,
    cohort: Cohort,
    *,
    config: Mapping[str, Any] | Path | None = None,
    gradient: np.ndarray | Tensor | Path | None = None,
    standardiser: Standardiser | str | None = None,
    atlas: Atlas | None = None,
    untrained: bool = False,
) -> Pretrained:
    """An authors' checkpoint with what its inputs must look like in this cohort.

    Args:
        model: A key of `ENCODERS`.
        path: BrainLM's .bin or .safetensors, or the folder that holds it; Brain-JEPA's .pth.tar.
        cohort: Its atlas must have the weights' number of parcels, unless `atlas` names them; for
            BrainLM with centroids.
        config: The reference's own config, a dict or a JSON or YAML file. None: BrainLM's
            config.json beside the weights; a published size of Brain-JEPA.
        gradient: Brain-JEPA's gradient table, [p, g] in the weights' order. None: the cohort's
            atlas's, or one made of the cohort's training people; either is said.
        standardiser: A kind in place of the published one, or one fitted elsewhere, in the weights'
            parcel order.
        atlas: The parcels in the weights' order, to match the cohort's by name.
        untrained: Draw random weights (seed 0) for the same architecture: the baseline that the
            authors' training has to beat.

    Raises:
        UserError: Anything that does not fit: files, config, keys, shapes, parcels, centroids.
    """
    weights = weights_file(path)
    values = _read_config(config)
    if model == "brainjepa":
        settings = brainjepa_upstream.config_from_upstream(values) if values else None
        n_parcels = (settings or PRESETS["base"]).n_parcels
        order = published_order(model, cohort.atlas, n_parcels, atlas)
        if gradient is None and (settings or PRESETS["base"]).positions == "mapping":
            gradient = _own_gradient(cohort, order, settings or PRESETS["base"])
        module = encoders.from_upstream(model, weights, settings, gradient)
    else:
        module = encoders.from_upstream(model, weights, values, gradient)
        order = published_order(model, cohort.atlas, module.n_parcels, atlas)  # type: ignore[arg-type]
        _check_centroids(cohort.atlas)
    if untrained:
        torch.manual_seed(0)
        table = dict(module.named_buffers()).get("encoder.position.gradient")
        module = encoders.build(model, module.config, gradient=table)
    family = "brainlm-image" if isinstance(module, BrainLMImage) else model
    conditioning = _conditioning(family, cohort, order, standardiser)
    own = _in_order(
        cohort.atlas, order, name=ENCODERS[model].atlas if atlas is None else atlas.name
    )
    state = {
        "model": model,
        "config_class": type(module.config).__name__,
        "config": {"encoder": configs.to_dict(module.config)},
        "conditioning": conditioning.to_dict(),
        "atlas": own.to_dict(),
        "tr_s": conditioning.tr_s,
        "published": True,
    }
    return Pretrained(
        model=model,
        module=module.eval(),
        conditioning=conditioning,
        atlas=own,
        state=state,
        path=weights,
        hash="untrained" if untrained else hash_file(weights),
    )


def weights_file(path: Path) -> Path:
    """The file of weights that `path` is or holds.

    Raises:
        CheckpointError: There is none.
    """
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), path)
    if not found.is_file():
        raise CheckpointError(
            f"{path} holds no weights: expected the authors' checkpoint file, or a folder with "
            f"{' or '.join(WEIGHTS)} and config.json."
        )
    return found


def published_order(
    model: str, own: Atlas, n_parcels: int, published: Atlas | None = None
) -> np.ndarray:
    """Rows (int64 [p]) of a cohort's recordings in the order of the authors' weights.

    By name where the names tell: those of `published`; A424's numbers for BrainLM; for Brain-JEPA
    Tian's 50 parcels come before Schaefer's 400. Otherwise the order is taken as it is, with a
    warning, unless the atlas has the published one's name.

    Raises:
        UserError: Another number of parcels, or some of `published` are missing.
    """
    name = ENCODERS[model].atlas
    if published is not None and published.n_parcels != n_parcels:
        raise UserError(
            f"the atlas '{published.name}' of the weights has {published.n_parcels} parcels but "
            f"the weights have {n_parcels}: give the atlas that they were trained on."
        )
    if published is not None:
        match = match_parcels(own.parcels, published)
        if match.missing:
            raise UserError(
                f"the cohort's atlas '{own.name}' lacks {len(match.missing)} of the "
                f"{n_parcels} parcels of the weights' ('{published.name}'), for example "
                f"{list(match.missing)[:2]}: re-parcellate the recordings."
            )
        return match.order
    if own.n_parcels != n_parcels:
        raise UserError(
            f"the cohort has {own.n_parcels} parcels ('{own.name}') but these weights of {model} "
            f"expect {n_parcels} ({name}). Parcel order carries meaning, so nothing is padded or "
            f"cut: re-parcellate with {name}, or pretrain on this cohort."
        )
    by_name = _numbered(own.parcels) if model == "brainlm" else _subcortical_first(own.parcels)
    if by_name is not None:
        if (np.diff(by_name) < 0).any():
            say(f"parcels are put into the order of {name}, as their names tell it.")
        return by_name
    if _plain(own.name) != _plain(name):
        say(
            f"warning: the weights do not name their parcels, and names as in '{own.parcels[0]}' "
            f"of the atlas '{own.name}' do not tell: its order is taken to be that of {name}. Give "
            "the weights' atlas to match by name (--upstream-atlas), or call this one so."
        )
    return np.arange(n_parcels)


def _numbered(parcels: Sequence[str]) -> np.ndarray | None:
    """The order by number, if the names are A424's numbers: 1, 2, ... or A424_001, ..."""
    found = [re.fullmatch(r"(?:A424[ _-]?)?0*(\d+)", name, re.IGNORECASE) for name in parcels]
    numbers = np.array([int(match[1]) if match else 0 for match in found])
    order = numbers.argsort()
    return order if (numbers[order] == np.arange(1, len(parcels) + 1)).all() else None


def _subcortical_first(parcels: Sequence[str]) -> np.ndarray | None:
    """Tian's parcels, then Schaefer's, each as they stand, if the names are theirs."""
    cortical = np.array([_CORTICAL in name for name in parcels])
    if (int((~cortical).sum()), int(cortical.sum())) != (_N_TIAN, _N_SCHAEFER):
        return None
    return np.argsort(cortical, kind="stable")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _check_centroids(atlas: Atlas) -> None:
    if atlas.xyz_mm is None:
        raise UserError(
            f"the cohort's atlas '{atlas.name}' has no coordinates, which BrainLM reads: add "
            "'xyz_mm' to its atlas.json (MNI millimetres, one row a parcel)."
        )


def _in_order(atlas: Atlas, order: np.ndarray, *, name: str) -> Atlas:
    """The cohort's parcels in the weights' order."""
    return Atlas(
        name=name,
        parcels=tuple(atlas.parcels[i] for i in order),
        xyz_mm=None if atlas.xyz_mm is None else atlas.xyz_mm[order],
        gradient=None if atlas.gradient is None else atlas.gradient[order],
        networks=None if atlas.networks is None else tuple(atlas.networks[i] for i in order),
    )


def _training_rows(cohort: Cohort) -> list[int]:
    return cohort.recordings.rows(cohort.splits().train).tolist()


def _conditioning(
    family: str, cohort: Cohort, order: np.ndarray, standardiser: Standardiser | str | None
) -> InputConditioning:
    """The published conditioning; what has to be fitted is fitted on training people."""
    published = PUBLISHED[family]
    if not isinstance(standardiser, Standardiser):
        kind = standardiser or published.standardiser
        check_kind(kind)
        fitted = kind in FITTED
        rows = _training_rows(cohort) if fitted else np.arange(len(cohort.recordings))
        robust = kind in ("brainlm-robust", "brainlm-code")
        standardiser = Standardiser.fit(
            kind,
            cohort.recordings,
            rows,
            cohort=cohort.name,
            # The image family's constant is the spread of robustly scaled data.
            divide_by=published.divide_by if robust else 1.0,
        )
        if fitted:
            assert standardiser.median is not None
            assert standardiser.iqr is not None
            say(
                f"the authors never published the statistics of their training data: '{kind}' is "
                f"fitted on {standardiser.n_people} training people of this cohort instead."
            )
            standardiser = replace(
                standardiser,
                n_parcels=len(order),
                median=standardiser.median[order],
                iqr=standardiser.iqr[order],
            )
        else:
            standardiser = replace(standardiser, n_parcels=len(order))
    return InputConditioning(
        standardiser=standardiser,
        tr_s=published.tr_s,
        resampling=published.resampling,
        statistics=None,
    )


def _own_gradient(cohort: Cohort, order: np.ndarray, settings: BrainJEPAConfig) -> np.ndarray:
    """Gradient coordinates, in the weights' order, where the authors' table was not given."""
    departure = (
        "positions, and so features, are not those of the published model unless this is its table"
    )
    if cohort.atlas.gradient is not None:
        say(
            "warning: no gradient table was given, and the one of the cohort's atlas "
            f"'{cohort.atlas.name}' is taken: {departure} (--gradient)."
        )
        return cohort.atlas.gradient[order]
    rows = _training_rows(cohort)
    say(
        f"warning: no gradient table was given, and one is made from the connectivity of "
        f"{len(rows)} training recordings: {departure.split(' unless')[0]}, because the weights "
        "were trained with another (--gradient takes the authors' gradient_mapping_450.csv)."
    )
    table = gradient_table(connectivity_of(cohort.recordings, rows), settings.gradient_dim)
    return table[order].astype(np.float32)


def _read_config(config: Mapping[str, Any] | Path | None) -> dict[str, Any] | None:
    """The reference's own config as a dict."""
    if config is None or isinstance(config, Mapping):
        return None if config is None else dict(config)
    if not config.is_file():
        raise UserError(f"{config} does not exist: expected the reference's config, JSON or YAML.")
    values = configs.read_yaml(config) if config.suffix in (".yaml", ".yml") else read_json(config)
    if not isinstance(values, dict):
        raise UserError(f"{config} is not an object: expected the reference's own config.")
    return values
