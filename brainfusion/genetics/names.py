"""What the names of files in a folder say: whose they are, of which gene, haplotype and strand.

By a template such as "{gene}", "{subject}", "{subject}/{gene}" or
"{gene}/{subject}_{haplotype}_{strand}". Without one in provenance.json, the names are compared with
`subjects.txt` and `genes.txt`, and a folder whose files are neither is one file a gene.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from brainfusion.genetics.containers import Container, open_container
from brainfusion.genetics.ids import text_ids
from brainfusion.genetics.layout import Layout
from brainfusion.runtime.errors import UserError

_FORWARD = ("fwd", "forward", "+", "plus", "f", "1", "0")
_REVERSE = ("rc", "rev", "reverse", "-", "minus", "r")


@dataclass(frozen=True, kw_only=True)
class Names:
    """Files by what their names say; "" where a name does not say it."""

    paths: dict[tuple[str, str, str, str], Path]
    """(subject, gene, haplotype, strand) -> file."""
    fields: frozenset[str]
    """What the names say."""
    root: Path
    template: str

    @contextmanager
    def without_people(self) -> Iterator[None]:
        """Takes ids of people, which are in files' names, out of errors: a number is put there."""
        try:
            yield
        except UserError as error:
            text = str(error)
            people = self.values(0)
            for (subject, gene, haplotype, strand), path in self.paths.items():
                if subject and str(path) in text:
                    number = f"<{people.index(subject) + 1} of {len(people)} people by name>"
                    name = self.template.format(
                        subject=number, gene=gene, haplotype=haplotype, strand=strand
                    )
                    text = text.replace(str(path), f"{self.root / name}{path.suffix}")
            raise type(error)(text) from None

    def values(self, place: int) -> list[str]:
        """The distinct words at a place of the key, sorted; of strands, the forward one first."""
        words = sorted({key[place] for key in self.paths})
        return sorted(words, key=lambda word: word.lower() in _REVERSE) if place == 3 else words


def matched_names(
    root: Path,
    files: list[Path],
    layout: Layout,
    *,
    subjects: tuple[str, ...] | None,
    genes: tuple[str, ...] | None,
    level: str,
) -> Names | None:
    """What the files' names mean, or None for one file that holds everyone.

    Raises:
        UserError: Names that do not fit the template, or that could mean either.
    """
    template = layout.files
    if template is None:
        if len(files) == 1 and files[0].parent == root:
            return None
        template = _guess(root, files, subjects=subjects, genes=genes, level=level)
    return _matched(root, files, template)


def _matched(root: Path, files: list[Path], template: str) -> Names:
    pattern = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template)))
    paths: dict[tuple[str, str, str, str], Path] = {}
    n_strange = 0
    for file in files:
        match = pattern.fullmatch(file.relative_to(root).with_suffix("").as_posix())
        if match is None:
            n_strange += 1
            continue
        said = match.groupdict()
        key = (
            said.get("subject", ""),
            said.get("gene", ""),
            said.get("haplotype", ""),
            said.get("strand", ""),
        )
        paths[key] = file
    if n_strange:
        raise UserError(
            f"{root}: {n_strange} of {len(files)} files are not named '{template}' (without the "
            "suffix): move them away, or correct files in provenance.json."
        )
    return Names(paths=paths, fields=frozenset(pattern.groupindex), root=root, template=template)


def _guess(
    root: Path,
    files: list[Path],
    *,
    subjects: tuple[str, ...] | None,
    genes: tuple[str, ...] | None,
    level: str,
) -> str:
    """The template that the names fit, by the ids that are known."""
    stems = {file.stem for file in files}
    if files[0].parent != root:
        folders = {file.parent.name for file in files}
        for known, inner, outer in (
            (genes, "{subject}/{gene}", "{gene}/{subject}"),
            (subjects, "{gene}/{subject}", "{subject}/{gene}"),
        ):
            if known is not None and stems <= set(known):
                return inner
            if known is not None and folders <= set(known):
                return outer
        raise UserError(
            f'{root}: folders of people or of genes? Declare "files": "{{subject}}/{{gene}}" or '
            '"{gene}/{subject}" in provenance.json, or put the names into genes.txt.'
        )
    if level == "subject":
        return "{subject}"
    if genes is not None and stems == set(genes):
        return "{gene}"
    if subjects is not None and len(stems & set(subjects)) > len(stems & set(genes or ())):
        return "{subject}"
    if genes is not None and subjects is None:
        first = _first(root, files)
        if first.subjects is None:
            return "{subject}"
    if genes is not None:
        raise UserError(
            f"{root}: {len(set(genes) ^ stems)} genes are only in genes.txt or "
            "only among the files: list exactly those that are there."
        )
    if subjects is None:
        first = _first(root, files)
        if first.subjects is None and first.genes is not None:
            return "{subject}"
    return "{gene}"


def _first(root: Path, files: list[Path]) -> Container:
    with _matched(root, files, "{subject}").without_people():
        return open_container(files[0])


def ids_of_names(
    written: list[str], listed: tuple[str, ...] | None, what: str, *, where: Path
) -> dict[str, str]:
    """Ids in order -> the words in the files' names."""
    ids = dict(zip(text_ids(written, what=what, where=str(where)), written, strict=True))
    if listed is None:
        return ids
    if unknown := set(ids) - set(listed):
        raise UserError(
            f"{where}: {len(unknown)} of {len(ids)} {what}s in the files' names are not in "
            f"{what}s.txt: list all that are there."
        )
    return {name: ids.get(name, name) for name in listed}


def check_pairs(names: Names, layout: Layout, *, where: Path) -> None:
    """Hold the words for haplotypes and strands in the names against what is declared.

    Raises:
        UserError: Not two words, strands that are not declared, or words that are no strands.
    """
    for place, field, declared in (
        (2, "haplotype", layout.has_haplotypes),
        (3, "strand", layout.has_strands),
    ):
        words = names.values(place)
        if field not in names.fields:
            continue
        if len(words) != 2:
            raise UserError(
                f"{where}: {len(words)} different words for {field} in the files' names "
                f"({', '.join(words[:4])}), expected 2."
            )
        if field == "strand" and not declared:
            raise UserError(f'{where}: files of each strand: declare "strands": "pair".')
        known = {word.lower() for word in words}
        if field == "strand" and not (known & set(_FORWARD) and known & set(_REVERSE)):
            raise UserError(
                f"{where}: strands are called {' and '.join(words)}, expected such as fwd and rc."
            )
