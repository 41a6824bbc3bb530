"""What a query is told: who asks, who or what is searched, and how; and what cannot go together."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import tyro

from brainfusion.cli.options import at_least
from brainfusion.cli.published import PublishedOptions
from brainfusion.runtime.errors import UserError

Side = Literal["brain", "dna"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingOptions:
    """How the file of --recording is read, and by which encoder."""

    tr_s: float | None = None
    """Seconds between frames; what the file says (images, JSON beside it, HDF5) by default."""
    orientation: Literal["auto", "parcels-first", "trs-first"] = "auto"
    """Which axis comes first, where the file does not say; auto goes by the number of parcels."""
    parcels: Path | None = None
    """A text file with the names of unnamed parcels, one a line, in their order;
    without it they are taken to be in the order of the cohort's atlas."""
    labels: Path | None = None
    """The atlas that makes parcels of a dtseries (dlabel.nii) or of NIfTI (a label image)."""
    variable: str | None = None
    """Of a .mat or HDF5 file the table, of Arrow the column."""
    row: int | None = None
    """Which recording of a file of several, from 0."""
    drop_columns: tuple[str, ...] = ()
    """Columns of a table that are no parcels."""
    checkpoint: tuple[str, ...] = ()
    """The encoder that made the run's brain features: ours, or an authors' file;
    <workspace>/pretrain/<model>, or the run's own, by default.
    Of a run of several: NAME=PATH."""
    published: tyro.conf.OmitArgPrefixes[PublishedOptions] = field(default_factory=PublishedOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """How the gallery is searched."""

    index: Literal["auto", "exact", "hnsw", "ivfpq"] = "auto"
    """auto: exact up to 200,000 people, a graph (hnsw) up to 2,000,000, then quantised (ivfpq);
    always exact for genes, of which many are equal."""
    save_index: Path | None = None
    """A folder to keep the index in: of everybody, whatever filters this query has."""
    index_from: Path | None = None
    """Search an index that --save-index kept; it must be of this very alignment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryOptions:
    """Ask who is nearest: by an id, a recording or a DNA vector."""

    query: str | None = None
    """A subject id: print those nearest to this person instead of the scores."""
    query_from: Literal["auto", "dna", "brain"] = "auto"
    """Which of the person's two embeddings asks; the other modality is searched.
    auto: dna, or brain where genes are searched."""
    recording: tuple[Path, ...] = ()
    """A new recording asks: a file of any form that 'brainfusion import' reads,
    or several of one person, whose features are averaged."""
    dna_vector: tuple[str, ...] = ()
    """New DNA vectors ask: a file or folder in the model's own form, one answer a person in it,
    or an .npy of one person, [genes, width], in the order of the cohort's genes.
    Of a run of several models: evo2=PATH caduceus=PATH."""
    about: tuple[str, ...] = ()
    """What is known of who asks with a file: age=61 sex=F site=A,
    or a table with a column 'subject' for several people.
    Needed where the alignment residualises, and for --same."""
    gallery: Literal["people", "own-genes", "genes"] = "people"
    """What is searched: people;
    own-genes: the genes of the person who asks, or of --genes-of;
    genes: every gene of everybody.
    A gene is shown alone, all others of the person at their training mean:
    its score is the log density ratio of this brain with such a person, in nats.
    What it tells is how far it lies above the score with no gene shown."""
    genes: tuple[str, ...] = ()
    """Search these genes only; all by default."""
    genes_of: str | None = None
    """For own-genes: whose, by id."""
    top: int = 10
    """How many are printed."""
    among: Literal["test", "all"] = "all"
    """Whom a query searches: the test people, or everybody with a pair."""
    where: tuple[str, ...] = ()
    """Search only people with these values: site=A sex=F; site=A,B for one of several."""
    same: tuple[str, ...] = ()
    """Search only people who share the asker's own value of these columns: site group."""
    reading: tyro.conf.OmitArgPrefixes[RecordingOptions] = field(default_factory=RecordingOptions)
    search: tyro.conf.OmitArgPrefixes[IndexOptions] = field(default_factory=IndexOptions)

    def __post_init__(self) -> None:
        at_least(self, 1, "top")

    def check(self) -> None:
        """Refuse options that do not go together, or that would have no effect.

        Raises:
            UserError: As above, by the names of their flags.
        """
        asks = {
            "--query": self.query is not None,
            "--recording": bool(self.recording),
            "--dna-vector": bool(self.dna_vector),
        }
        given = [flag for flag, is_given in asks.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} both ask: give one of them.")
        if not given:
            _refuse(_changed(self), "goes with a query: give --query, --recording or --dna-vector")
            return
        if "--query" not in given:
            _refuse([] if self.query_from == "auto" else ["query_from"], "goes with --query")
        else:
            _refuse(["about"] if self.about else [], "is for files: the cohort knows this person")
        if "--recording" not in given:
            _refuse(_changed(self.reading), "goes with --recording")
        self._check_genes(given[0])
        if self.search.index_from and (self.search.save_index or self.search.index != "auto"):
            raise UserError(
                "--index-from takes an index as it was saved: leave --index and --save-index out."
            )

    def _check_genes(self, asks: str) -> None:
        if self.gallery == "people":
            _refuse([f for f in ("genes", "genes_of") if getattr(self, f)], "goes with --gallery")
            return
        if self.side != "brain":
            raise UserError(
                f"--gallery {self.gallery}: genes are searched by a brain: ask with --recording, "
                "or with --query ID --query-from brain."
            )
        if self.gallery == "genes":
            _refuse(["genes_of"] if self.genes_of else [], "goes with --gallery own-genes")
            return
        if asks == "--recording" and self.genes_of is None:
            raise UserError(
                "--gallery own-genes with a recording: whose genes? Give --genes-of ID, or "
                "--gallery genes for everybody's."
            )
        _refuse(
            [f for f in ("where", "same", "among") if f in _changed(self)] + _changed(self.search),
            "has no effect on the genes of one person: use --gallery genes",
        )

    @property
    def side(self) -> Side:
        """Which side asks."""
        if self.recording:
            return "brain"
        if self.dna_vector:
            return "dna"
        if self.query_from != "auto":
            return self.query_from
        return "dna" if self.gallery == "people" else "brain"

    @property
    def is_asked(self) -> bool:
        """Whether there is a query at all."""
        return self.query is not None or bool(self.recording) or bool(self.dna_vector)


def _changed(options: object) -> list[str]:
    """Names of the options that are not at their default, also of those inside."""
    found = []
    for one in fields(options):  # type: ignore[arg-type]
        value = getattr(options, one.name)
        if hasattr(value, "__dataclass_fields__"):
            found += _changed(value)
        elif value != one.default:
            found.append(one.name)
    return found


def _refuse(names: list[str], why: str) -> None:
    if names:
        raise UserError(f"--{names[0].replace('_', '-')} {why}.")
