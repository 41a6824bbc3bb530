"""`brainfusion audit`: does every table of a cohort belong to these people?

Holds sessions against each other (connectomes identify people), and connectomes, features and DNA
vectors against age, sex, motion and ancestry, for the pairing as it stands and for shifts along
the order of the ids. Exits with 1 if a table is shifted. No id is printed.
"""

from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import tyro

from brainfusion.cli.options import at_least, parse
from brainfusion.cli.workspace import Place, Workspace
from brainfusion.data.cohort import Cohort
from brainfusion.data.features import read_features
from brainfusion.eval.audit import (
    MIN_PEOPLE,
    Check,
    fingerprint,
    id_order,
    predictions,
    similarities,
)
from brainfusion.eval.baselines import connectome, fill_missing
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.files import write_json
from brainfusion.runtime.logs import say
from brainfusion.runtime.threads import one_thread

BRAIN_COLUMNS = ("age", "sex", "motion")


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditOptions:
    """Options of `brainfusion audit`."""

    place: tyro.conf.OmitArgPrefixes[Place] = field(default_factory=Place)
    features: tuple[Path, ...] = ()
    """Feature files to audit against the cohort's people and recordings."""
    dna: tuple[str, ...] = ()
    """DNA models whose stores are audited against ancestry and sex."""
    columns: tuple[str, ...] = ()
    """Columns of subjects.parquet to predict; age, sex, motion and ancestry_1.. by default."""
    max_shift: int = 5
    """Shifts up to this many people either way."""
    max_people: int = 1000
    """The first so many people in the order of their ids are looked at."""
    seed: int = 0
    """Seeds folds and random pairings."""
    out: Path | None = None
    """A JSON file for all figures."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_shift")
        at_least(self, 12, "max_people")


def main(argv: list[str]) -> int:
    """Run every check that the cohort's tables permit; print a line each."""
    options = parse(AuditOptions, argv, prog="brainfusion audit", description=__doc__ or "")
    workspace = Workspace.of(options.place)
    cohort = workspace.open_cohort()
    for name in options.columns:
        if name not in cohort.subjects.columns:
            raise UserError(
                f"subjects.parquet has no column '{name}'. {nearest(name, cohort.subjects.columns)}"
            )
    people = _people(cohort, options.max_people)
    with one_thread():
        sessions = _sessions(options, cohort, people)
        checks = [*sessions.values(), *_tables(options, workspace, cohort, people)]
    if not checks:
        raise UserError(
            f"the cohort '{cohort.name}' has one session a person and no column to predict (age, "
            "sex, motion, ancestry_1): nothing in it tells who is who; add one, or --features."
        )
    shifted = [check for check in checks if check.verdict == "shifted"]
    for check in checks:
        print(check.sentence())
    for line in _summary(checks, sessions):
        print(line)
    if options.out is not None:
        rows = [{**asdict(check), "verdict": check.verdict, "best": check.best} for check in checks]
        write_json(options.out, {"format": 1, "kind": "audit", "checks": rows})
        say(f"written: {options.out}")
    return 1 if shifted else 0


def _people(cohort: Cohort, most: int) -> pl.DataFrame:
    """Rows of subjects.parquet in the order of the ids, those with a recording, at most `most`."""
    recorded = cohort.recordings.index["subject"].unique().to_list()
    people = cohort.subjects.filter(pl.col("subject").is_in(recorded))
    people = people[id_order(people["subject"].to_list())]
    if people.height > most:
        say(f"the first {most} of {people.height} people in the order of their ids are audited.")
    return people.head(most)


