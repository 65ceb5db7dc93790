"""Running, comparing and building: everything that happens to a written artefact."""
