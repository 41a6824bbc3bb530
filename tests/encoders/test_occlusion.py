"""Features with parcels hidden; planted parcels are found by what retrieval loses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from brainfusion.data.cohort import Cohort, write_cohort_tables
from brainfusion.data.conditioning import InputConditioning
from brainfusion.data.recordings import RecordingWriter
from brainfusion.data.standardise import Standardiser
from brainfusion.encoders import create
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.embed import EmbedSettings, embed
from brainfusion.encoders.occlusion import features_without
from brainfusion.eval.attribution import contributions, found
from brainfusion.eval.statistics import auroc
from brainfusion.runtime.errors import UserError
from tests.encoders.tiny_cohort import ATLAS, ENCODERS, N_PARCELS, N_TRS, XYZ_MM

PLANTED = (2, 7, 11)


def made(
    folder: Path, seed: int, *, linked: bool, n: int = 240, n_trs: int = N_TRS
) -> tuple[Cohort, np.ndarray]:
    """Each trait slows the signal of one parcel; nothing else differs between people."""
    rng = np.random.default_rng(seed)
    traits = rng.uniform(-1, 1, (n, len(PLANTED)))
    memory = np.full((n, N_PARCELS), 0.4)
    memory[:, PLANTED] += 0.55 * traits
    subjects = [f"s{i:03d}" for i in range(n)]
    table = pl.DataFrame({"subject": subjects})
    write_cohort_tables(folder, name="p", origin="imported", subjects=table, atlas=ATLAS)
    with RecordingWriter(folder / "recordings", n_parcels=N_PARCELS) as writer:
        for subject, phi in zip(subjects, memory, strict=True):
            x = np.empty((N_PARCELS, n_trs), np.float32)
            x[:, 0] = rng.standard_normal(N_PARCELS)
            for t in range(1, n_trs):
                noise = rng.standard_normal(N_PARCELS)
                x[:, t] = phi * x[:, t - 1] + np.sqrt(1 - phi**2) * noise
            writer.add(x, recording=f"{subject}_1", subject=subject, tr_s=2.0)
    return Cohort.open(folder), traits if linked else rng.permutation(traits)


def encoder(cohort: Cohort) -> Pretrained:
    """Random weights: a random projection of each parcel's patches tells slow from fast."""
    torch.manual_seed(0)
    config = ENCODERS["brainlm"]
    module = create("brainlm", "tiny", **{k: getattr(config, k) for k in config.__slots__})
    index = range(len(cohort.recordings))
    standardiser = Standardiser.fit("recording-zscore", cohort.recordings, list(index), cohort="p")
    conditioning = InputConditioning(
        standardiser=standardiser, tr_s=None, resampling="linear", statistics=None
    )
    atlas = replace(ATLAS, xyz_mm=XYZ_MM)
    return Pretrained(
        model="brainlm", module=module.eval(), conditioning=conditioning, atlas=atlas, state={},
        path=Path("none"), hash="none",
    )  # fmt: skip


SETTINGS = EmbedSettings(pooling="parcel-std")


def test_nothing_hidden_gives_the_features_and_hiding_makes_a_parcel_flat(tmp_path):
    cohort, _ = made(tmp_path, 0, linked=True, n=8)
    pretrained = encoder(cohort)
    every = embed(pretrained, cohort, SETTINGS)
    assert every is not None
    subjects = ["s005", "s001", "s006"]
    hidden = np.array([3, 9])
    groups = {"none": np.array([], dtype=int), "two": hidden}
    found_by_name = dict(features_without(pretrained, cohort, subjects, groups, SETTINGS))
    np.testing.assert_allclose(found_by_name["none"], every.vectors[[5, 1, 6]], atol=1e-6)
    bold = np.stack(
        [pretrained.conditioning.prepare(cohort.recordings.read(i), tr_s=2.0) for i in (5, 1, 6)]
    )
    bold[:, hidden] = 0
    xyz = torch.from_numpy(XYZ_MM)
    with torch.no_grad():
        direct = pretrained.module.encode(torch.from_numpy(bold), xyz, pooling="parcel-std")
    np.testing.assert_allclose(found_by_name["two"], direct.numpy(), atol=1e-6)
    with pytest.raises(UserError, match="1 of 2 people have no recording"):
        next(features_without(pretrained, cohort, ["s001", "nobody"], groups, SETTINGS))


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_planted_parcels_come_first_and_without_a_link_none_is_found(tmp_path, seed):
    for linked in (True, False):
        cohort, traits = made(tmp_path / str(linked), seed, linked=linked, n_trs=5 * N_TRS)
        pretrained = encoder(cohort)
        every = embed(pretrained, cohort, SETTINGS)
        assert every is not None
        train, test = np.arange(160), np.arange(160, 240)
        mean = every.vectors[train].mean(0)
        x, y = every.vectors[train] - mean, traits[train] - traits[train].mean(0)
        gram = x.T @ x
        weights = np.linalg.solve(
            gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y
        )

        def vectors(features: np.ndarray) -> np.ndarray:
            return (features - mean) @ weights  # noqa: B023  (used in this turn of the loop only)

        subjects = [every.subjects[i] for i in test]
        dna = traits[test] - traits[train].mean(0)
        groups = {f"{i}": np.array([i]) for i in range(N_PARCELS)}
        hidden = features_without(pretrained, cohort, subjects, groups, SETTINGS)
        table = contributions(
            (vectors(every.vectors[test]), dna),
            ((name, vectors(features), dna) for name, features in hidden),
            n_bootstrap=50,
        )
        planted = np.array([int(unit) in PLANTED for unit in table["unit"]])
        if linked:
            assert auroc(planted, table["drop"].to_numpy()) > 0.8
            assert {int(unit) for unit in found(table)["unit"]} >= set(PLANTED[:1]) or found(
                table
            ).height
        else:
            assert found(table).height == 0
