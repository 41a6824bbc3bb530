"""Who asks: a person of the run, a new recording, or new DNA vectors, as vectors to search with.

Shape legend: q who ask, n people of a file, g genes, h width, k width of the search.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from brainfusion.cli.query.dna import read_dna
from brainfusion.cli.query.encoder import maker_of
from brainfusion.cli.query.options import QueryOptions, Side
from brainfusion.cli.query.run import QueryRun
from brainfusion.cli.query.values import about_askers, covariates_of
from brainfusion.data.importers.recording import Recording, read_recording
from brainfusion.encoders.person import person_features
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, eq=False)
class Asker:
    """Those who ask, one answer each."""

    kind: str
    """"person", "recording" or "dna"."""
    side: Side
    ids: list[str]
    """A subject, the name of a file, or the people that a file names."""
    vectors: np.ndarray
    """float32 [q, k]."""
    modalities: tuple[str, ...]
    """What the vectors are the mean of: features or DNA models."""
    files: tuple[str, ...] = ()
    known: list[dict[str, Any]] = field(default_factory=list)
    """What is known of each by column: of a person of the run as the cohort has it, else text."""
    split: str | None = None
    """Of a person of the run."""


def asker_of(asked: QueryRun, options: QueryOptions) -> Asker:
    """Who asks.

    Raises:
        UserError: Nobody of that id has a pair, a file cannot be read or does not fit the run, or
            covariates are missing.
    """
    if options.recording:
        return _recording(asked, options)
    if options.dna_vector:
        return _dna(asked, options)
    assert options.query is not None
    return _person(asked, options.query, options)


def _person(asked: QueryRun, person: str, options: QueryOptions) -> Asker:
    side = options.side
    table = asked.vectors(side)
    if person not in table.subjects:
        raise UserError(
            f"there is no person '{person}' among the {len(table.subjects)} pairs of "
            f"{asked.run.path}: give an id of the cohort's subjects.parquet."
        )
    row = table.subjects.index(person)
    assert table.extra is not None
    return Asker(
        kind="person",
        side=side,
        ids=[person],
        vectors=table.vectors[row : row + 1],
        modalities=asked.run.brain if side == "brain" else asked.run.dna,
        known=[asked.people([person]).to_dicts()[0]] if options.same else [{}],
        split=table.extra["split"][row],
    )


def _recording(asked: QueryRun, options: QueryOptions) -> Asker:
    """The mean of the brain modalities that the files can give."""
    ids = [options.recording[0].name]
    known = about_askers(options.about, ids)
    covariates = covariates_of(asked.alignment.covariates, known, used=options.same)
    recordings, features, refused = _read(asked, options), {}, {}
    makers = {name: maker_of(asked, name, options.reading) for name in asked.run.brain}
    for name, (pretrained, made) in makers.items():
        try:
            features[name] = person_features(
                pretrained, recordings, made=made, centroids=asked.cohort.atlas
            )
        except UserError as error:
            refused[name] = error
    if not features:
        raise next(iter(refused.values()))
    for name, error in refused.items():
        say(f"{name} is left out, which this recording cannot give: {error}")
    if len(asked.run.brain) > 1:
        say(f"the brain that asks is the mean of {' and '.join(features)}.")
        given = {asked.modality("brain", name): values for name, values in features.items()}
    else:
        [given] = features.values()
    return Asker(
        kind="recording",
        side="brain",
        ids=ids,
        vectors=asked.scored("brain", asked.alignment.embed_brain(given, covariates)),
        modalities=tuple(features),
        files=tuple(str(path) for path in options.recording),
        known=[dict(row) for row in known],
    )


def _read(asked: QueryRun, options: QueryOptions) -> list[Recording]:
    """The files, in the parcels of the cohort."""
    reading = options.reading
    return [
        read_recording(
            path,
            asked.cohort.atlas,
            tr_s=reading.tr_s,
            orientation=reading.orientation,
            parcels=reading.parcels,
            labels=reading.labels,
            variable=reading.variable,
            row=reading.row,
            drop_columns=reading.drop_columns,
        )
        for path in options.recording
    ]


def _dna(asked: QueryRun, options: QueryOptions) -> Asker:
    """The mean of the DNA modalities that were given."""
    found = read_dna(asked, options.dna_vector)
    known = about_askers(options.about, found.ids)
    covariates = covariates_of(asked.alignment.covariates, known, used=options.same)
    specs: Sequence[str] = list(found.genes)
    if len(asked.run.dna) > 1:
        say(f"the DNA that asks is the mean of {' and '.join(specs)}.")
        given: Any = {asked.modality("dna", spec): v for spec, v in found.genes.items()}
    else:
        [given] = found.genes.values()
    return Asker(
        kind="dna",
        side="dna",
        ids=found.ids,
        vectors=asked.scored("dna", asked.alignment.embed_dna(given, covariates)),
        modalities=tuple(specs),
        files=tuple(str(path) for path in found.files),
        known=[dict(row) for row in known],
    )
