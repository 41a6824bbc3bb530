"""From recordings to features: a frozen encoder over a whole cohort.

Recordings are conditioned as in training, encoded in batches of one length without masks, pooled,
and averaged over each person. Features do not depend on the batch size, on how many processes share
the work, or on how often it was interrupted. One process holds a batch, the vectors of its last
part and a memory-mapped shard of recordings; the main one at the end a vector a person.

Shape legend: b recordings, p parcels, t TRs, f features.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from brainfusion import __version__
from brainfusion.data.atlas import match_parcels
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import write_features
from brainfusion.encoders import ENCODERS
from brainfusion.encoders.brainjepa import BrainJEPA
from brainfusion.encoders.brainlm_image import BrainLMImage
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.parts import SAVE_EVERY_S, Parts
from brainfusion.encoders.pooling import check_pooling
from brainfusion.encoders.preflight import preflight
from brainfusion.runtime.distributed import Ranks, barrier
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import hash_json
from brainfusion.runtime.logs import Progress, say

Precision = Literal["float32", "bfloat16"]
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSettings:
    """How recordings are embedded; of these only pooling and precision change features."""

    pooling: str | None = None
    """mean: over all tokens; cls: brainlm's CLS token;
    parcel-std or parcel-mean: over time, a vector a parcel, joined.
    By default mean for published sizes, parcel-std for smaller ones."""
    batch_size: int = 16
    """Recordings at a time in each process."""
    precision: Precision = "float32"
    """Autocast of the encoder; features are float32 in any case."""
    compile: bool = False
    """Compile the encoder's layers first, which takes a minute: for long runs."""
    strict: bool = False
    """Warnings of the pre-flight check stop the run."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: expected 1 or more.")
        if self.precision not in PRECISIONS:
            raise UserError(
                f"precision '{self.precision}' is unknown. {nearest(self.precision, PRECISIONS)}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedded:
    """Features of a cohort."""

    subjects: list[str]
    """People with an embedded recording, in the order of subjects.parquet."""
    vectors: Float[np.ndarray, "n f"]
    """float32, one row a person."""
    provenance: dict[str, Any]
    """What goes into the feature file beside them."""


def embed_to_file(
    out: Path,
    pretrained: Pretrained,
    cohort: Cohort,
    settings: EmbedSettings | None = None,
    *,
    ranks: Ranks | None = None,
) -> Embedded | None:
    """Write a feature file; a run that is killed goes on from where it was when called again.

    Until the file is written, whole, its parts lie in `parts_folder(out)`.

    Returns:
        What was written; None on ranks other than the main one.

    Raises:
        UserError: As `embed` says, or the parts there are of another run.
    """
    folder = parts_folder(out)
    embedded = embed(pretrained, cohort, settings, parts=folder, ranks=ranks)
    if embedded is not None:
        write_features(out, embedded.subjects, embedded.vectors, provenance=embedded.provenance)
        Parts(folder).remove()
    return embedded


def parts_folder(out: Path) -> Path:
    """Where the parts of a feature file are until it is whole."""
    return out.with_name(f"{out.name}.parts")


def embed(
    pretrained: Pretrained,
    cohort: Cohort,
    settings: EmbedSettings | None = None,
    *,
    parts: Path | None = None,
    ranks: Ranks | None = None,
    save_every_s: float = SAVE_EVERY_S,
) -> Embedded | None:
    """One feature vector a person: conditioned, encoded, pooled; recordings averaged in float64.

    Recordings that are too short for the encoder are counted, said and left out.

    Args:
        pretrained: Encoder with its conditioning and atlas.
        cohort: Its parcels are matched to the encoder's by name.
        settings: Pooling, batch size and so on.
        parts: Folder that every rank can write to, for what is done so far; parts of an earlier
            run are taken up. A temporary one if omitted, which several ranks do not share.
        ranks: This process among those that share the recordings.
        save_every_s: Seconds between part files.

    Returns:
        The features on the main rank, None on others.

    Raises:
        UserError: Parcels are missing, a TR is not known, no recording is long enough, the pooling
            is none of the encoder's, `parts` holds another run's, features are not finite, or with
            `strict` a warning of the pre-flight check.
    """
    settings, ranks = settings or EmbedSettings(), ranks or Ranks()
    pooling = settings.pooling or default_pooling(pretrained)
    if settings.pooling is None:
        say(f"pooling: {pooling}, which fits an encoder of this size (--pooling takes another).")
    check_pooling(pooling, poolings(pretrained.module))
    order = parcel_order(pretrained, cohort)
    xyz = centroids_mm(pretrained, cohort, order)
    rows, lengths = long_enough(pretrained, cohort, pooling)
    warnings = _preflight(pretrained, cohort, rows, order, strict=settings.strict)
    key = {
        "encoder": pretrained.model,
        "weights": _hash_weights(pretrained.module),
        "conditioning": hash_json(pretrained.conditioning.to_dict()),
        "cohort": cohort.hash,
        "parcels": hash_json([order.tolist(), None if xyz is None else xyz.tolist()]),
        "pooling": pooling,
        "precision": settings.precision,
        "package_version": __version__,
    }
    assert parts is not None or ranks.world_size == 1
    encode = FrozenEncoder(pretrained, xyz, pooling, settings, ranks.device)
    with tempfile.TemporaryDirectory() if parts is None else nullcontext(parts) as folder:
        work = Parts(Path(folder), save_every_s=save_every_s)
        # All ranks look before one writes, so that they stop together.
        work.check(key)
        barrier()
        if ranks.is_main:
            work.begin(key)
        try:
            todo = ~np.isin(rows, _from_main(work.done() if ranks.is_main else None))
            batches = batches_of_one_length(rows[todo], lengths[todo], cohort, settings.batch_size)
            if n_done := len(rows) - int(todo.sum()):
                say(f"{n_done} recordings were embedded before: going on from there.")
            _run(encode, cohort, order, batches[ranks.rank :: ranks.world_size], work, ranks)
        except BaseException:
            if ranks.world_size == 1:  # of several, another may be about to write a part
                work.remove(unless_begun=True)
            raise
        barrier()
        if not ranks.is_main:
            return None
        subjects, groups = _people(cohort, rows)
        vectors = work.means(groups)
    provenance = _provenance(pretrained, cohort, len(rows), pooling, settings.precision, warnings)
    return Embedded(subjects=subjects, vectors=vectors, provenance=provenance)


def _provenance(
    pretrained: Pretrained,
    cohort: Cohort,
    n_recordings: int,
    pooling: str,
    precision: str,
    warnings: list[str],
) -> dict[str, Any]:
    """What a feature file says of how it was made."""
    return {
        "kind": "features",
        "encoder": pretrained.model,
        "checkpoint_hash": pretrained.hash,
        "cohort_hash": cohort.hash,
        "pooling": pooling,
        "precision": precision,
        "window_trs": pretrained.module.window_trs,
        "tr_s": pretrained.conditioning.tr_s,
        "standardiser": pretrained.conditioning.standardiser.kind,
        "fitted_on": pretrained.conditioning.standardiser.fitted_on,
        "n_recordings": n_recordings,
        "n_recordings_too_short": len(cohort.recordings) - n_recordings,
        "warnings": warnings,
        "package_version": __version__,
    }


def default_pooling(pretrained: Pretrained) -> str:
    """What fits the checkpoint's size.

    "mean" for encoders as wide as a published size, as their papers do. "parcel-std" for smaller
    ones: a mean over all tokens averages away amplitude and coupling there (docs/performance.md).
    "mean" in any case where a window has no tokens of single parcels, or only one a parcel.
    """
    module = pretrained.module
    presets = ENCODERS[pretrained.model].presets
    published = min(preset.width for name, preset in presets.items() if name != "tiny")
    config: Any = module.config
    if config.width >= published or "parcel-std" not in poolings(module):
        return "mean"
    return "parcel-std" if config.n_trs >= 2 * config.patch_trs else "mean"


def poolings(module: nn.Module) -> tuple[str, ...]:
    """The poolings that an encoder offers."""
    if isinstance(module, BrainLMImage):
        return ("mean", "cls")
    if isinstance(module, BrainJEPA):
        return ("mean", "parcel-mean", "parcel-std")
    return ("mean", "cls", "parcel-mean", "parcel-std")


def shortest_trs(module: Any, pooling: str = "mean") -> int:
    """Frames, at the encoder's TR, below which `encode` refuses a recording.

    One patch: BrainLM fills up what a window lacks, Brain-JEPA is shown the patches that there are,
    of which a standard deviation over time needs two.
    """
    if isinstance(module, BrainLMImage):
        return module.config.patch_size
    n_patches = 2 if isinstance(module, BrainJEPA) and pooling == "parcel-std" else 1
    return n_patches * module.config.patch_trs


def parcel_order(pretrained: Pretrained, cohort: Cohort) -> np.ndarray:
    """Rows (int64 [p]) of the cohort's recordings in the encoder's parcel order.

    Raises:
        UserError: The cohort lacks parcels of the encoder's.
    """
    match = match_parcels(cohort.atlas.parcels, pretrained.atlas)
    if len(match.missing):
        raise UserError(
            f"the cohort '{cohort.name}' ({cohort.atlas.name}, {cohort.atlas.n_parcels} parcels) "
            f"lacks {len(match.missing)} of the {pretrained.atlas.n_parcels} parcels that the "
            f"encoder was trained on ({pretrained.atlas.name}), for example "
            f"{list(match.missing)[:2]}: re-parcellate, or pretrain on this cohort."
        )
    if match.extra:
        say(
            f"{len(match.extra)} of {cohort.atlas.n_parcels} parcels are not in the encoder's "
            "atlas and are left out."
        )
    if match.permuted:
        say("parcels are in another order than the encoder's: matched by name.")
    return match.order


class FrozenEncoder:
    """Conditioned recordings to vectors, on one device."""

    def __init__(
        self,
        pretrained: Pretrained,
        xyz: np.ndarray | None,
        pooling: str,
        settings: EmbedSettings,
        device: torch.device,
    ) -> None:
        self.model, self.conditioning = pretrained.model, pretrained.conditioning
        self._module: Any = pretrained.module.to(device).eval()
        self._device, self._pooling, self._settings = device, pooling, settings
        # The image-shaped BrainLM sorts its rows by these.
        self._where = () if xyz is None else (torch.from_numpy(xyz).to(device),)
        if settings.compile:
            encoder = getattr(self._module, "target_encoder", self._module)
            for layer in getattr(encoder, "blocks", None) or encoder.layers:
                layer.compile()

    @torch.no_grad()
    def __call__(self, bold: np.ndarray) -> Float[np.ndarray, "b f"]:
        """float32 vectors of recordings [b, p, t] of one length."""
        batch = torch.from_numpy(bold).to(self._device)
        half = self._settings.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            vectors: Tensor = self._module.encode(batch, *self._where, pooling=self._pooling)
        vectors = vectors.float().cpu()
        if n_bad := int((~vectors.isfinite().all(1)).sum()):
            raise UserError(
                f"the features of {n_bad} recordings are not finite: the encoder has diverged, or "
                f"{self._settings.precision} overflowed; check its checkpoint, or use --precision "
                "float32."
            )
        return vectors.numpy()


def _run(
    encode: FrozenEncoder,
    cohort: Cohort,
    order: np.ndarray,
    batches: Sequence[np.ndarray],
    work: Parts,
    ranks: Ranks,
) -> None:
    """Encode this rank's batches into parts."""
    share = f", process 1 of {ranks.world_size}" if ranks.world_size > 1 else ""
    progress = Progress(
        f"embedding with {encode.model}{share}", sum(map(len, batches)), active=ranks.is_main
    )
    read, tr_s = cohort.recordings.read, cohort.recordings.index["tr_s"].to_list()
    n_encoded = 0
    for batch in batches:
        prepared = [encode.conditioning.prepare(read(int(i))[order], tr_s=tr_s[i]) for i in batch]
        work.add(batch, encode(np.stack(prepared)))
        n_encoded += len(batch)
        progress.update(n_encoded)
    work.flush()


