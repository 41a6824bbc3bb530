"""Modalities of a cohort's people: what each side consists of, and who has what.

`brainjepa,brainlm` (or two words) are two brain modalities, `evo2,caduceus` are two of DNA, and
`evo2+caduceus` is one, whose genes are those of both models.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from brainfusion.alignment.genes.vectors import GeneVectors
from brainfusion.alignment.modalities import modality_name
from brainfusion.cli.workspace import Workspace, ensure_features, ensure_genetics, known_dna
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import Features, read_features
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

if TYPE_CHECKING:
    from brainfusion.genetics import GeneticFeatures


def brain_features(names: Sequence[str]) -> tuple[str, ...]:
    """The brain modalities that words of a command name, each once.

    Raises:
        UserError: None, or one named twice.
    """
    found = tuple(part for name in names for part in name.split(",") if part)
    if not found:
        raise UserError("--brain names no features: expected one or several, such as brainjepa.")
    _refuse_repeated(found, "--brain", "modality")
    return found


def dna_models(names: Sequence[str]) -> tuple[str, ...]:
    """The DNA modalities that words of a command name, in the order of the adapters.

    Each is one model, or several joined by +; their order does not matter.

    Raises:
        UserError: None, an unknown one, or one named twice.
    """
    from brainfusion.genetics import ADAPTERS

    specs = [part for name in names for part in name.split(",") if part]
    if not specs:
        raise UserError("--dna names no model: expected one or several, such as evo2 caduceus.")
    models = [known_dna(model) for spec in specs for model in spec.split("+")]
    _refuse_repeated(models, "--dna", "model")
    order = list(ADAPTERS)
    ordered = [sorted(spec.split("+"), key=order.index) for spec in specs]
    return tuple("+".join(spec) for spec in sorted(ordered, key=lambda spec: order.index(spec[0])))


def _refuse_repeated(names: Sequence[str], flag: str, what: str) -> None:
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise UserError(f"{flag} names {twice[0]} twice: expected each {what} once.")


def side_name(names: Sequence[str]) -> str:
    """What a side is called in folders and reports: its modalities joined by commas."""
    return ",".join(names)


dna_name = side_name


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """All that was asked for, as it was read: nobody is joined yet."""

    brain: dict[str, Features]
    """By the name of the features."""
    models: "dict[str, GeneticFeatures]"
    """By DNA model."""
    dna: tuple[str, ...]
    """The DNA modalities: models joined by +."""
    haplotypes: str

    @property
    def owners(self) -> dict[str, dict[str, set[str]]]:
        """Who has each modality, by side and what it is made of; DNA needs a gene of each model."""
        return {
            "brain": {name: set(table.subjects) for name, table in self.brain.items()},
            "dna": {
                spec: set.intersection(*(_carriers(self.models[m]) for m in spec.split("+")))
                for spec in self.dna
            },
        }

    def join(
        self, cohort: Cohort, *, needed: Callable[[Iterable[object]], bool]
    ) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
        """The people who have both sides, in the cohort's order, and the counts of everyone else.

        Args:
            cohort: Whose people count.
            needed: `any`: one modality of a side will do; `all`: each is needed.

        Raises:
            UserError: Nobody has both.
        """
        owners, known = self.owners, set(cohort.subjects["subject"])
        join = set.intersection if needed is all else set.union
        with_brain, with_dna = (join(*owners[side].values()) for side in ("brain", "dna"))
        both, anyone = known & with_brain & with_dna, set().union(*owners["brain"].values())
        listed = {subject for table in self.models.values() for subject in table.subjects}
        carriers = {model: _carriers(table) for model, table in self.models.items()}
        unknown = anyone.union(*carriers.values()) - known
        brains = {
            f"with {name} features": known & people for name, people in owners["brain"].items()
        }
        parts = {f"with {model} embeddings": known & people for model, people in carriers.items()}
        flow = [
            {"step": "people in the cohort", "n": len(known)},
            *_steps(brains if len(brains) > 1 else {}),
            {"step": "with brain features", "n": len(known & with_brain)},
            *_steps(parts if len(parts) > 1 else {}),
            {"step": "with DNA embeddings", "n": len(known & with_dna)},
            {"step": "with both: pairs", "n": len(both)},
            {"step": "in a table but not in the cohort", "n": len(unknown)},
        ]
        for steps, has, name in ((brains, with_brain, self.brain), (parts, with_dna, self.dna)):
            if len(steps) > 1:
                counts = ", ".join(f"{len(people)} people {step}" for step, people in steps.items())
                rule = "all" if needed is all or len(name) == 1 else "any"
                say(f"{side_name(list(name))}: {counts}; {len(known & has)} have {rule}.")
        brain, dna = (_spoken(list(names), needed) for names in (self.brain, self.dna))
        say(
            f"pairs: {len(both)} people have {brain} features and {dna} embeddings; "
            f"{len(known & with_brain - with_dna)} only brain, "
            f"{len(known & with_dna - with_brain)} only DNA, {len(unknown)} unknown to the cohort."
        )
        if n_empty := len((known & listed) - set().union(*carriers.values())):
            say(f"without a vector of any gene, and left out: {n_empty} of {len(known & listed)}.")
        if not both:
            raise UserError(
                f"nobody has both {brain} features and {dna} embeddings: the ids of the "
                "tables do not meet. Compare them with subjects.parquet (leading zeros, suffixes, "
                "numbers as text)."
            )
        return cohort.subjects.filter(pl.col("subject").is_in(list(both))), flow

    def provenance(self, cohort: Cohort) -> dict[str, Any]:
        """What the tables say of themselves; of several encoders by name, of DNA by model."""
        brain = {name: table.provenance for name, table in self.brain.items()}
        return {
            "brain": brain if len(brain) > 1 else next(iter(brain.values())),
            "dna": {model: t.provenance.to_dict() for model, t in self.models.items()},
            "haplotypes": self.haplotypes,
            "splits_hash": cohort.splits().hash,
            "cohort_hash": cohort.hash,
        }


def load_tables(
    workspace: Workspace,
    cohort: Cohort,
    *,
    brain: Sequence[str],
    dna: Sequence[str],
    haplotypes: str = "mean",
) -> Tables:
    """Read what was asked for; the demo's features and stores are made if need be.

    Raises:
        UserError: Something is absent or broken, or a store holds one vector for both haplotypes.
    """
    from brainfusion.genetics import read

    names, specs = brain_features(brain), dna_models(dna)
    features = {name: read_features(ensure_features(workspace, name)) for name in names}
    models = {
        model: read(model, ensure_genetics(workspace, model)).with_haplotypes(haplotypes)
        for spec in specs
        for model in spec.split("+")
    }
    for name, table in features.items():
        made_of = table.provenance.get("cohort_hash")
        if made_of not in (None, cohort.hash):
            say(
                f"warning: features '{name}' were made from another state of the cohort "
                f"({made_of}, now {cohort.hash}): make them again with 'brainfusion embed --model "
                f"{name}'."
            )
    return Tables(brain=features, models=models, dna=specs, haplotypes=haplotypes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Modalities:
    """Row-aligned modalities of the people who have at least one of each side."""

    people: pl.DataFrame
    """Rows of subjects.parquet, one a person."""
    brain: dict[str, np.ndarray]
    """float32 [n, width] a modality; zeros for who lacks it."""
    dna: dict[str, GeneVectors]
    """Of n people a modality; somebody else's for who lacks it."""
    present: dict[str, np.ndarray]
    """bool [n] a modality: who has it."""
    labels: list[str]
    """train, validation or test."""
    provenance: dict[str, Any]
    flow: list[dict[str, Any]]
    """Who was dropped, and why: counts only."""

    @property
    def subjects(self) -> list[str]:
        """Ids, in row order."""
        return self.people["subject"].to_list()

    @property
    def features(self) -> dict[str, np.ndarray | GeneVectors]:
        """All modalities, the brain's first."""
        return {**self.brain, **self.dna}

    @property
    def sides(self) -> dict[str, tuple[str, ...]]:
        """The modalities of each side."""
        return {"brain": tuple(self.brain), "dna": tuple(self.dna)}


