"""Who is nearest: a query of one person's embedding against the other modality of all.

Nearest is the greatest log density ratio where the alignment has score vectors, or the cosine.
"""

import json
from pathlib import Path

from brainfusion.cli.scoring import read_embeddings, read_scores
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say


def answer(
    run_dir: Path, person: str, *, query_from: str, top: int, among: str, as_json: bool
) -> None:
    """Print the people whose other modality is nearest to this person's, by FAISS.

    Args:
        run_dir: An alignment run.
        person: Who asks, by id.
        query_from: "dna" or "brain": which of the person's embeddings asks.
        top: How many people to print.
        among: "all" people with a pair, or the "test" people.
        as_json: Print rows of query, rank, id, score and what the score is, instead of a table.

    Raises:
        UserError: Nobody of that id has a pair.
    """
    from brainfusion.eval.retrieval.index import RetrievalIndex

    searched = "brain" if query_from == "dna" else "dna"
    asking, gallery = (read_scores(run_dir, tower) for tower in (query_from, searched))
    score = "density ratio, nats"
    if asking is None or gallery is None:
        score = "cosine"
        asking, gallery = (read_embeddings(run_dir, tower) for tower in (query_from, searched))
    if person not in asking.subjects:
        raise UserError(
            f"there is no person '{person}' among the {len(asking.subjects)} pairs of "
            f"{run_dir}: give an id of the cohort's subjects.parquet."
        )
    assert gallery.extra is not None
    keep = [i for i, s in enumerate(gallery.extra["split"]) if among == "all" or s == "test"]
    index = RetrievalIndex.build(gallery.vectors[keep], [gallery.subjects[i] for i in keep])
    vector = asking.vectors[asking.subjects.index(person)]
    rows = [row._asdict() | {"kind": score} for row in index.query(vector, top)]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"the {len(rows)} people whose {searched} is nearest to this person's {query_from},")
    print(f"of {len(keep)} ({among}), by {score}:")
    if gallery.extra["split"][gallery.subjects.index(person)] == "train":
        say(
            "this is a training person: the aligner has seen the pair, so finding it shows nothing."
        )
    for row in rows:
        own = "  <- the same person" if row["id"] == person else ""
        print(f"{row['rank']:>4}  {row['id']:<20} {row['score']:>8.3f}{own}")
