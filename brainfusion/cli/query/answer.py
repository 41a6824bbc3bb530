"""Who, or what, is nearest: a query of a person, a recording or a DNA vector, answered.

Nearest is the greatest log density ratio where the alignment has score vectors, or the cosine.
"""

import json
from typing import Any

import numpy as np

from brainfusion.cli.query.asker import Asker, asker_of
from brainfusion.cli.query.gallery import Gallery, gallery_of
from brainfusion.cli.query.options import QueryOptions
from brainfusion.cli.query.run import QueryRun
from brainfusion.cli.query.text import table_of
from brainfusion.cli.runs import AlignmentRun
from brainfusion.cli.workspace import Workspace
from brainfusion.runtime.logs import say


def answer(
    workspace: Workspace, run: AlignmentRun, options: QueryOptions, *, as_json: bool
) -> None:
    """Print who or what is nearest, by FAISS.

    Args:
        workspace: Where the cohort and the encoders are.
        run: The alignment.
        options: The query.
        as_json: Print one JSON object (docs/formats.md) instead of a table.

    Raises:
        UserError: Who asks, or what is searched, does not exist or does not fit the run.
    """
    asked = QueryRun(workspace=workspace, run=run)
    asker = asker_of(asked, options)
    gallery = gallery_of(asked, options, asker)
    if asker.split == "train":
        say(
            "this is a training person: the aligner has seen the pair, so finding it shows nothing."
        )
    found = _answer(asked, options, asker, gallery)
    print(json.dumps(found, indent=2) if as_json else table_of(found))


def _answer(
    asked: QueryRun, options: QueryOptions, asker: Asker, gallery: Gallery
) -> dict[str, Any]:
    """The answer as the JSON object of docs/formats.md."""
    index = gallery.index
    exact_anyway = index.kind != "exact" and any(mask is not None for mask in gallery.among)
    return {
        "query": {
            "kind": asker.kind,
            "from": asker.side,
            "asks": asker.ids,
            "files": list(asker.files),
            "modalities": list(asker.modalities),
            "split": asker.split,
        },
        "searched": gallery.side,
        "gallery": {
            "kind": options.gallery,
            "n_entries": len(index),
            "n_searched": [gallery.n_searched(i) for i in range(len(asker.ids))],
        },
        "score": asked.score,
        "index": {
            "kind": index.kind,
            "recall_at_10": index.recall_at_10,
            "searched_exactly": index.kind == "exact" or exact_anyway,
            "from": None if options.search.index_from is None else str(options.search.index_from),
        },
        "filters": gallery.filters,
        "rows": _rows(options, asker, gallery),
    }


def _rows(options: QueryOptions, asker: Asker, gallery: Gallery) -> list[dict[str, Any]]:
    """An entry a row: who asks, rank, id and score; of a gene also what it is and tells."""
    rows = []
    place = {name: i for i, name in enumerate(gallery.index.ids)}
    about = gallery.index.about
    for i, who in enumerate(asker.ids):
        vector = asker.vectors[i]
        for found in gallery.index.query(vector, options.top, among=gallery.among[i]):
            row = {"query": who, "rank": found.rank, "id": found.id, "score": found.score}
            if gallery.zeros:
                facts = about.row(place[found.id], named=True)
                zero = float(np.dot(vector, gallery.zeros[facts["model"]]))
                row |= {**facts, "above_nothing_shown": found.score - zero}
            rows.append(row)
    return rows
