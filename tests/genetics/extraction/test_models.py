import sys

import numpy as np
import pytest
import torch

from brainfusion.genetics.extraction import packages
from brainfusion.genetics.extraction.models import configure, embed, load_model
from brainfusion.genetics.strands import fold_ps
from brainfusion.runtime.errors import UserError
from tests.genetics.extraction import toys
from tests.genetics.extraction.people import reference


def texts(n: int, length_bp: int) -> list[str]:
    return [reference(seed, length_bp) for seed in range(n)]


def test_evo2_reads_a_block_through_its_package_and_says_what_it_prints_elsewhere(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "evo2", toys.evo2_package())
    config = configure("evo2", checkpoint="simulated", layer="blocks.1", weights=tmp_path)
    model = load_model(config)
    assert capsys.readouterr().out == ""
    [vector] = embed(model, config, texts(1, 40))
    net = toys.ConvModel(512, causal=True, seed=1)
    with torch.no_grad():
        expected = net(torch.tensor([list(texts(1, 40)[0].encode())]))[0].mean(dim=0)
    np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert model.facts["device"] == "cpu"
    assert len(model.facts["weights_hash"]) == 16


def test_evo2s_layers_belong_to_the_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "evo2", toys.evo2_package())
    assert configure("evo2").layer == "blocks.26"
    assert configure("evo2", checkpoint="evo2_40b").layer == "blocks.20"
    with pytest.raises(UserError, match="nobody has published which layer"):
        configure("evo2", checkpoint="evo2_1b_base")
    with pytest.raises(UserError, match="does not exist in 'evo2_1b_base'"):
        configure("evo2", checkpoint="evo2_1b_base", layer="blocks.28.mlp.l3")
    config = configure("evo2", checkpoint="simulated", layer="blocks.7", weights=tmp_path)
    with pytest.raises(UserError, match=r"'blocks.7' is no module"):
        load_model(config)


@pytest.mark.parametrize("pooling", ["mean", "separator", "last"])
def test_generator_reads_six_mers_between_separators(monkeypatch, tmp_path, pooling):
    monkeypatch.setitem(sys.modules, "transformers", toys.transformers_package("generator"))
    config = configure("generator", checkpoint="simulated", weights=tmp_path, pooling=pooling)
    model = load_model(config)
    vectors = embed(model, config, texts(3, 36))
    net = toys.ConvModel(4098, causal=True, kernel=3)
    with torch.no_grad():
        hidden = net(torch.tensor([toys.six_mers(text) for text in texts(3, 36)]))
    expected = {"mean": hidden[:, 1:7].mean(dim=1), "separator": hidden[:, 7], "last": hidden[:, 6]}
    np.testing.assert_allclose(vectors, expected[pooling].numpy(), rtol=1e-5, atol=1e-6)