def long_enough(
    pretrained: Pretrained, cohort: Cohort, pooling: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (int64) of the recordings that the encoder can take, and their conditioned lengths."""
    conditioning, shortest = pretrained.conditioning, shortest_trs(pretrained.module, pooling)
    lengths = np.array(
        [
            conditioning.length(n_trs, tr_s=tr_s)
            for n_trs, tr_s in cohort.recordings.index.select("n_trs", "tr_s").iter_rows()
        ]
    )
    at = f" at its TR of {conditioning.tr_s:g} s" if conditioning.tr_s else ""
    need = f"shorter than the {shortest} TRs that this {pretrained.model} needs{at}"
    rows = np.flatnonzero(lengths >= shortest)
    if not len(rows):
        raise UserError(
            f"all {len(lengths)} recordings are {need} (the longest has {lengths.max()}): take an "
            "encoder with a shorter window or patch, or longer recordings."
        )
    if n_short := len(lengths) - len(rows):
        of = cohort.recordings.index["subject"]
        n_people = of.n_unique() - of.gather(rows).n_unique()
        say(
            f"warning: {n_short} of {len(lengths)} recordings are {need} (the shortest has "
            f"{lengths.min()}): left out, and with them {n_people} people who have no other."
        )
    return rows, lengths[rows]


def _preflight(
    pretrained: Pretrained, cohort: Cohort, rows: np.ndarray, order: np.ndarray, *, strict: bool
) -> list[str]:
    warnings = preflight(pretrained, cohort, rows, order)
    for warning in warnings:
        say(f"warning: {warning}")
    # Authors' weights come without statistics: nothing was found, and nothing can be mended.
    compared = pretrained.conditioning.statistics is not None
    if strict and compared and warnings:
        raise UserError(
            f"the pre-flight check gives {len(warnings)} warnings, and --strict makes them an "
            f"error: {warnings[0]} Mend the input, or leave --strict out."
        )
    return warnings


def batches_of_one_length(
    rows: np.ndarray, lengths: np.ndarray, cohort: Cohort, batch_size: int
) -> list[np.ndarray]:
    """Rows in batches of one conditioned length, in an order that reads shard after shard."""
    by_shard = np.lexsort((rows, cohort.recordings.n_trs[rows], lengths))
    rows, lengths = rows[by_shard], lengths[by_shard]
    batches = []
    for group in np.split(rows, np.flatnonzero(np.diff(lengths)) + 1):
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return batches


def _people(cohort: Cohort, rows: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """People with recordings among `rows`, in the table's order, and the rows of each."""
    subjects = cohort.recordings.index["subject"].to_list()
    groups: dict[str, list[int]] = {subject: [] for subject in cohort.subjects["subject"]}
    for row in rows.tolist():
        groups[subjects[row]].append(row)
    found = {subject: np.array(group) for subject, group in groups.items() if group}
    return list(found), list(found.values())


def centroids_mm(pretrained: Pretrained, cohort: Cohort, order: np.ndarray) -> np.ndarray | None:
    """float32 [p, 3] centroids in mm for an encoder that reads them.

    The checkpoint's own where it has them: other figures for the same parcels would be other input.
    """
    if pretrained.model == "brainjepa":
        return None
    xyz = pretrained.atlas.xyz_mm
    if xyz is None and cohort.atlas.xyz_mm is not None:
        xyz = cohort.atlas.xyz_mm[order]
    if xyz is None:
        raise UserError(
            f"the cohort's atlas '{cohort.atlas.name}' has no coordinates, which BrainLM reads: "
            "add 'xyz_mm' to its atlas.json (MNI millimetres, one row a parcel)."
        )
    return np.ascontiguousarray(xyz, dtype=np.float32)


def _from_main(value: Any) -> Any:
    """What the main rank has, on every rank."""
    box = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _hash_weights(module: nn.Module) -> str:
    """SHA-256 (16 hex digits) of all that a module saves."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy())
    return digest.hexdigest()[:16]
