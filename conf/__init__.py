"""Values only: YAML that `infini.cli` turns into dataclasses."""