def load_modalities(tables: Tables, cohort: Cohort) -> Modalities:
    """The people who have at least one modality of each side; how many, and why, is said."""
    people, flow = tables.join(cohort, needed=any)
    subjects = people["subject"].to_list()
    names = {
        side: {key: modality_name(side, key) if len(has) > 1 else side for key in has}
        for side, has in tables.owners.items()
    }
    for by_key in names.values():
        _refuse_repeated(list(by_key.values()), "the options", "modality")
    present, brain, dna = {}, {}, {}
    for side, has in tables.owners.items():
        for key, owners in has.items():
            name = names[side][key]
            present[name] = np.array([subject in owners for subject in subjects])
            own = [subject for subject in subjects if subject in owners]
            if not own:
                raise UserError(
                    f"nobody with both sides has {key}: leave it out, or compare its ids with "
                    "subjects.parquet."
                )
            if side == "brain":
                brain[name] = _spread(tables.brain[key].select(own), present[name])
            else:
                chosen = {model: tables.models[model].select(own) for model in key.split("+")}
                dna[name] = GeneVectors(
                    sources=chosen, rows=np.maximum(np.cumsum(present[name]) - 1, 0)
                )
    return Modalities(
        people=people,
        brain=brain,
        dna=dna,
        present=present,
        labels=cohort.splits().label(subjects),
        provenance=tables.provenance(cohort),
        flow=flow,
    )


def _carriers(table: "GeneticFeatures") -> set[str]:
    """Who has a vector of any gene."""
    return {table.subjects[row] for row in np.flatnonzero(table.mask.any(axis=1))}


def _spread(rows: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Rows to where `has` is true, zeros elsewhere."""
    if has.all():
        return rows
    whole = np.zeros((len(has), rows.shape[1]), dtype=rows.dtype)
    whole[has] = rows
    return whole


def _steps(counts: dict[str, set[str]]) -> list[dict[str, Any]]:
    return [{"step": step, "n": len(people)} for step, people in counts.items()]


def _spoken(names: list[str], needed: Callable[[Iterable[object]], bool]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{'all' if needed is all else 'some'} of {', '.join(names)}"
