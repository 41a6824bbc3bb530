"""What `probe` looks at: the features of each modality beside a run's embeddings, and their CCA.

Several modalities of a side are a row each in the probes, of the people who have all of them; in a
CCA they stand side by side, each with a total variance of 1, so that none drowns the others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.cli.modalities import load_tables
from brainfusion.cli.pairs import Pairs, complete, connectomes
from brainfusion.cli.runs import AlignmentRun
from brainfusion.cli.scoring import BLOCKS, exchangeable, read_embeddings
from brainfusion.cli.workspace import Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.files import read_json
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class Probed:
    """The people who have every modality of a run, and their features; rows are people."""

    cohort: Cohort
    run: AlignmentRun
    pairs: Pairs
    brain: dict[str, np.ndarray]
    """By the name of the row: "brainjepa features"."""
    dna: dict[str, np.ndarray]
    """By the name of the row: "evo2 vectors"."""

    @property
    def held_out(self) -> np.ndarray:
        """Who was not trained on, bool [n]."""
        return np.array([label != "train" for label in self.pairs.labels])

    def features(self) -> dict[str, np.ndarray]:
        """Of the people held out: brain features, connectome, DNA vectors, embeddings."""
        kept = self.held_out
        subjects = [s for s, own in zip(self.pairs.subjects, kept, strict=True) if own]
        return {
            **{name: values[kept] for name, values in self.brain.items()},
            "connectome": connectomes(self.cohort, self.pairs)[kept],
            **{name: values[kept] for name, values in self.dna.items()},
            "brain embedding": read_embeddings(self.run.path, "brain").select(subjects),
            "DNA embedding": read_embeddings(self.run.path, "dna").select(subjects),
        }


def read_probed(workspace: Workspace, cohort: Cohort, run: AlignmentRun) -> Probed:
    """Read a run's modalities; who lacks one is left out, which is said."""
    tables = load_tables(workspace, cohort, brain=run.brain, dna=run.dna, haplotypes=run.haplotypes)
    pairs = complete(tables, cohort)
    training = np.flatnonzero(np.array(pairs.labels) == "train")
    dna = {}
    for spec in run.dna:
        sources = {model: pairs.genes.sources[model] for model in spec.split("+")}
        genes = GeneVectors(sources=sources, rows=pairs.genes.rows)
        dna[f"{spec} vectors"] = genes.concatenated(known_from=training)
    return Probed(
        cohort=cohort,
        run=run,
        pairs=pairs,
        brain={f"{name} features": t.select(pairs.subjects) for name, t in tables.brain.items()},
        dna=dna,
    )


def cca(
    probed: Probed,
    *,
    n_components: int,
    n_pcs: int,
    confounds: list[str],
    n_folds: int,
    n_permutations: int,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """The permutation test of brain features against DNA vectors: nothing in it was trained.

    Args:
        probed: All of them are in it, training people, too; but where the encoder was tuned on
            pairs, only people on whom it was not.
        n_components: How many to test.
        n_pcs: Principal components a side; 0 for an eighth of the people, at most 128.
        confounds: Columns taken out of both sides; those that the cohort lacks are left out.
        n_folds: For held-out correlations.
        n_permutations: In the people fitted on; held out, at most 199 of them.
        n_bootstrap: For intervals.
        seed: Of all of it.

    Returns:
        cca.json (docs/formats.md).
    """
    from brainfusion.eval.cca_permutation import cca_test
    from brainfusion.eval.design import covariate_matrix

    tuned = bool(read_json(probed.run.path / "summary.json").get("finetune"))
    rows = np.flatnonzero(probed.held_out | (not tuned))
    people, families = probed.pairs.people[rows], probed.pairs.families
    n_pcs = n_pcs or min(128, max(len(rows) // 8, 1))
    confounds = [name for name in confounds if name in people.columns]
    n_held_out = min(n_permutations, 199)
    whom = "people on whom the encoder was not tuned" if tuned else "people"
    say(f"CCA of {len(rows)} {whom}, {n_pcs} principal components a side")
    found = cca_test(
        _side_by_side([block[rows] for block in probed.brain.values()]),
        _side_by_side([block[rows] for block in probed.dna.values()]),
        nuisance=covariate_matrix(people, confounds),
        families=[families[row] for row in rows],
        blocks=exchangeable(people),
        n_components=n_components,
        n_pcs=n_pcs,
        n_permutations=n_permutations,
        n_folds=n_folds,
        n_held_out_permutations=n_held_out,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    return {
        "brain": probed.run.brain_name,
        "dna": probed.run.dna_name,
        "n": found.n,
        "n_people": len(rows),
        "held_out_only": tuned,
        "n_pcs": list(found.n_columns),
        "n_folds": n_folds,
        "n_permutations": n_permutations,
        "n_permutations_held_out": n_held_out,
        "exchanged_within": [name for name in BLOCKS if name in people.columns] + ["family"],
        "confounds": confounds,
        "components": found.rows(),
    }


def _side_by_side(blocks: list[np.ndarray]) -> np.ndarray:
    """One block as it is; of several each centred, with a total variance of 1."""
    if len(blocks) == 1:
        return blocks[0]
    scaled = []
    for block in blocks:
        centred = block - block.mean(axis=0)
        scaled.append(centred / max(float(np.sqrt((centred**2).sum() / len(block))), 1e-300))
    return np.concatenate(scaled, axis=1)


def cca_text(found: dict[str, Any]) -> str:
    """The table that the command prints."""
    lines = [
        f"{'component':<10} {'fitted':>7} {'p (family-wise)':>16} {'held out':>9} "
        f"{'95% interval':>18} {'permuted, 95%':>18} {'p':>7}"
    ]
    for row in found["components"]:
        held = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        null = f"[{row['null_low']:.3f}, {row['null_high']:.3f}]"
        lines.append(
            f"{row['component']:<10} {row['correlation']:>7.3f} {row['p_family_wise']:>16.3f} "
            f"{row['held_out']:>9.3f} {held:>18} {null:>18} {row['p_held_out']:>7.3f}"
        )
    return "\n".join(lines)
