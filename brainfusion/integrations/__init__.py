"""Our encoders inside other people's tools. Nothing here is needed by the rest of the package."""
