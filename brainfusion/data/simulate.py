"""The simulated cohort: a whole cohort folder in which the link of genes and brain is known.

Genotypes with linkage and ancestry are read by frozen random sequence models; some of the SNPs move
latent traits, the traits move the connectivity of the recordings. `PRESETS` holds a cohort in which
the link is found in seconds, harder ones, one without any link, and two traps that look like one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.data.simulation.config import PRESETS, SimulationConfig
from brainfusion.runtime.errors import UserError

__all__ = ["PRESETS", "SimulationConfig", "simulate"]

# One random stream for each part: a change to one leaves the others' draws as they were.
_STREAMS = (
    "founders", "families", "genomes", "traits", "phenotypes",
    "patterns", "coefficients", "recordings", "oracle",
)  # fmt: skip


def simulate(path: Path, config: SimulationConfig, *, overwrite: bool = False) -> None:
    """Write a simulated cohort (docs/formats.md) to `path`, wholly or not at all.

    The same config gives the same bytes of every file, whatever the number of threads.

    Args:
        path: Folder to make.
        config: What to simulate.
        overwrite: Replace a simulated cohort that is there.

    Raises:
        UserError: The folder exists and may not be replaced, or cannot be written.
    """
    from brainfusion.runtime.files import atomic_folder, check_writable
    from brainfusion.runtime.threads import one_thread

    _check_target(path, overwrite=overwrite)
    check_writable(path.parent)
    try:
        with one_thread(), atomic_folder(path) as aside:
            _write(aside, config)
    except OSError as error:
        raise UserError(
            f"cannot write the cohort to {path} ({error.strerror or error}): nothing was kept; "
            "free space, or give another folder."
        ) from error


def _check_target(path: Path, *, overwrite: bool) -> None:
    from brainfusion.runtime.files import read_json

    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} is not a folder: give the path of a folder to make.")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{path} exists: expected a new folder. Give another one, or pass --overwrite."
        )
    facts = path / "cohort.json"
    values = read_json(facts) if facts.is_file() else None
    if not isinstance(values, dict) or values.get("origin") != "simulated":
        raise UserError(
            f"{path} is not a simulated cohort, so it is not overwritten: give another folder, or "
            "remove this one yourself."
        )


def _write(folder: Path, config: SimulationConfig) -> None:
    from brainfusion.data.atlas import Atlas
    from brainfusion.data.cohort import write_cohort_tables
    from brainfusion.data.simulation import bold, dna, genotypes, people
    from brainfusion.data.splits import Splits
    from brainfusion.runtime.files import write_json

    streams = {
        part: np.random.SeedSequence(config.seed, spawn_key=(i,)) for i, part in enumerate(_STREAMS)
    }
    rngs = {part: np.random.default_rng(stream) for part, stream in streams.items()}

    # -- people and their DNA --------------------------------------------------------------
    founders = genotypes.draw_founders(
        rngs["founders"],
        n_genes=config.n_genes,
        n_founders=config.n_founders,
        n_snps=config.n_snps,
        length_bp=config.gene_length_bp,
        n_populations=config.n_populations,
        fst=config.fst,
    )
    cohort = people.draw_people(config, founders, rngs)
    subjects = cohort.table()
    layout = bold.make_layout(config.n_parcels)
    atlas = Atlas(
        name=f"simulated-{config.n_parcels}",
        parcels=layout.names,
        xyz_mm=layout.xyz_mm,
        networks=layout.networks,
    )
    notes = f"Simulated, preset {config.preset}, seed {config.seed}: no real person is in here."
    write_cohort_tables(
        folder,
        name=f"simulated-{config.preset}",
        origin="simulated",
        subjects=subjects,
        atlas=atlas,
        notes=notes,
    )
    splits = Splits.make(subjects)
    splits.save(folder / "splits.json")
    genes = [f"SIM{i + 1:03d}" for i in range(config.n_genes)]
    embeddings = dna.embed_people(founders.sequences, cohort.haplotypes)
    dna.write_native(folder / "sources", embeddings, subjects=cohort.subjects, genes=genes)

    # -- recordings ------------------------------------------------------------------------
    dynamics = bold.make_dynamics(rngs["patterns"], config, layout)
    weights = bold.coefficients(rngs["coefficients"], config, cohort, dynamics)
    recordings = bold.generate(
        config, cohort, dynamics, weights=weights, stream=streams["recordings"]
    )
    kept = _oracle_people(rngs["oracle"], config)
    features = _write_recordings(folder / "recordings", config, cohort.subjects, recordings, kept)

    # -- truth -----------------------------------------------------------------------------
    truth = _truth(config, founders, cohort, genes)
    truth |= _oracles(config, cohort, features, kept, np.asarray(splits.label(cohort.subjects)))
    write_json(folder / "truth" / "truth.json", truth)
    _write_latents(folder / "truth" / "latents.parquet", cohort)


def _oracle_people(rng: np.random.Generator, config: SimulationConfig) -> np.ndarray:
    """Rows of the people that the oracle lines use, and whose connectivity is kept for them."""
    from brainfusion.data.simulation.readout import n_people_kept

    n_kept = n_people_kept(config.n_people, config.n_parcels)
    return np.sort(rng.permutation(config.n_people)[:n_kept])


def _write_recordings(
    folder: Path,
    config: SimulationConfig,
    subjects: tuple[str, ...],
    recordings: Iterable[tuple[int, int, np.ndarray]],
    kept: np.ndarray,
) -> np.ndarray:
    """Stream recordings to disk; returns the kept people's connectivity [n, c], mean over runs."""
    from brainfusion.data.recordings import RecordingWriter
    from brainfusion.data.simulation.readout import connectivity, n_connectivity

    row = {int(person): i for i, person in enumerate(kept)}
    features = np.zeros((len(kept), n_connectivity(config.n_parcels)), dtype=np.float32)
    with RecordingWriter(folder, n_parcels=config.n_parcels) as writer:
        for person, run, bold in recordings:
            writer.add(
                bold,
                recording=f"{subjects[person]}_run-{run + 1}",
                subject=subjects[person],
                tr_s=config.tr_s,
            )
            if person in row:
                features[row[person]] += connectivity(bold) / np.float32(config.n_runs)
    return features


