"""A query's answer as a table for people."""

from typing import Any


def table_of(answer: dict[str, Any]) -> str:
    """The JSON object of a query (docs/formats.md) as lines, one table for each who asks."""
    blocks = []
    for i, who in enumerate(answer["query"]["asks"]):
        rows = [row for row in answer["rows"] if row["query"] == who]
        blocks.append("\n".join([*_head(answer, i, len(rows)), *_lines(answer, rows, who)]))
    return "\n\n".join(blocks)


def _head(answer: dict[str, Any], i: int, n_rows: int) -> list[str]:
    query, gallery, index = (answer[key] for key in ("query", "gallery", "index"))
    who = {
        "person": f"this person's {query['from']}",
        "recording": "the brain of this recording",
        "dna": f"the DNA of {query['asks'][i]}",
    }[query["kind"]]
    if gallery["kind"] == "people":
        people = "person" if n_rows == 1 else "people"
        first = f"the {n_rows} {people} whose {answer['searched']} is nearest to {who},"
    else:
        genes = "gene" if n_rows == 1 else "genes"
        first = f"the {n_rows} {genes} nearest to {who}, each shown alone,"
    filters = "; ".join(_filter(key, value, i) for key, value in answer["filters"].items())
    kind = f"{index['kind']} search, recall@10 {index['recall_at_10']:.3f}"
    if index["kind"] != "exact" and index["searched_exactly"]:
        kind += ", exact where narrowed"
    return [
        first,
        f"of {gallery['n_searched'][i]} ({filters}; {kind}), by {answer['score']}:",
    ]


def _filter(key: str, value: Any, i: int) -> str:
    if key == "among":
        return str(value)
    if key == "same":
        own = value[i] if isinstance(value, list) else value
        return ", ".join(f"same {name} ({text})" for name, text in own.items())
    if key == "where":
        return ", ".join(f"{name}={','.join(texts)}" for name, texts in value.items())
    return f"{key} {', '.join(value) if isinstance(value, list) else value}"


def _lines(answer: dict[str, Any], rows: list[dict[str, Any]], who: str) -> list[str]:
    of_person = answer["query"]["kind"] == "person"
    if answer["gallery"]["kind"] == "people":
        return [
            f"{row['rank']:>4}  {row['id']:<20} {row['score']:>8.3f}"
            + ("  <- the same person" if of_person and row["id"] == who else "")
            for row in rows
        ]
    lines = [f"rank  {'gene':<28} {'score':>8} {'tells':>8}"]
    lines += [
        f"{row['rank']:>4}  {row['id']:<28} {row['score']:>8.3f} "
        f"{row['above_nothing_shown']:>+8.3f}"
        + ("  <- the same person" if _is_own(answer, row, who) else "")
        for row in rows
    ]
    return [*lines, "tells: the score less that of a person of whom no gene is shown."]


def _is_own(answer: dict[str, Any], row: dict[str, Any], who: str) -> bool:
    own = answer["query"]["kind"] == "person" and row["person"] == who
    return own and answer["gallery"]["kind"] == "genes"
