"""Hidden relatives are found in DNA that only inheritance makes alike."""

import numpy as np

from brainfusion.eval.relatives import alike_in_training


def genomes(n_families: int, size: int, *, n_genes: int = 60, seed: int = 0) -> np.ndarray:
    """Embeddings [people, genes x 4] of sibships: parents' haplotypes, passed on at random."""
    rng = np.random.default_rng(seed)
    haplotypes = rng.standard_normal((8, n_genes, 4))  # founders of each gene
    parents = rng.integers(0, 8, (n_families, 2, 2, n_genes))
    people = []
    for family in parents:
        for _ in range(size):
            passed = rng.integers(0, 2, (2, n_genes))
            own = [family[i, passed[i], np.arange(n_genes)] for i in (0, 1)]
            people.append(np.mean([haplotypes[h, np.arange(n_genes)] for h in own], axis=0))
    return np.stack(people).reshape(n_families * size, -1)


def test_siblings_on_both_sides_are_found_and_whole_families_are_not():
    dna = genomes(100, 4)
    sibling = np.arange(400) % 4
    torn = alike_in_training(dna, np.flatnonzero(sibling < 3), np.flatnonzero(sibling == 3))
    assert torn["warns"]
    assert torn["n_alike"] > 75
    assert torn["n_test"] == 100
    whole = alike_in_training(dna, np.arange(300), np.arange(300, 400))
    assert not whole["warns"]
    assert whole["n_alike"] <= 5


def test_strangers_of_several_populations_are_no_relatives():
    rng = np.random.default_rng(1)
    centres = 0.5 * rng.standard_normal((3, 200))
    dna = centres[rng.integers(0, 3, 600)] + rng.standard_normal((600, 200))
    assert not alike_in_training(dna, np.arange(400), np.arange(400, 600))["warns"]


def test_a_table_too_narrow_to_tell_warns_of_nobody():
    everyone = np.random.default_rng(0).standard_normal((300, 3)), np.ones((300, 3))
    for dna in everyone:
        found = alike_in_training(dna, np.arange(200), np.arange(200, 300))
        assert found["n_alike"] == 0
        assert found["correlation"] > 1
        assert not found["warns"]


def test_few_people_who_are_strangers_are_not_called_relatives():
    for seed in range(5):
        dna = genomes(150, 1, n_genes=24, seed=seed)
        assert not alike_in_training(dna, np.arange(110), np.arange(110, 150))["warns"]


def test_one_person_twice_is_alike():
    dna = np.random.default_rng(2).standard_normal((200, 300))
    dna[150:] = dna[:50] + 0.01
    found = alike_in_training(dna, np.arange(150), np.arange(150, 200))
    assert found["n_alike"] == 50
    assert found["warns"]