def _truth(
    config: SimulationConfig, founders: Any, cohort: Any, genes: list[str]
) -> dict[str, Any]:
    from brainfusion.data.oracle import mutual_information
    from brainfusion.data.simulation import people
    from brainfusion.runtime.config import to_dict

    rho = [float(np.sqrt(config.h2))] * config.n_traits
    effects = [
        {
            "gene": genes[gene],
            "snp": int(snp),
            "position_bp": int(founders.positions_bp[gene, snp]),
            "per_allele": [float(value) for value in row],
        }
        for (gene, snp), row in zip(cohort.causal_snps, cohort.snp_effects, strict=True)
    ]
    return {
        "format": 1,
        "preset": config.preset,
        "seed": config.seed,
        "config": to_dict(config),
        "canonical_correlations": rho,
        "mutual_information_nats": mutual_information(rho),
        "causal_genes": list(dict.fromkeys(effect["gene"] for effect in effects)),
        "effects": effects,
        "variance_shares": {
            "genes": config.h2,
            "family": config.c2,
            "own": max(0.0, 1 - config.h2 - config.c2),
        },
        "noise": {
            "observation": config.observation_noise,
            "idiosyncrasy": config.idiosyncrasy,
            "step": config.step,
        },
        "phenotypes": {
            "cognition": {"kind": "continuous", "trait_share": people.COGNITION_TRAIT_SHARE},
            "mdd": {
                "kind": "binary",
                "prevalence": people.MDD_PREVALENCE,
                "liability_trait_share": people.MDD_TRAIT_SHARE,
            },
        },
    }


def _oracles(
    config: SimulationConfig, cohort: Any, features: np.ndarray, kept: np.ndarray, split: np.ndarray
) -> dict[str, Any]:
    """The two oracle lines, on the test people; both directions of retrieval averaged."""
    from brainfusion.data.simulation.readout import oracle_bold, oracle_latent

    genetic, traits, split = cohort.genetic[kept], cohort.traits[kept], split[kept]
    test = split == "test"
    return {
        "oracle_direction": "mean of both",
        "oracle_g_z": oracle_latent(genetic[test], traits[test], h2=config.h2),
        "oracle_g_bold": oracle_bold(features, genetic, traits, split=split, h2=config.h2),
    }


def _write_latents(path: Path, cohort: Any) -> None:
    import polars as pl

    columns: dict[str, Any] = {"subject": cohort.subjects}
    for name, values in (("genetic", cohort.genetic), ("trait", cohort.traits)):
        columns |= {f"{name}_{i}": column for i, column in enumerate(values.T)}
    pl.DataFrame(columns).write_parquet(path)
