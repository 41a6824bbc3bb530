import numpy as np
import pytest
import torch

from brainfusion import genetics
from brainfusion.runtime.errors import UserError

N, WIDTH = 30, 16


def contents(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    forward, reverse = (torch.from_numpy(rng.normal(size=(N, 2 * WIDTH))).half() for _ in range(2))
    forward[4, 3] = float("nan")  # half-precision autocast
    return {
        "concat_avg_ws": forward,
        "rc_concat_avg_ws": reverse,
        "chromosome": torch.arange(N) % 22 + 1,
        "labels": torch.arange(N) % 2,
        "distance_to_nearest_tss": torch.arange(N) * 100,
        "tissue_embed": torch.zeros(N, dtype=torch.long),
    }


def test_variants_are_read_as_variants_with_both_strands_averaged(tmp_path, capsys):
    items = contents(np.random.default_rng(0))
    torch.save(items, tmp_path / "train_embeds_combined.pt")
    variants = genetics.read_variants(tmp_path / "train_embeds_combined.pt")
    both = 0.5 * (items["concat_avg_ws"].float() + items["rc_concat_avg_ws"].float()).numpy()
    kept = np.arange(N) != 4
    np.testing.assert_array_equal(variants.reference, both[kept, :WIDTH])
    np.testing.assert_array_equal(variants.alternative, both[kept, WIDTH:])
    np.testing.assert_array_equal(variants.about["labels"], np.arange(N)[kept] % 2)
    assert variants.n_dropped == 1
    np.testing.assert_array_equal(variants.difference, variants.alternative - variants.reference)
    said = capsys.readouterr().err
    assert "29 variants without row ids" in said
    assert "1 rows with nan left out" in said


def test_variants_are_no_people_and_the_refusal_says_what_reads_them(tmp_path):
    file = tmp_path / "train_embeds_combined.pt"
    torch.save(contents(np.random.default_rng(0)), file)
    with pytest.raises(UserError, match=r"rows cannot be joined to people.*genetics\.variants"):
        genetics.read(
            "caduceus",
            file,
            checkpoint="simulated",
            strands="averaged",
            declare={"simulated": True},
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items.pop("concat_avg_ws"), "no 'concat_avg_ws'"),
        (
            lambda items: items.update(concat_avg_ws=torch.zeros(N, 3, 32)),
            r"\[variants, 2 x width\]",
        ),
        (lambda items: items.update(concat_avg_ws=torch.zeros(N, 31)), r"\[variants, 2 x width\]"),
    ],
)
def test_files_that_are_none_of_its_kind_are_refused(tmp_path, change, message):
    items = contents(np.random.default_rng(0))
    change(items)
    torch.save(items, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        genetics.read_variants(tmp_path / "x.pt")
