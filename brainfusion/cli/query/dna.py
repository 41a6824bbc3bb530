"""DNA vectors of people who are not in the cohort, from files, as the genes that a run knows.

Shape legend: n people of a file, g genes of a model, h width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfusion.alignment.genes.vectors import GeneArray, GeneVectors
from brainfusion.cli.query.run import QueryRun
from brainfusion.runtime.errors import UserError, nearest
from brainfusion.runtime.logs import say

if TYPE_CHECKING:
    from brainfusion.genetics import GeneticFeatures

_MADE = ("checkpoint", "layer", "pooling", "strands", "level")
_OF_MANY = ("constant genes", "constant columns", "precision", "repeated people")
"""Alarms about how much people differ, which those who ask need not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DnaAskers:
    """People of files, with the genes of each DNA modality that was given."""

    ids: list[str]
    genes: dict[str, GeneVectors]
    """By modality: a model, or several joined by +."""
    files: list[Path]


def read_dna(asked: QueryRun, words: tuple[str, ...]) -> DnaAskers:
    """Read the files of --dna-vector.

    Raises:
        UserError: A model that the run does not have or that is not named, a modality of several
            models of which one is missing, files of different people, or vectors that do not fit.
    """
    paths = _paths(asked, words)
    ids, sources = None, {}
    for model, path in paths.items():
        own, source = _read(asked, model, path)
        if ids is not None and len(own) != len(ids):
            raise UserError(
                f"{path} holds {len(own)} people and the files before it {len(ids)}: expected the "
                "same people in each."
            )
        if ids is not None and own != ids and len(own) > 1:
            if set(own) != set(ids):
                raise UserError(f"{path} holds other people than the files before it.")
            order = [own.index(name) for name in ids]
            source = GeneArray(
                genes=source.genes, vectors=source.vectors[order], mask=source.mask[order]
            )
        ids = own if ids is None else ids
        sources[model] = source
    genes = {}
    for spec in asked.run.dna:
        models = spec.split("+")
        if absent := [model for model in models if model not in sources]:
            if len(absent) < len(models):
                raise UserError(
                    f"{spec} is one modality of this run: give --dna-vector {absent[0]}=PATH, too."
                )
            say(f"{spec} is left out: no file of it was given.")
            continue
        genes[spec] = GeneVectors.of({model: sources[model] for model in models})
    assert ids is not None
    return DnaAskers(ids=ids, genes=genes, files=list(paths.values()))


def _paths(asked: QueryRun, words: tuple[str, ...]) -> dict[str, Path]:
    """Files by DNA model."""
    models = [model for spec in asked.run.dna for model in spec.split("+")]
    found: dict[str, Path] = {}
    for word in words:
        model, mark, path = word.partition("=")
        if model not in models:
            if mark and not Path(word).exists():
                raise UserError(
                    f"--dna-vector {word}: no DNA model of this run. {nearest(model, models)}"
                )
            if len(models) > 1:
                known = " ".join(f"{name}=PATH" for name in models)
                raise UserError(
                    f"--dna-vector {word}: this run has {len(models)} DNA models; say whose "
                    f"vectors they are: {known}."
                )
            model, path = models[0], word
        if model in found:
            raise UserError(f"--dna-vector names {model} twice: expected one file or folder.")
        found[model] = Path(path)
    return found


def _read(asked: QueryRun, model: str, path: Path) -> tuple[list[str], GeneArray]:
    """Who is in a file, and their vectors of the genes that the run knows."""
    spec = next(spec for spec in asked.run.dna if model in spec.split("+"))
    conditioner = asked.genes(spec)
    names = tuple(gene.name for gene in conditioner.genes if gene.model == model)
    width = conditioner.widths[model]
    if path.suffix == ".npy" and path.is_file() and not _names_people(path):
        return _one_array(model, path, names, width)
    features = _native(model, path).with_haplotypes(asked.run.haplotypes)
    _check_made(asked, model, path, features)
    return list(features.subjects), _known_genes(model, path, features, names)


def _names_people(path: Path) -> bool:
    return any((path.parent / f"subjects{ending}").exists() for ending in (".txt", ".npy"))


def _one_array(
    model: str, path: Path, names: tuple[str, ...], width: int
) -> tuple[list[str], GeneArray]:
    """One person's .npy, [g, h]."""
    from brainfusion.data.importers.arrays import load_npy

    array = load_npy(path)
    if array.shape != (len(names), width) or array.dtype.kind != "f":
        hint = " (it looks transposed)" if array.shape == (width, len(names)) else ""
        raise UserError(
            f"{path.name} is {array.dtype} of shape {list(array.shape)}{hint}: expected floats "
            f"[{len(names)} genes, {width}], the genes in the order of the cohort's "
            f"genetics/{model}/genes.parquet."
        )
    vectors = np.array(array, dtype=np.float32)
    if n_bad := int((~np.isfinite(vectors).all(axis=1)).sum()):
        raise UserError(
            f"{path.name} has NaN or infinite values in {n_bad} of {len(names)} genes: expected "
            f"none; give a person who lacks genes in {model}'s own form."
        )
    say(f"{path.name}: {len(names)} genes x {width}, taken in the cohort's order of genes.")
    mask = np.ones((1, len(names)), bool)
    return [path.name], GeneArray(genes=names, vectors=vectors[None], mask=mask)


def _native(model: str, path: Path) -> "GeneticFeatures":
    """A model's own files, or a store of them."""
    from brainfusion.genetics import announce, open_stream, read
    from brainfusion.genetics.store import is_store

    if not path.exists() or is_store(path):
        return read(model, path)
    features = open_stream(model, path).gathered()
    announce(tuple(a for a in features.alarms if a.name not in _OF_MANY), where=str(path))
    return features


def _check_made(asked: QueryRun, model: str, path: Path, features: "GeneticFeatures") -> None:
    """Refuse vectors that were made otherwise than those that the run was trained on."""
    meta: dict[str, Any] = asked.alignment.info.get("meta", {})
    trained = meta.get("provenance", {}).get("dna", {}).get(model, {})
    own = features.provenance.to_dict()
    for key in _MADE:
        if key in trained and trained[key] != own.get(key):
            raise UserError(
                f"{path} says {key} '{own.get(key)}', but this run was trained on {model} vectors "
                f"of {key} '{trained[key]}': make them in the same way."
            )


def _known_genes(
    model: str, path: Path, features: "GeneticFeatures", names: tuple[str, ...]
) -> GeneArray:
    """The genes that the run knows, in its order; those that a file lacks are missing."""
    place = {name: i for i, name in enumerate(features.genes)}
    shared = [name for name in names if name in place]
    if not shared:
        raise UserError(
            f"{path}: none of its {features.n_genes} genes ('{features.genes[0]}', ...) is among "
            f"the {len(names)} that this run knows. {nearest(features.genes[0], names[:20])}"
        )
    for what, count in (
        ("genes that this run does not know: left out", features.n_genes - len(shared)),
        (f"of the {len(names)} genes that this run knows are absent", len(names) - len(shared)),
    ):
        if count:
            say(f"{path.name}: {count} {what}.")
    n = features.n_subjects
    vectors = np.zeros((n, len(names), features.width), np.float32)
    mask = np.zeros((n, len(names)), bool)
    for column, name in enumerate(names):
        if name in place:
            vectors[:, column] = features.column(place[name], np.arange(n))
            mask[:, column] = features.mask[:, place[name]]
    return GeneArray(genes=names, vectors=vectors, mask=mask)
