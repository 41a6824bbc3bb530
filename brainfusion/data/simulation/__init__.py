"""The parts of the simulated cohort, each a pure function of a config and a random stream.

people draws families, genomes, latent traits and phenotypes; genotypes the founder haplotypes and
their transmission; dna what frozen random sequence models make of the haplotypes; bold the
recordings. `brainfusion.data.simulate` puts them together and writes the folder.
"""