def test_generator_reads_hidden_states_by_number(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", toys.transformers_package("generator"))
    last = configure("generator", checkpoint="simulated", weights=tmp_path)
    first = configure(
        "generator", checkpoint="simulated", weights=tmp_path, layer="hidden_states.0"
    )
    sequences = texts(1, 36)
    half = embed(load_model(first), first, sequences)
    np.testing.assert_allclose(half, embed(load_model(last), last, sequences) / 2, rtol=1e-6)
    beyond = configure("generator", checkpoint="simulated", weights=tmp_path, layer="7")
    with pytest.raises(UserError, match="hidden states 0 to 1"):
        embed(load_model(beyond), beyond, sequences)


def test_a_length_that_six_mers_cannot_cut_is_caught_by_the_number_of_tokens(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", toys.transformers_package("generator"))
    config = configure("generator", checkpoint="simulated", weights=tmp_path)
    with pytest.raises(UserError, match="9 tokens of 38 bp between two separators, expected 8"):
        embed(load_model(config), config, texts(1, 38))


def test_caduceus_gives_both_halves_and_its_kernels_are_kept(monkeypatch, tmp_path):
    package = toys.transformers_package("caduceus", rcps=True, fused_add_norm=True)
    monkeypatch.setitem(sys.modules, "transformers", package)
    config = configure("caduceus", checkpoint="simulated", weights=tmp_path)
    model = load_model(config)
    raw = embed(model, config, texts(2, 50))
    flipped = embed(model, config, [toys_reverse(text) for text in texts(2, 50)])
    assert raw.shape == (2, 128)
    assert model.facts["fused_add_norm"] is True
    np.testing.assert_allclose(fold_ps(raw), fold_ps(flipped), atol=1e-6)
    assert np.abs(raw - flipped).max() > 1e-2


def toys_reverse(text: str) -> str:
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def test_weights_that_are_not_the_declared_ones_are_refused(monkeypatch, tmp_path):
    package = toys.transformers_package("caduceus", rcps=False)
    monkeypatch.setitem(sys.modules, "transformers", package)
    config = configure("caduceus", checkpoint="simulated", weights=tmp_path)
    with pytest.raises(UserError, match="is a PS checkpoint, but the weights' config says"):
        load_model(config)
    monkeypatch.setitem(sys.modules, "transformers", toys.transformers_package("caduceus"))
    name = "caduceus-ph_seqlen-1k_d_model-118_n_layer-4_lr-8e-3"
    config = configure("caduceus", checkpoint=name, weights=tmp_path)
    with pytest.raises(UserError, match=r"shape .1, 50, 128. .* expected .1, 50, 118"):
        embed(load_model(config), config, texts(1, 50))


def test_packages_and_weights_that_are_missing_are_said_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "evo2", None)  # as if it were not installed
    config = configure("evo2")
    with pytest.raises(UserError, match=r"Evo 2 needs the package evo2.*pip install evo2"):
        load_model(config)
    monkeypatch.setitem(sys.modules, "transformers", toys.transformers_package("caduceus"))
    with pytest.raises(UserError, match=r"cannot be loaded .*valid model identifier.*--weights"):
        load_model(configure("caduceus"))
    with pytest.raises(UserError, match="does not exist: expected the checkpoint's file"):
        configure("evo2", weights=tmp_path / "absent.pt")
    monkeypatch.setitem(packages.INSTALL, "no_such_package", "pip install it")
    with pytest.raises(UserError, match="needs the package no_such_package"):
        packages.check_present("no_such_package", purpose="this")


def test_names_that_no_checkpoint_has_are_refused():
    with pytest.raises(UserError, match="Did you mean 'evo2_7b'"):
        configure("evo2", checkpoint="evo2_7bb")
    with pytest.raises(UserError, match="not offered for Caduceus"):
        configure("caduceus", layer="backbone.layers.3")
    with pytest.raises(UserError, match="--pooling 'separator' is not offered for evo2"):
        configure("evo2", pooling="separator")
    with pytest.raises(UserError, match="anybody's random weights"):
        configure("evo2", checkpoint="simulated", layer="blocks.1")
    with pytest.raises(UserError, match="unknown model 'evo'"):
        configure("evo")


def test_sums_run_in_float32_whatever_the_positions_are():
    config = configure("evo2", checkpoint="evo2_1b_base", layer="blocks.3")
    model = toys.Evo2Like()
    model.positions = lambda texts: torch.full((1, 4000, 1920), 1.0 + 2**-7).bfloat16()
    pooled = embed(model, config, ["A" * 4000])
    assert pooled.dtype == np.float32
    np.testing.assert_array_equal(pooled, np.float32(1.0 + 2**-7))  # bfloat16 sums stop at 256


def test_a_real_llama_over_six_mers_is_read_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    from itertools import product

    words = ["<oov>", "<s>", "</s>", "<pad>", *("".join(p) for p in product("ACGT", repeat=6))]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<oov>"))
    every_six = tokenizers.Regex(".{1,6}")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(every_six, "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<oov>",
    )  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    fast.save_pretrained(tmp_path)
    llama.save_pretrained(tmp_path)
    sequences = texts(2, 60)
    with torch.no_grad():
        ids = torch.tensor([[1, *(vocabulary[t[k : k + 6]] for k in range(0, 60, 6)), 1]
                            for t in sequences])  # fmt: skip
        states = llama(ids, output_hidden_states=True).hidden_states
    for layer, state in (("last", states[3]), ("hidden_states.1", states[1]),
                         ("model.layers.0", states[1]), ("model.norm", states[3])):  # fmt: skip
        config = configure("generator", checkpoint="simulated", weights=tmp_path, layer=layer)
        vectors = embed(load_model(config), config, sequences)
        expected = state[:, 1:-1].mean(dim=1).numpy()
        np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
