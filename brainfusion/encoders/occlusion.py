"""What features are without some parcels: the recordings again, with those parcels' signal flat.

A hidden parcel is 0 after conditioning, which is its own mean: it keeps its place, and loses all
that it had to say. What other parcels say of it, through what they share, stays.

Shape legend: n people, p parcels, t TRs, f features.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from brainfusion.data.cohort import Cohort
from brainfusion.encoders.checkpoints import Pretrained
from brainfusion.encoders.embed import (
    EmbedSettings,
    FrozenEncoder,
    batches_of_one_length,
    centroids_mm,
    default_pooling,
    long_enough,
    parcel_order,
    poolings,
)
from brainfusion.encoders.pooling import check_pooling
from brainfusion.runtime.errors import UserError


def features_without(
    pretrained: Pretrained,
    cohort: Cohort,
    subjects: Sequence[str],
    parcels: Mapping[str, np.ndarray],
    settings: EmbedSettings | None = None,
    *,
    device: torch.device | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Features of some people with one group of parcels hidden, group after group.

    Every group costs as much as embedding these people once.

    Args:
        pretrained: Encoder with its conditioning and atlas.
        cohort: Its parcels are matched to the encoder's by name.
        subjects: People with at least one recording that is long enough.
        parcels: Of each group its parcels, by row of the encoder's atlas; an empty group hides
            nothing and gives the features as `embed` makes them.
        settings: As for `embed`.
        device: Where the encoder runs.

    Yields:
        A group's name and float32 [n, f] in the order of `subjects`.

    Raises:
        UserError: As `embed`; a person without a recording that is long enough.
    """
    settings = settings or EmbedSettings()
    pooling = settings.pooling or default_pooling(pretrained)
    check_pooling(pooling, poolings(pretrained.module))
    order = parcel_order(pretrained, cohort)
    rows, lengths = long_enough(pretrained, cohort, pooling)
    place = {subject: i for i, subject in enumerate(subjects)}
    index = cohort.recordings.index
    owner = np.array([place.get(subject, -1) for subject in index["subject"]])[rows]
    rows, lengths, owner = rows[owner >= 0], lengths[owner >= 0], owner[owner >= 0]
    n_runs = np.bincount(owner, minlength=len(subjects))
    if n_none := int((n_runs == 0).sum()):
        raise UserError(
            f"{n_none} of {len(subjects)} people have no recording that is long enough for this "
            "encoder: leave them out."
        )
    owner_of = dict(zip(rows.tolist(), owner.tolist(), strict=True))
    encode = FrozenEncoder(
        pretrained,
        centroids_mm(pretrained, cohort, order),
        pooling,
        settings,
        device or torch.device("cpu"),
    )
    batches = batches_of_one_length(rows, lengths, cohort, settings.batch_size)
    read, tr_s = cohort.recordings.read, index["tr_s"].to_list()
    for name, hidden in parcels.items():
        sums: np.ndarray | None = None
        for batch in batches:
            bold = np.stack(
                [encode.conditioning.prepare(read(int(i))[order], tr_s=tr_s[i]) for i in batch]
            )
            bold[:, hidden] = 0.0
            vectors = encode(bold)
            if sums is None:
                sums = np.zeros((len(subjects), vectors.shape[1]))
            np.add.at(sums, [owner_of[int(i)] for i in batch], vectors)
        assert sums is not None
        yield name, (sums / n_runs[:, None]).astype(np.float32)