def _connectomes(
    cohort: Cohort, people: pl.DataFrame, session: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Connectomes of a session's recordings (all sessions: the first), and the people's places."""
    index = cohort.recordings.index.with_row_index("i")
    if session is not None:
        index = index.filter(pl.col("session") == session)
    first = index.unique("subject", keep="first", maintain_order=True)
    row_of = dict(zip(first["subject"].to_list(), first["i"].to_list(), strict=True))
    subjects = people["subject"].to_list()
    places = np.array([place for place, subject in enumerate(subjects) if subject in row_of])
    values = connectome(cohort.recordings, [row_of[subjects[place]] for place in places])
    return fill_missing(values, np.ones(len(values), dtype=bool)), places


def _sessions(
    options: AuditOptions, cohort: Cohort, people: pl.DataFrame
) -> dict[tuple[str, str], Check]:
    """Every pair of sessions that enough people have."""
    sessions = cohort.recordings.index["session"].unique().sort().to_list()
    if len(sessions) < 2:
        return {}
    found = {session: _connectomes(cohort, people, session) for session in sessions}
    checks = {}
    for one, other in combinations(sessions, 2):
        (a, places_a), (b, places_b) = found[one], found[other]
        what = f"session {one} and session {other}"
        if (n_both := len(np.intersect1d(places_a, places_b))) < MIN_PEOPLE:
            say(f"{what}: {n_both} people have both, too few to compare.")
            continue
        checks[one, other] = fingerprint(
            a, b, (places_a, places_b), what=what, max_shift=options.max_shift, seed=options.seed
        )
    return checks


def _tables(
    options: AuditOptions, workspace: Workspace, cohort: Cohort, people: pl.DataFrame
) -> list[Check]:
    """Connectomes, feature files and DNA stores against the people, and against connectomes."""
    how = {"max_shift": options.max_shift, "seed": options.seed}
    ancestry = tuple(name for name in people.columns if name.startswith("ancestry_"))
    offered = [name for name in BRAIN_COLUMNS if name in people.columns]
    brain_columns = options.columns or tuple(offered)
    own, _ = _connectomes(cohort, people, None)
    checks = predictions(own, people, brain_columns, what="connectomes", **how)
    for path in options.features:
        table = read_features(path)
        rows, vectors = _matched(path.stem, table.subjects, table.vectors, people)
        theirs = people[rows]
        checks += predictions(vectors, theirs, brain_columns, what=path.stem, **how)
        checks.append(similarities(vectors, own[rows], what=f"{path.stem} and connectomes", **how))
    for model in options.dna:
        subjects, vectors = _dna(workspace, model)
        rows, vectors = _matched(model, subjects, vectors, people)
        columns = options.columns or (*ancestry, *(name for name in offered if name == "sex"))
        checks += predictions(vectors, people[rows], columns, what=model, **how)
    return checks


def _dna(workspace: Workspace, model: str) -> tuple[tuple[str, ...], np.ndarray]:
    from brainfusion.cli.workspace import ensure_genetics
    from brainfusion.genetics import read

    features = read(model, ensure_genetics(workspace, model))
    flat = features.concatenated()
    spread = flat.std(axis=0)
    # Vectors share a large mean; what differs between people is small, and is what counts.
    return features.subjects, (flat - flat.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def _matched(
    name: str, subjects: tuple[str, ...], vectors: np.ndarray, people: pl.DataFrame
) -> tuple[list[int], np.ndarray]:
    """Rows of `people` that have a vector, and their vectors."""
    row_of = {subject: row for row, subject in enumerate(subjects)}
    rows = [i for i, subject in enumerate(people["subject"]) if subject in row_of]
    if not rows:
        raise UserError(
            f"none of the {len(subjects)} ids of '{name}' is a person with a recording: compare "
            "its ids with subjects.parquet (leading zeros, suffixes)."
        )
    return rows, vectors[[row_of[people["subject"][i]] for i in rows]]


def _summary(checks: list[Check], sessions: dict[tuple[str, str], Check]) -> list[str]:
    """What it comes to, and which session is the odd one."""
    counts = {
        verdict: sum(check.verdict == verdict for check in checks)
        for verdict in ("aligned", "shifted", "unclear")
    }
    text = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    if not counts["shifted"]:
        return [f"{text}: no table is shifted as far as these checks can see."]
    lines = []
    for session in sorted({name for pair in sessions for name in pair}):
        own = [check.verdict for pair, check in sessions.items() if session in pair]
        rest = [check.verdict for pair, check in sessions.items() if session not in pair]
        if rest and set(own) == {"shifted"} and "shifted" not in rest:
            lines.append(f"session {session} is the odd one: the others agree with one another.")
    return [
        *lines,
        f"{text}: a table does not belong to these people as it is joined; find its source.",
    ]
