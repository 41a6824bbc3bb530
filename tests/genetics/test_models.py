import pytest

from brainfusion.genetics.models import (
    REGISTRY,
    SIMULATED,
    candidates,
    check_layer,
    check_tokens,
    check_width,
    find_checkpoint,
)
from brainfusion.runtime.errors import UserError


@pytest.mark.parametrize(
    ("model", "name", "width", "n_layers"),
    [
        ("evo2", "evo2_1b_base", 1920, 25),
        ("evo2", "evo2_7b", 4096, 32),
        ("evo2", "evo2_20b", 8192, 24),
        ("evo2", "evo2_40b", 8192, 50),
        ("generator", "GenerTeam/GENERator-v2-eukaryote-1.2b-base", 2048, 26),
        ("generator", "GENERator-eukaryote-3b-base", 3072, 30),
        ("caduceus", "kuleshov-group/caduceus-ps_seqlen-131k_d_model-256_n_layer-16", 256, 16),
    ],
)
def test_registry_holds_the_published_sizes(model, name, width, n_layers):
    spec = find_checkpoint(model, name)
    assert (spec.width, spec.n_layers) == (width, n_layers)


def test_raw_output_is_twice_the_width_for_equivariant_models_and_only_those():
    for family in REGISTRY.values():
        for spec in family.values():
            factor = 2 if spec.strand_class == "equivariant" else 1
            assert spec.output_width == factor * spec.width


def test_every_adapted_family_has_a_simulated_checkpoint_of_width_64():
    assert {REGISTRY[model][SIMULATED].width for model in ("evo2", "generator", "caduceus")} == {64}


def test_a_width_belongs_to_several_checkpoints():
    assert candidates(4096) == ["evo2_7b_base", "evo2_7b_microviridae", "evo2_7b_262k", "evo2_7b"]
    found = candidates(512)
    assert "caduceus-ps_seqlen-131k_d_model-256_n_layer-16 as ps_raw" in found
    assert "nucleotide-transformer-v2-100m-multi-species" in found


def test_a_wrong_width_names_the_candidates():
    spec = find_checkpoint("evo2", "evo2_1b_base")
    with pytest.raises(UserError, match=r"width 8192.*gives 1920.*evo2_20b, evo2_40b_base"):
        check_width(8192, name="evo2_1b_base", spec=spec, strands="averaged", where="x.pt")
    check_width(1920, name="evo2_1b_base", spec=spec, strands="averaged", where="x.pt")
    check_width(3840, name="evo2_1b_base", spec=spec, strands="concat", where="x.pt")
    with pytest.raises(UserError, match="two strands of 'evo2_1b_base' side by side"):
        check_width(3840, name="evo2_1b_base", spec=spec, strands="averaged", where="x.pt")


def test_the_misspelt_upstream_default_names_the_real_checkpoint():
    with pytest.raises(UserError, match=r"Did you mean 'GENERator-v2-eukaryote-1\.2b-base'"):
        find_checkpoint("generator", "GENERator-eukaryote-v2-1.2b-base")


@pytest.mark.parametrize(
    "layer", ["blocks.26", "blocks.28.mlp.l3", "blocks.31.post_norm", "norm", "embedding_layer"]
)
def test_layers_of_the_7b_are_accepted(layer):
    check_layer("evo2", "evo2_7b", find_checkpoint("evo2", "evo2_7b"), layer, where="x.pt")


@pytest.mark.parametrize(
    ("checkpoint", "layer", "message"),
    [
        ("evo2_1b_base", "blocks.28.mlp.l3", "does not exist in 'evo2_1b_base'.*25 layers"),
        ("evo2_20b", "blocks.24", "24 layers"),
        ("evo2_7b", "blocks.5.mlp.l1", "no embedding"),
        ("evo2_7b", "blocks.5.mlp.l2", "no embedding"),
        ("evo2_7b", "blocks.5.projections", "no embedding"),
        ("evo2_7b", "blokcs.5", "no layer 'blokcs.5'"),
        ("simulated", "blocks.5.projections", "no embedding"),
    ],
)
def test_layers_that_do_not_exist_or_are_not_hidden_states_are_refused(checkpoint, layer, message):
    spec = find_checkpoint("evo2", checkpoint)
    with pytest.raises(UserError, match=message):
        check_layer("evo2", checkpoint, spec, layer, where="x.pt")


def test_hidden_states_count_from_the_input_embedding():
    name = "GENERator-eukaryote-1.2b-base"
    spec = find_checkpoint("generator", name)
    for layer in ("hidden_states.26", "model.layers.25", "last", "model.norm", "-1"):
        check_layer("generator", name, spec, layer, where="x.npz")
    for layer in ("hidden_states.27", "model.layers.26", "middle"):
        with pytest.raises(UserError):
            check_layer("generator", name, spec, layer, where="x.npz")


@pytest.mark.parametrize(
    ("length_bp", "n_tokens", "token_unit", "message"),
    [
        (6001, None, None, "not a multiple of 6.*from 6000 bp"),
        (6000, 6000, None, "1000 6-mer tokens"),
        (6000, 999, None, "do not cover"),
        (600_000, None, None, "longer than the 98304 bp"),
        (None, None, "bp", "reads 6-mer tokens"),
    ],
)
def test_lengths_that_a_six_mer_tokenizer_would_garble_are_refused(
    length_bp, n_tokens, token_unit, message
):
    name = "GENERator-eukaryote-1.2b-base"
    arguments = {
        "length_bp": length_bp,
        "n_tokens": n_tokens,
        "token_unit": token_unit,
        "chunked": False,
        "where": "provenance.json",
    }
    with pytest.raises(UserError, match=message):
        check_tokens("generator", name, find_checkpoint("generator", name), **arguments)


def test_a_length_of_whole_tokens_with_special_ones_is_accepted():
    name = "GENERator-eukaryote-1.2b-base"
    check_tokens(
        "generator",
        name,
        find_checkpoint("generator", name),
        token_unit="6-mer",
        length_bp=6000,
        n_tokens=1002,
        chunked=False,
        where="provenance.json",
    )
