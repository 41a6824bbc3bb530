"""Cohorts on disk: recordings, atlases, splits, standardisation, importers, simulation."""
